"""The builder of a machine: a command, one in a container, or TensorRT-LLM's Python package; its version and its options."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path
from typing import Literal

from stages.build.process import telling_lines

HELP_SECONDS = 300.0  # importing TensorRT-LLM takes half a minute on a cold disk
ASK_SECONDS = 60.0  # a driver that is not kept loaded takes seconds to begin
PACKAGE = "tensorrt_llm"
RANK_SCRIPT = Path(__file__).with_name("rank.py")

_VERSION = re.compile(r"TensorRT[- ]LLM version:\s*(\S+)")
_CAPABILITY = re.compile(r"(\d+)\.(\d)")


@dataclass(frozen=True)
class Builder:
    """The builder to use: a command (a name on PATH, or a path), perhaps in a container, or the Python package."""

    kind: Literal["auto", "command", "python"] = "auto"
    command: str = "trtllm-build"
    container: tuple[str, ...] = ()


@dataclass(frozen=True)
class BuilderProbe:
    """The builder that a machine has.

    `words`: the beginning of its command line, empty where there is no builder. `kind`: "command" or "python". `help`: the output
    of its --help, "" for a container, which is not started for it. `trouble`: why there is no builder, or why it does not run.
    `host`: the machine. `generations`: those of its GPUs (80 for SM 8.0), none where it does not say.
    """

    words: tuple[str, ...] = ()
    kind: str = ""
    version: str = ""
    help: str = ""
    trouble: str = ""
    host: str = field(default_factory=socket.gethostname)
    generations: tuple[int, ...] = ()


def probe(builder: Builder) -> BuilderProbe:
    """Find the builder of this machine and ask it for its version and its options, and the machine for its GPUs."""
    if builder.container:
        if shutil.which(builder.container[0]) is None:
            return BuilderProbe(trouble=f"{builder.container[0]}, which begins the container command, is not on PATH")
        return BuilderProbe((*builder.container, builder.command), "command", generations=gpu_generations())
    words, kind, trouble = _find(builder)
    if not words:
        return BuilderProbe(trouble=trouble)
    try:
        ran = _answer([*words, "--help"], HELP_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return BuilderProbe(words, kind, trouble=f"{words[0]} --help: {error}")
    if ran.returncode:
        last = "\n  ".join(telling_lines((ran.stdout + ran.stderr).splitlines()))
        return BuilderProbe(words, kind, trouble=f"{' '.join(words)} --help ended with exit code {ran.returncode}:\n  {last}")
    version = _VERSION.search(ran.stdout + ran.stderr)
    said = version[1] if version else _package_version()
    return BuilderProbe(words, kind, said, ran.stdout, generations=gpu_generations())


def _answer(command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Ask a command something. Raises OSError or TimeoutExpired where it cannot be run or takes longer."""
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds,
        env={**os.environ, "COLUMNS": "200"},
        check=False,
    )


def gpus() -> int:
    """The number of NVIDIA GPUs that this machine shows."""
    return len([path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()])


def gpu_generations() -> tuple[int, ...]:
    """The generations (80 for SM 8.0) of this machine's NVIDIA GPUs, each once; none where there is no nvidia-smi that says it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    try:
        ran = _answer([program, "--query-gpu=compute_cap", "--format=csv,noheader"], ASK_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    said = [_CAPABILITY.fullmatch(line.strip()) for line in ran.stdout.splitlines()] if ran.returncode == 0 else []
    return tuple(sorted({int(each[1] + each[2]) for each in said if each}))


def _find(builder: Builder) -> tuple[tuple[str, ...], str, str]:
    """The words that begin the builder's command line, its kind, and what is missing where there is no builder."""
    missing = []
    if builder.kind != "python":
        program = shutil.which(builder.command)
        if program:
            return (str(Path(program).absolute()),), "command", ""
        missing.append(f"no {builder.command}{'' if '/' in builder.command else ' on PATH'}")
    if builder.kind != "command":
        if util.find_spec(PACKAGE):
            return (sys.executable, "-P", str(RANK_SCRIPT)), "python", ""
        missing.append(f"no Python package {PACKAGE}")
    return (), "", " and ".join(missing)


def _package_version() -> str:
    """The installed version of TensorRT-LLM, "" for none."""
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return ""
