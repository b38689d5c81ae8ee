"""Explain why there is no engine: the builder's own last lines, and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.engine.output import EngineDirectory

if TYPE_CHECKING:
    from stages.build import BuilderOutcome
    from stages.build.builders import BuilderProbe

INSTALL = "pip install 'headrace[engine]' --extra-index-url https://pypi.nvidia.com"


def lacking(probed: BuilderProbe) -> str:
    """Say that a machine cannot build, and why."""
    return f"no engine can be built on {probed.host}: {probed.trouble}"


def no_builder(probed: BuilderProbe, commands: Sequence[str]) -> str:
    """Explain why a machine cannot build, name remedies, and list the command lines to run where there is a builder."""
    ways = f"install TensorRT-LLM 1.2.1 ({INSTALL}), or name its builder with --trtllm_build or --container, and run"
    lines = "".join(f"\n  {command}" for command in commands)
    return f"{lacking(probed)}\nOn a machine with an NVIDIA GPU {ways}{lines}"


def no_worker(engine: Path, scheduler: str) -> str:
    """Explain that all is converted, but that nobody offers to build. `scheduler`: its address, or the class of its cluster."""
    start = f"Where trtllm-build is, start\n  dask worker {scheduler} --nthreads 1 --resources GPU=1"
    if "://" not in scheduler:
        start = "Have the [cluster] table start a worker with --resources GPU=1 where trtllm-build is, or run headrace build there,"
    return (
        f"{engine}: found no worker with the resource GPU at {scheduler}; expected one, as a build takes GPU=1. The checkpoint is "
        f"whole. {start}\nand run the same command again: it does the build alone"
    )


def lost_builder(place: EngineDirectory, why: str) -> str:
    """Explain that Dask gave a build up, as the workers that did it were lost one after another."""
    logs = ", ".join(str(log) for log in place.logs if log.exists()) or "none was written"
    return (
        f"{place.directory}: found that the workers which built it were lost ({why}); expected one that goes on to the end. The "
        f"checkpoint is whole: look at the workers' memory, and run the same command again: it does the build alone\nLog: {logs}"
    )


def no_engine(
    place: EngineDirectory, program: str, outcomes: Sequence[BuilderOutcome], missing: Sequence[str], attempts: int, command: str
) -> str:
    """Explain how a builder's calls ended that left no engine.

    `program`: the builder's name. `missing`: files that the engine lacks. `command`: the line to run where there is a GPU.
    """
    times = f", {attempts} attempts" if attempts > 1 else ""
    failed = [outcome for outcome in outcomes if outcome.code and not outcome.stopped]
    stopped = not failed and any(outcome.stopped for outcome in outcomes)
    if failed:
        code = f"signal {-failed[0].code}" if failed[0].code < 0 else f"exit code {failed[0].code}"
        head = f"{program} ended with {code} after {failed[0].seconds:.1f} s on {failed[0].host}{times}; its last lines of error:"
    elif stopped:
        head = f"{place.partial} was removed while {program} was at work"
    else:
        head = f"{program} ended without an error, but wrote no whole engine{times}; not there, or empty:"
    lines = failed[0].lines if failed else () if stopped else missing
    logs = ", ".join(str(log) for log in place.logs if log.exists())
    text = [f"{place.directory}: {head}", *(f"  {line}" for line in lines), f"Log: {logs}"]
    if failed and not failed[0].gpus:
        text.append(f"{failed[0].host} shows no NVIDIA GPU. On a machine that has one:\n  {command}")
    return "\n".join(text)
