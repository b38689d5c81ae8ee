"""Show the progress of a verification, level by level: a bar each on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

LINE_SECONDS = 2.0  # between two lines of one level


class levels:  # noqa: N801
    """A context manager that shows progress on standard error; it yields the function to report to, or None where `quiet`."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.bar: Any = None
        self.tasks: dict[str, Any] = {}
        self.said: dict[str, float] = {}  # when the last line of a level was printed

    def __enter__(self) -> Callable[[str, int, int], None] | None:
        if self.quiet:
            return None
        if not sys.stderr.isatty():
            return self._say
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        from pipeline.watching.consoles import PlainConsole

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=PlainConsole(stderr=True))
        self.bar.start()
        return self._advance

    def _advance(self, level: str, done: int, total: int) -> None:
        if level not in self.tasks:
            self.tasks[level] = self.bar.add_task(level, total=total)
        self.bar.update(self.tasks[level], completed=done)

    def _say(self, level: str, done: int, total: int) -> None:
        now = time.monotonic()
        self.said.setdefault(level, now)
        if done < total and now - self.said[level] < LINE_SECONDS:
            return
        self.said[level] = now
        print(f"{level}: {'done' if done >= total else f'{done / total:.0%}'}", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()
