"""build: run TensorRT-LLM's own builder, which writes the engine files of a checkpoint. An engine is whole or not there.

Runs on the worker that has the GPU, for `trtllm-build`, for a container around it, and for ranks that are built through Python
(rank.py). Machines exchange only plain values and files: the log, and a token file whose removal stops the builder. A task never
raises for what becomes of a build: its outcome says it, so that a conversion beside it goes on.
"""

from __future__ import annotations

import shutil
import socket
import sys
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from stages.build.arranged_weights import ArrangedWeights
from stages.build.builders import Builder, BuilderProbe, gpu_generations, gpus, probe
from stages.build.process import run

ATTEMPT = "# attempt "  # begins a line of the log, before another attempt


@dataclass(frozen=True)
class BuilderCall:
    """One engine, or one rank of it, for the builder to make.

    Attributes
    ----------
    name
        Unlike any other call's.
    builder
        The builder to use, with the places in its container's command filled in.
    words
        The command line behind the builder's own words.
    directory
        The builder writes there and runs there.
    log
        The file that its output goes to.
    token
        The builder is stopped when this file is removed.
    kept
        Files of `directory`, beside the token, that another attempt leaves alone.
    expected
        The names of the files that a whole engine has.
    probed
        The builder of the machine that builds, where it has been asked; otherwise it is asked now.
    rank
        The rank to make, None for all.
    ranks
        How many there are.
    attempts
        How often it is tried, at most.
    sync
        Whether to flush the log to the file system, so that other machines see it.
    arranged
        The order that the checkpoint's integer weights are in, which the machine that builds must read; None where any reads them.
    """

    name: str
    builder: Builder
    words: tuple[str, ...]
    directory: Path
    log: Path
    token: Path
    kept: tuple[Path, ...] = ()
    expected: tuple[str, ...] = ()
    probed: BuilderProbe | None = None
    rank: int | None = None
    ranks: int = 1
    attempts: int = 1
    sync: bool = False
    arranged: ArrangedWeights | None = None

    def command(self, probed: BuilderProbe | None) -> tuple[str, ...]:
        """The command line that makes all ranks, for the builder that was found."""
        found = probed.words if probed and probed.words else (self.builder.command,)
        return (*((*self.builder.container, self.builder.command) if self.builder.container else found), *self.words)


@dataclass(frozen=True)
class BuilderOutcome:
    """The outcome of a call.

    `code`: the exit code of the last attempt, negative for a signal. `host`: the machine that it ran on. `gpus`: how many that
    machine shows. `lines`: those of the log that tell why it failed. `stopped`: whether its token was removed. `refused`: the
    builder's message on an option that it does not take. `unfit`: why the machine would read the weights wrongly, so that no
    builder was run. `probed`: the builder that was used. `attempts`: how many there were.
    """

    name: str
    code: int
    seconds: float = 0.0
    host: str = field(default_factory=socket.gethostname)
    gpus: int = field(default_factory=gpus)
    lines: tuple[str, ...] = ()
    stopped: bool = False
    refused: str = ""
    unfit: str = ""
    probed: BuilderProbe = field(default_factory=BuilderProbe)
    attempts: int = 1


def build(call: BuilderCall) -> BuilderOutcome:
    """Have the builder make an engine, or a rank of it: the task `build` of a graph. Never raises an Exception.

    A failure is tried again as often as the call says, but for options that the builder refuses.
    """
    began = time.perf_counter()
    try:
        _leave_thread(call)
        outcome = _attempts(call)
    except Exception as error:  # whatever it is, a conversion may run beside it
        outcome = BuilderOutcome(call.name, 1, lines=(f"{type(error).__name__}: {error}",), probed=call.probed or BuilderProbe())
    return replace(outcome, seconds=time.perf_counter() - began)


def _leave_thread(call: BuilderCall) -> None:
    """Have a Dask worker run another task in the place of this one: the builder is a process of its own."""
    worker = sys.modules.get("distributed.worker")  # other schedulers do without it
    if worker is not None and getattr(worker.thread_state, "key", None) == ("build", call.name):
        worker.secede()


def _attempts(call: BuilderCall) -> BuilderOutcome:
    probed = call.probed or probe(call.builder)
    if probed.trouble or not probed.words:
        return BuilderOutcome(call.name, 127, lines=(probed.trouble,), probed=probed)
    if unfit := _unfit(call, probed):
        return BuilderOutcome(call.name, 1, unfit=unfit, probed=probed)
    every = range(call.ranks) if call.rank is None and probed.kind == "python" else (call.rank,)
    for attempt in range(1, call.attempts + 1):
        if attempt > 1:
            if call.rank is None:  # other ranks' engines are in the directory otherwise
                clear(call.directory, (call.token, *call.kept))
            with call.log.open("ab") as log:
                log.write(f"{ATTEMPT}{attempt} of {call.attempts}\n".encode())
        for rank in every:
            own = () if rank is None else ("--rank", str(rank))
            ended = run((*call.command(probed), *own), call.directory, call.log, call.token, call.sync)
            outcome = BuilderOutcome(call.name, probed=probed, attempts=attempt, **vars(ended))
            if outcome.code or outcome.stopped:
                break
        if outcome.stopped or outcome.refused or not (outcome.code or missing(call.directory, call.expected)):
            break
    return outcome


def _unfit(call: BuilderCall, probed: BuilderProbe) -> str:
    """Why this machine would read a checkpoint's weights wrongly, "" where it would not. `probed` may be of another machine."""
    if call.arranged is None:
        return ""
    here = replace(probed, host=socket.gethostname(), generations=gpu_generations())
    return "\n".join(map(str, call.arranged.problems(here)))


def missing(directory: Path, names: Iterable[str]) -> list[str]:
    """The files of these names that are not in a directory, or empty."""
    return [name for name in names if not (path := directory / name).is_file() or not path.stat().st_size]


def clear(directory: Path, kept: Collection[Path]) -> None:
    """Empty a directory under construction, but for some files."""
    for path in directory.iterdir():
        if path in kept:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
