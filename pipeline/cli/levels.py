"""Show the progress of what goes on level by level: a bar on a terminal, and elsewhere a line of each level every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

LINE_SECONDS = 2.0  # between two lines of a level


class levels:  # noqa: N801
    """A context manager that shows progress on standard error; it yields the function to report to, None where it is quiet."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.bar: Any = None

    def __enter__(self) -> Callable[[str, int, int], None] | None:
        if self.quiet:
            return None
        if not sys.stderr.isatty():
            return Lines()
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        from pipeline.watching.consoles import PlainConsole

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=PlainConsole(stderr=True))
        self.tasks: dict[str, Any] = {}
        self.bar.start()
        return self._advance

    def _advance(self, level: str, done: int, total: int) -> None:
        if level not in self.tasks:
            self.tasks[level] = self.bar.add_task(level, total=total)
        self.bar.update(self.tasks[level], completed=done)

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()


class Lines:
    """Says how far each level is: at its beginning, every LINE_SECONDS, and at its end."""

    def __init__(self) -> None:
        self.begun: dict[str, float] = {}
        self.last: dict[str, float] = {}

    def __call__(self, level: str, done: int, total: int) -> None:
        now = time.monotonic()
        begun = self.begun.setdefault(level, now)
        if level in self.last and done < total and now - self.last[level] < LINE_SECONDS:
            return
        self.last[level] = now
        share = f"{100 * done // max(total, 1)} %"
        left = f", {(now - begun) * (total - done) / done:.0f} s left" if 0 < done < total and now > begun else ""
        print(f"{level}: {share}{left}", file=sys.stderr, flush=True)
