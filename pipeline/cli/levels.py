"""Show the progress of a verification, level by level, on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


class levels:  # noqa: N801
    """A context manager that shows a progress bar on a terminal and nothing elsewhere; it yields the function to report to."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet or not sys.stderr.isatty()

    def __enter__(self) -> Callable[[str, int, int], None] | None:
        if self.quiet:
            return None
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
        if not self.quiet:
            self.bar.stop()
