"""The package behind `headrace`, whose names are these: import them from there.

The functions are light; classes and loaders are imported when one is asked for, so that the command line's help needs neither numpy
nor all of Job.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pipeline.api import build, convert, inspect, plan, report, verify
from pipeline.errors import BadInput, EngineFailed, HeadraceError, Interrupted, Problem, VerificationFailed, WriteFailed

if TYPE_CHECKING:
    from pipeline.engine.log import BuildLog
    from pipeline.planning.inspected import Inspection
    from pipeline.planning.job import Job
    from pipeline.planning.keywords import BuildOptions, JobOptions, LoadOptions, TargetTable
    from pipeline.planning.plans import Plan
    from pipeline.reporting.html.summary import VerificationSummary
    from pipeline.reporting.report import Report
    from pipeline.run.loaders import (
        RankWeights,
        load_from_gptq_llama,
        load_from_hf_checkpoint,
        load_from_hf_llama,
        load_from_meta_llama,
    )
    from pipeline.run.results import Built, Result
    from pipeline.watching.listener import Listener

    __version__: str

__all__ = [
    "BadInput",
    "BuildLog",
    "BuildOptions",
    "Built",
    "EngineFailed",
    "HeadraceError",
    "Inspection",
    "Interrupted",
    "Job",
    "JobOptions",
    "Listener",
    "LoadOptions",
    "Plan",
    "Problem",
    "RankWeights",
    "Report",
    "Result",
    "TargetTable",
    "VerificationFailed",
    "VerificationSummary",
    "WriteFailed",
    "__version__",
    "build",
    "convert",
    "inspect",
    "load_from_gptq_llama",
    "load_from_hf_checkpoint",
    "load_from_hf_llama",
    "load_from_meta_llama",
    "plan",
    "report",
    "verify",
]

# Where the names are that are imported when one is asked for.
_LATER = {
    "BuildLog": "pipeline.engine.log",
    "BuildOptions": "pipeline.planning.keywords",
    "Built": "pipeline.run.results",
    "Inspection": "pipeline.planning.inspected",
    "Job": "pipeline.planning.job",
    "JobOptions": "pipeline.planning.keywords",
    "Listener": "pipeline.watching.listener",
    "LoadOptions": "pipeline.planning.keywords",
    "Plan": "pipeline.planning.plans",
    "RankWeights": "pipeline.run.loaders",
    "Report": "pipeline.reporting.report",
    "Result": "pipeline.run.results",
    "VerificationSummary": "pipeline.reporting.html.summary",
    "TargetTable": "pipeline.planning.keywords",
    "load_from_gptq_llama": "pipeline.run.loaders",
    "load_from_hf_checkpoint": "pipeline.run.loaders",
    "load_from_hf_llama": "pipeline.run.loaders",
    "load_from_meta_llama": "pipeline.run.loaders",
}

if not TYPE_CHECKING:  # else a type checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        """A name of `_LATER`, and the version: importlib.metadata is not quick to import."""
        if name == "__version__":
            return importlib.import_module("importlib.metadata").version("headrace")
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_LATER[name]), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
