"""What can go wrong, as exceptions that carry their exit code.

    HeadraceError            1  a bug, or something nobody foresaw
    |- BadInput              2  a bad request or a bad source; nothing was written
    |- Interrupted           3  stopped by the user; run the same command again
    |- WriteFailed           3  the disk or the network failed; outputs are incomplete and say so
    |- EngineFailed          4  no engine: the builder failed, or there is none here; the checkpoint is as it was
    `- VerificationFailed    5  an output is not what it should be

Every problem names the tensor, file or option it is about, what was found, what was expected, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class HeadraceError(Exception):
    """Base of every error that headrace raises on purpose."""

    exit_code = 1


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a request or a source.

    `subject` is the tensor, file or option; `remedy` may be empty where the expectation says enough. `passing`: time alone may mend
    it, as it does a disk without room or another job at work in the same place.
    """

    subject: str
    found: str
    expected: str
    remedy: str = ""
    passing: bool = False

    def __str__(self) -> str:
        text = f"{self.subject}: found {self.found}; expected {self.expected}"
        return f"{text}. {self.remedy}" if self.remedy else text


class BadInput(HeadraceError):
    """The request or the source cannot be converted. Carries every problem found; nothing was written."""

    exit_code = 2
    shown = 20

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(self.report())

    def __reduce__(self) -> tuple[type[BadInput], tuple[tuple[Problem, ...]]]:
        # Refusals that only values show come from workers.
        return BadInput, (self.problems,)

    def report(self) -> str:
        """All problems, one a line; of very many, the first `shown` and a count."""
        count = len(self.problems)
        lines = [f"{count} problem{'s' if count > 1 else ''}, nothing was written:"]
        lines += [f"  - {problem}" for problem in self.problems[: self.shown]]
        if count > self.shown:
            lines.append(f"  ... and {count - self.shown} more")
        return "\n".join(lines)


class Interrupted(HeadraceError):
    """The run was stopped before it was whole; what it wrote is still named `*.partial`."""

    exit_code = 3


class WriteFailed(HeadraceError):
    """Reading or writing failed while the plan ran; what was written is still named `*.partial`."""

    exit_code = 3


class EngineFailed(HeadraceError):
    """TensorRT-LLM's builder failed, or is not here; nothing is left of the engine but its log."""

    exit_code = 4


class VerificationFailed(HeadraceError):
    """An output is not what it should be. Carries every finding."""

    exit_code = 5
    shown = 40

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        lines = [f"verification failed, {count} finding{'s' if count > 1 else ''}:"]
        lines += [f"  - {problem}" for problem in self.problems[: self.shown]]
        if count > self.shown:
            lines.append(f"  ... and {count - self.shown} more")
        super().__init__("\n".join(lines))
