"""The exceptions that headrace raises on purpose, each with the exit code of the command line.

    HeadraceError            1  a bug, or something nobody foresaw
    |- BadInput              2  a bad request or a bad source; nothing was written
    |- Interrupted           3  stopped by the user; the same command resumes
    |- WriteFailed           3  the disk or the network failed; incomplete outputs are named as such
    |  `- SourceChanged      3  the source changed while it was read; nothing of it is left
    |- EngineFailed          4  no engine: the builder failed or is not installed; the checkpoint is unchanged
    `- VerificationFailed    5  an output is not what it should be

Every problem names the tensor, file or option that it is about, what was found, what was expected, and how to mend it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.printed import escaped, many, printed


class HeadraceError(Exception):
    """The base class of all errors that headrace raises on purpose.

    Attributes
    ----------
    exit_code
        The exit code of the command line.
    """

    exit_code = 1

    def __str__(self) -> str:
        # Paths and the words of other libraries stand in messages.
        return escaped(super().__str__(), keep="\n")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a request, a source or an output.

    Parameters
    ----------
    subject
        The tensor, file or option that it is about.
    found
        What is there.
    expected
        What should be there.
    remedy
        What to do about it; "" where `expected` says enough.
    passing
        Time alone may mend it: a disk without room, or another job at work in the same place. Trying again later makes sense.
    """

    subject: str
    found: str
    expected: str
    remedy: str = ""
    passing: bool = False

    def __str__(self) -> str:
        """The problem on one line, each part escaped and of bounded length: the fields themselves are as they were found."""
        text = f"{printed(self.subject)}: found {printed(self.found)}; expected {printed(self.expected)}"
        return f"{text}. {printed(self.remedy)}" if self.remedy else text


class BadInput(HeadraceError):
    """The request or the source cannot be converted; nothing was written.

    Attributes
    ----------
    problems
        All problems that were found, as a tuple of Problem.
    """

    exit_code = 2
    shown = 20
    shown_characters = 3500

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(self.report())

    def __reduce__(self) -> tuple[type[BadInput], tuple[tuple[Problem, ...]]]:
        # Workers pickle this error, for problems that only show when values are read.
        return BadInput, (self.problems,)

    def report(self, outcome: str = ", nothing was written") -> str:
        """Return all problems, one on each line; of more than `shown`, or long ones, the first and the number of the others.

        `outcome`: the words on what that means, "" for a command that would write nothing anyway.
        """
        count = len(self.problems)
        lines = [f"{many(count, 'problem')}{outcome}:"]
        left = self.shown_characters
        for problem in self.problems[: self.shown]:
            line = f"  - {problem}"
            left -= len(line)
            if left < 0 and len(lines) > 1:
                break
            lines.append(line)
        if count >= len(lines):
            lines.append(f"  ... and {count - len(lines) + 1} more")
        return "\n".join(lines)


class Interrupted(HeadraceError):
    """The run was stopped before it was complete; the files that it wrote are still named `*.partial`."""

    exit_code = 3


class WriteFailed(HeadraceError):
    """Reading or writing failed while the plan ran; the files that were written are still named `*.partial`."""

    exit_code = 3


class SourceChanged(WriteFailed):
    """The source's files are not those that the run began with, so that what it wrote may be mixed of two; nothing of that is left.

    Attributes
    ----------
    files
        The files, each with what is not as it was.
    remedy
        What became of what was read, and what to do.
    """

    def __init__(self, files: Iterable[str], remedy: str = "what was written of it is removed: start over") -> None:
        self.files, self.remedy = tuple(files), remedy
        shown = ", ".join(self.files[:8]) + (f" and {len(self.files) - 8} more" if len(self.files) > 8 else "")
        super().__init__(f"the source changed while it was read: {shown}; {remedy} when nothing writes to it any more")

    def __reduce__(self) -> tuple[type[SourceChanged], tuple[tuple[str, ...], str]]:
        # Workers pickle this error.
        return SourceChanged, (self.files, self.remedy)


class EngineFailed(HeadraceError):
    """TensorRT-LLM's builder failed or is not installed; nothing is left of the engine but its log."""

    exit_code = 4


class VerificationFailed(HeadraceError):
    """An output is not what it should be.

    Attributes
    ----------
    problems
        All findings, as a tuple of Problem.
    """

    exit_code = 5
    shown = 40

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        lines = [f"verification failed, {many(count, 'finding')}:"]
        lines += [f"  - {problem}" for problem in self.problems[: self.shown]]
        if count > self.shown:
            lines.append(f"  ... and {count - self.shown} more")
        super().__init__("\n".join(lines))
