"""The functions of the Python API. Each imports what it needs when it is called."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from pipeline.planning.keywords import BuildOptions, JobOptions, naming_keywords
from pipeline.tensor.bucket import output_at

if TYPE_CHECKING:
    from pipeline.engine.log import BuildLog
    from pipeline.planning.inspected import Inspection
    from pipeline.planning.job import Job
    from pipeline.planning.plans import Plan
    from pipeline.reporting.html.summary import VerificationSummary
    from pipeline.reporting.report import Report
    from pipeline.run.results import Built, Result
    from pipeline.watching.listener import Listener


@naming_keywords(JobOptions)
def plan(job: Job | str | Path | None = None, /, *, model: Any = None, **options: Unpack[JobOptions]) -> Plan:
    """Say what `convert` with the same arguments would do. Opens headers only and writes nothing.

    The workers of a cluster that is there are asked as `convert` does it, with files that are there for that moment.

    Parameters
    ----------
    job
        A Job, a TOML file of its fields, or nothing.
    model
        A Hugging Face model in memory (a PreTrainedModel of a known family), in the place of `model_dir`.
    **options
        A Job's fields, which override those of `job`.

    Returns
    -------
    Plan
        Targets, phases, scratch, bytes and memory; `summary()` has them as plain values.

    Raises
    ------
    BadInput
        With every problem of the request, the source and the output directory.
    """
    from pipeline.planning.make_plan import make_plan

    made = make_plan(_job(job, options, model is not None), model)
    if not made.job.elsewhere:
        return made
    from pipeline.run.workers import foreseen

    return foreseen(made)


@naming_keywords(JobOptions)
def convert(
    job: Job | str | Path | None = None,
    /,
    *,
    model: Any = None,
    listener: Listener | None = None,
    progress: bool | None = None,
    **options: Unpack[JobOptions],
) -> Result:
    """Convert a checkpoint into TensorRT-LLM ranks. A finished, unchanged output is left as it is.

    Parameters
    ----------
    job
        A Job, a TOML file of its fields, or nothing.
    model
        A Hugging Face model in memory (a PreTrainedModel of a known family), in the place of `model_dir`.
    listener
        Told of the run as it goes on; by default nobody is.
    progress
        Whether to show a bar and the address of the run's page: below a notebook's cell, on a terminal, or as lines on standard
        error. By default in a notebook that gives no listener.
    **options
        A Job's fields, which override those of `job`. With `engine` each target's engine is built, too.

    Returns
    -------
    Result
        The outputs, bytes, seconds, peak memory and engines.

    Raises
    ------
    BadInput
        With every problem of the request, the source and the output directory, before anything is written.
    Interrupted
        On Ctrl-C or SIGTERM. The same call again goes on where this one ended, and so after WriteFailed.
    WriteFailed
        Where the disk, the network or a worker fails.
    EngineFailed
        Where an engine was asked for and the builder failed, behind a checkpoint that is whole, or is not here, before anything is
        converted.
    """
    from pipeline.engine.requests import plan_requests
    from pipeline.planning.make_plan import make_plan
    from pipeline.run.execute import execute
    from pipeline.watching.shown import shown
    from pipeline.watching.state import RunWatch

    started, watch = time.perf_counter(), RunWatch()
    told = shown(progress, listener, watch)
    made = make_plan(_job(job, options, model is not None), model, download=True)
    engines = plan_requests(made)
    if not engines:
        return execute(made, told, started=started, watch=watch)
    from pipeline.engine.log import BuildLog
    from pipeline.engine.run import convert_and_build

    return convert_and_build(made, engines, told, BuildLog(quiet=True), started, watch)


@naming_keywords(BuildOptions)
def build(
    checkpoint: str | Path, /, *, log: BuildLog | None = None, scheduler: str = "local", **options: Unpack[BuildOptions]
) -> Built:
    """Build the engine of a finished checkpoint with TensorRT-LLM's builder.

    Parameters
    ----------
    checkpoint
        A TensorRT-LLM checkpoint, as `convert` writes it.
    log
        Told of the build as it goes on; by default nobody is.
    scheduler
        "local", "threads", "synchronous", or tcp://host:port of a Dask scheduler.
    **options
        `output_dir`, which there must be, the other options of headrace's own, and trtllm-build's.

    Returns
    -------
    Built
        The engine's directory, and what it took.

    Raises
    ------
    BadInput
        Where the checkpoint, an option or the engine's directory is wrong, before anything is written.
    EngineFailed
        Where the builder failed or is not here; nothing is left of the engine but its log.
    Interrupted
        On Ctrl-C; then there is no engine either.
    """
    from pipeline.engine.log import BuildLog
    from pipeline.engine.run import build_engine
    from pipeline.planning.engine_options import make_request

    return build_engine(make_request(Path(checkpoint), options), log or BuildLog(quiet=True), scheduler)


def verify(
    output_dir: str | Path,
    source: str | Path | None = None,
    *,
    quant_ckpt_path: str | Path | None = None,
    logits: bool = False,
    prompt: str | None = None,
    tokens: int = 32,
    sm: int | None = None,
    workers: int = 0,
    advance: Callable[[str, int, int], None] | None = None,
) -> VerificationSummary:
    """Look at a finished output; with `source`, compare every value with it; with `logits` or `prompt`, run both.

    Parameters
    ----------
    output_dir
        The directory that `convert` wrote.
    source
        What it was made of: a directory, a file, or org/name on the Hub.
    quant_ckpt_path
        As it was given to `convert`.
    logits
        Whether to compute logits from the ranks, and with transformers from the source.
    prompt
        What to compute logits for; needs the source's tokenizer.
    tokens
        How many random tokens, where there is no prompt.
    sm
        The GPUs (90 for SM 9.0) that the integer weights of an output without headrace.json are for; default 80.
    workers
        Threads that work at once; 0: one a core, at most 8.
    advance
        Called with the level, and how much of it is done, and of how much.

    Returns
    -------
    VerificationSummary
        What was found, level by level. Nothing is raised for findings; `check()` raises VerificationFailed where there is one.

    Raises
    ------
    BadInput
        Where there is no checkpoint at `output_dir`, no source where one is needed, or logits cannot be computed.
    """
    from pipeline.reporting.report import summarize

    extra = None if quant_ckpt_path is None else Path(quant_ckpt_path)
    return summarize(
        output_at(output_dir),
        source,
        quant_ckpt_path=extra,
        logits=logits or prompt is not None,
        prompt=prompt,
        tokens=tokens,
        sm=sm,
        workers=workers,
        advance=advance,
    )


def inspect(model_dir: str | Path, revision: str | None = None) -> Inspection:
    """Say what a checkpoint is. Opens headers only and writes nothing.

    Parameters
    ----------
    model_dir
        A directory, a GGUF file, or org/name on the Hub.
    revision
        Branch, tag or commit of a model on the Hub.

    Returns
    -------
    Inspection
        Source, family, sizes, quantization, files, and the parallel sizes that it can be cut to. What would keep it from being
        converted is among its `problems`.

    Raises
    ------
    BadInput
        Where it cannot be opened.
    """
    from pipeline.planning.inspected import as_inspection
    from pipeline.planning.inspection import inspect_source

    return as_inspection(inspect_source(model_dir, revision))


def report(
    output_dir: str | Path,
    source: str | Path | None = None,
    *,
    quant_ckpt_path: str | Path | None = None,
    page: str | Path | None = None,
    verification: VerificationSummary | Mapping[str, Any] | str | Path | None = None,
    advance: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Make one HTML page of an output: where it comes from, what was done, sizes, errors by layer, what is wrong.

    Parameters
    ----------
    output_dir
        The directory that `convert` wrote.
    source
        What it was made of; by default what headrace.json names, if that is there, unchanged.
    quant_ckpt_path
        As it was given to `convert`.
    page
        The file to write, named `*.html`; by default `{output_dir}.report.html` beside the output.
    verification
        What `verify` returned, or a file of what `headrace verify --json` printed; by default the output is verified now.
    advance
        As for `verify`.

    Returns
    -------
    Report
        Where the page is, and the verification that it shows. Nothing is raised for what is wrong with the output.

    Raises
    ------
    BadInput
        Where there is no output or no place for the page; nothing is written.
    WriteFailed
        Where the page cannot be written.
    """
    from pipeline.reporting.report import make_report

    extra = None if quant_ckpt_path is None else Path(quant_ckpt_path)
    place = None if page is None else Path(page)
    known = Path(verification) if isinstance(verification, str) else verification
    return make_report(output_at(output_dir), source, quant_ckpt_path=extra, output=place, verification=known, advance=advance)


def _job(job: Job | str | Path | None, options: JobOptions, live: bool) -> Job:
    from pipeline.planning.job import Job, make_job

    if isinstance(job, Job):
        return make_job(options, live=live, base=job)
    return make_job(options, None if job is None else Path(job), live)
