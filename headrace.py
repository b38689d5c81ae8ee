"""Stream LLaMA-family checkpoints into TensorRT-LLM ranks, on a machine far smaller than the checkpoint.

import headrace

print(headrace.plan(model_dir="Llama-3.1-70B", output_dir="ranks", tp_size=8).summary())
result = headrace.convert(model_dir="Llama-3.1-70B", output_dir="ranks", tp_size=8)
headrace.verify("ranks", "Llama-3.1-70B").check()

`python -m headrace` is the command line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pipeline
from pipeline import (
    BadInput,
    EngineFailed,
    HeadraceError,
    Interrupted,
    Problem,
    VerificationFailed,
    WriteFailed,
    build,
    convert,
    inspect,
    plan,
    report,
    verify,
)

if TYPE_CHECKING:
    from pipeline import (
        BuildLog,
        BuildOptions,
        Built,
        Inspection,
        Job,
        JobOptions,
        Listener,
        LoadOptions,
        Plan,
        RankWeights,
        Report,
        Result,
        TargetTable,
        VerificationSummary,
        __version__,
        load_from_gptq_llama,
        load_from_hf_checkpoint,
        load_from_hf_llama,
        load_from_meta_llama,
    )
else:

    def __getattr__(name: str) -> Any:
        """A name that is imported when it is asked for."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(pipeline, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


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

if __name__ == "__main__":
    from pipeline.cli import main

    main()
