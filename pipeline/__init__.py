"""headrace: stream LLaMA-family checkpoints into TensorRT-LLM ranks on a machine far smaller than the checkpoint.

from pipeline import convert, plan, Job

print(plan(model_dir="Llama-3.1-70B", output_dir="ranks", tp_size=8).summary())
result = convert(model_dir="Llama-3.1-70B", output_dir="ranks", tp_size=8)
"""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import BadInput, EngineFailed, HeadraceError, Interrupted, WriteFailed

if TYPE_CHECKING:
    from pipeline.engine.log import BuildLog
    from pipeline.planning.job import Job
    from pipeline.planning.plans import Plan
    from pipeline.run.execute import Built, Result
    from pipeline.run.loaders import load_from_gptq_llama, load_from_hf_checkpoint, load_from_hf_llama, load_from_meta_llama
    from pipeline.watching.listener import Listener

__all__ = [
    "BadInput",
    "EngineFailed",
    "HeadraceError",
    "Interrupted",
    "Job",
    "WriteFailed",
    "build",
    "convert",
    "load_from_gptq_llama",
    "load_from_hf_checkpoint",
    "load_from_hf_llama",
    "load_from_meta_llama",
    "plan",
]


def __getattr__(name: str) -> Any:
    """Job and the loaders, imported when one is asked for: the command line's help needs neither numpy nor all of Job."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("pipeline.planning.job" if name == "Job" else "pipeline.run.loaders"), name)


def plan(job: Job | str | Path | None = None, /, *, model: Any = None, **options: Any) -> Plan:
    """Say what `convert` with the same arguments would do; opens headers only and writes nothing.

    `job` is a Job, a TOML file of its fields, or nothing; `options` are a Job's fields and override it. `model` is a Hugging Face
    model in memory (a PreTrainedModel of a known family), in the place of `model_dir`.
    Raises BadInput with every problem of the request, the source and the output directory.
    """
    from pipeline.planning.make_plan import make_plan

    return make_plan(_job(job, options, model is not None), model)


def convert(
    job: Job | str | Path | None = None, /, *, model: Any = None, listener: Listener | None = None, **options: Any
) -> Result:
    """Convert a checkpoint; arguments as for `plan`. A finished, unchanged output is left as it is.

    With `engine` (a dict, or a job file's [engine] table) each target's engine is built, too. Returns the outputs, bytes, seconds,
    peak memory and engines. Raises BadInput before anything is written, Interrupted and WriteFailed after, and EngineFailed.
    """
    from pipeline.engine.requests import plan_requests
    from pipeline.planning.make_plan import make_plan
    from pipeline.run.execute import execute

    started = time.perf_counter()
    made = make_plan(_job(job, options, model is not None), model, download=True)
    engines = plan_requests(made)
    if not engines:
        return execute(made, listener, started=started)
    from pipeline.engine.log import BuildLog
    from pipeline.engine.run import convert_and_build

    return convert_and_build(made, engines, listener, BuildLog(quiet=True), started)


def build(checkpoint: str | Path, /, *, log: BuildLog | None = None, scheduler: str = "local", **options: Any) -> Built:
    """Build the engine of a finished checkpoint with TensorRT-LLM's builder.

    `options`: `output_dir` and the other fields of `pipeline.engine.EngineOptions`, and trtllm-build's own. `log`: what hears of
    it; nothing by default. Raises BadInput before anything is written, EngineFailed and Interrupted; then there is no engine.
    """
    from pipeline.engine.log import BuildLog
    from pipeline.engine.run import build_engine
    from pipeline.planning.engine_options import make_request

    return build_engine(make_request(Path(checkpoint), options), log or BuildLog(quiet=True), scheduler)


def _job(job: Job | str | Path | None, options: dict[str, Any], live: bool) -> Job:
    from pipeline.planning.job import Job, make_job

    if isinstance(job, Job):
        return make_job({**job.model_dump(), **options}, live=live)
    return make_job(options, None if job is None else Path(job), live)
