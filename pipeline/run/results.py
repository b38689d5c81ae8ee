"""Result and Built: the outcome of a conversion, and of the engines that were built with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.printed import InOneLine
from pipeline.tensor.units import human_bytes


@dataclass(frozen=True, repr=False)
class Built(InOneLine):
    """An engine that is there. `seconds`: of its builders, summed; 0 where nothing was to do."""

    directory: Path
    seconds: float = 0.0
    nbytes: int = 0
    attempts: int = 0
    up_to_date: bool = False

    def _line(self) -> str:
        return f"{self.directory}: {self._came}"

    def _rows(self) -> list[tuple[str, str]]:
        return [("engine", str(self.directory)), ("state", self._came), ("attempts", str(self.attempts or ""))]

    @property
    def _came(self) -> str:
        return "up to date" if self.up_to_date else f"{human_bytes(self.nbytes)} built in {self.seconds:.1f} s"


@dataclass(frozen=True, repr=False)
class Result(InOneLine):
    """The outcome of a conversion. Sizes in bytes, times in seconds.

    `bytes_read`: of the source, each byte once. `bytes_written`: into rank files, without headers and padding. Those of scratch are
    apart, and what an earlier, interrupted run moved is in none of them.
    `stages`: seconds and bytes by stage, summed over workers. `phases`: seconds by phase.
    `seconds`: until the last output was whole; engines have their own.
    `resumed_tasks`: how many of the plan's tasks an earlier, interrupted run had done. `engines`: what was built of the outputs.
    """

    outputs: tuple[Path, ...]
    bytes_read: int
    bytes_written: int
    seconds: float
    peak_memory_bytes: int
    stages: Mapping[str, Mapping[str, float]]
    phases: Mapping[str, float] = field(default_factory=dict)
    up_to_date: bool = False
    resumed_tasks: int = 0
    engines: tuple[Built, ...] = ()
    scratch_bytes_read: int = 0
    scratch_bytes_written: int = 0

    @property
    def directories(self) -> tuple[Path, ...]:
        """The output directories."""
        return tuple(dict.fromkeys(path.parent for path in self.outputs))

    def _line(self) -> str:
        names = ", ".join(directory.name for directory in self.directories)
        if self.up_to_date:
            return f"{names}: up to date"
        return f"{names}: {human_bytes(self.bytes_written)} written in {self.seconds:.1f} s"

    def _rows(self) -> list[tuple[str, str]]:
        seconds = {stage: totals.get("seconds", 0.0) for stage, totals in self.stages.items()}
        return [
            *(("output", str(directory)) for directory in self.directories),
            ("read", "" if self.up_to_date else human_bytes(self.bytes_read)),
            ("written", "up to date" if self.up_to_date else human_bytes(self.bytes_written)),
            ("scratch", human_bytes(self.scratch_bytes_written) if self.scratch_bytes_written else ""),
            ("seconds", f"{self.seconds:.1f}"),
            ("peak memory", human_bytes(self.peak_memory_bytes)),
            ("stages", ", ".join(f"{stage} {took:.1f} s" for stage, took in seconds.items())),
            *(("engine", built._line()) for built in self.engines),
        ]
