"""Listener: the object that is told of a run as it goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pipeline.planning.plans import Plan
    from stages.write import Written


class Listener(Protocol):
    """What hears of a run: each method is called from the thread that called `execute`.

    `total_bytes` is what the run will write, `done_bytes` and `done_tasks` what an earlier run had written already.
    """

    def started(self, plan: Plan, dashboard: str, total_bytes: int, done_bytes: int, done_tasks: int) -> None: ...
    def advanced(self, written: Written) -> None: ...
    def finished(self) -> None: ...


class Silent:
    """A listener that says nothing."""

    def started(self, plan: Plan, dashboard: str, total_bytes: int, done_bytes: int, done_tasks: int) -> None:
        """Say nothing."""

    def advanced(self, written: Written) -> None:
        """Say nothing."""

    def finished(self) -> None:
        """Say nothing."""
