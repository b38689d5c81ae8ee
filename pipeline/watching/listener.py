"""Listener: the protocol of objects that are told how a run proceeds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from pipeline.planning.plans import Plan
    from stages.write import Written


class Listener(Protocol):
    """An object that is told when a run starts, when each task ends, and when the run ends.

    Each method is called from the thread that called `execute`. `total_bytes` is the size of everything that the plan writes;
    `done_bytes` and `done_tasks` count what an earlier, interrupted run had already finished.
    """

    def started(self, plan: Plan, dashboard: str, total_bytes: int, done_bytes: int, done_tasks: int) -> None: ...
    def advanced(self, written: Written) -> None: ...
    def finished(self) -> None: ...


@runtime_checkable
class LayerListener(Protocol):
    """A listener that is also told of each decoder layer that is calibrated: `done` of `layers`, and how long the rest may take."""

    def calibrated(self, done: int, layers: int, seconds_left: float) -> None: ...


class Silent:
    """A listener that prints nothing."""

    def started(self, plan: Plan, dashboard: str, total_bytes: int, done_bytes: int, done_tasks: int) -> None:
        """Do nothing."""

    def advanced(self, written: Written) -> None:
        """Do nothing."""

    def finished(self) -> None:
        """Do nothing."""
