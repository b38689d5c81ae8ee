"""Turns events into notifications: which events are worth one, and its words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline.jobs.events import Event, JobFinished, Stalled
from pipeline.watching.units import human_bytes

Kind = Literal["success", "failure", "stall"]
LONGEST_ERROR = 4000  # characters of an error's report that are passed on
_KINDS: Mapping[str, Kind] = {"done": "success", "refused": "failure", "failed": "failure", "crashed": "failure"}


@dataclass(frozen=True)
class Message:
    """One notification: a line, some lines below it, and the event's values for programs."""

    kind: Kind
    title: str
    body: str
    values: Mapping[str, Any]


def message(event: Event) -> Message | None:
    """The notification of an event; None where it needs none.

    A run's last attempt counts: not one that will be repeated, and not what somebody cancelled, what the daemon's own end
    interrupted, or what was up to date.
    """
    if isinstance(event, Stalled):
        written = f"{human_bytes(event.bytes)} of {human_bytes(event.total_bytes)}"
        return _message("stall", event, "stalled", [f"nothing written for {event.seconds / 60:.0f} minutes; {written} done"])
    if not isinstance(event, JobFinished) or event.retry_seconds is not None or event.outcome not in _KINDS:
        return None
    if event.outcome == "done":
        lines = [f"{human_bytes(event.bytes)} written in {event.seconds:.0f} s", *event.outputs]
        return _message("success", event, "done", lines)
    attempt = f"attempt {event.attempt}, " if event.attempt else ""
    lines = [f"{attempt}exit code {event.exit_code}", event.error[:LONGEST_ERROR], *event.outputs]
    return _message("failure", event, event.outcome, lines)


def _message(kind: Kind, event: Event, state: str, lines: list[str]) -> Message:
    values = asdict(event)
    if "error" in values:
        values["error"] = values["error"][:LONGEST_ERROR]
    return Message(kind, f"headrace: {event.name} {state}", "\n".join(filter(None, lines)), {"event": kind, **values})
