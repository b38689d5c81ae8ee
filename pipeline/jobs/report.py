"""The output of the commands about jobs: tables made of the values that --json prints."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.printed import escaped, many
from pipeline.watching.units import human_bytes

_COLOURS = {"done": "green", "up_to_date": "green", "running": "cyan", "queued": "cyan", "waiting": "yellow", "cancelled": "yellow"}
_RIGHT = ("unit", "attempts", "seconds", "written", "writes", "peak memory")


def planned_table(said: Mapping[str, Any]) -> RenderableType:
    """The output of `headrace batch --dry_run`: the units in their order."""
    table = _table("conversion", "jobs", "state", "after", "writes", "peak memory")
    for each in said["units"]:
        sizes = (human_bytes(each["bytes"]), human_bytes(each["peak_memory_bytes"]))
        table.add_row(each["name"], ", ".join(each["members"]), _state(each["state"]), each["after"], *sizes)
    refused = sum(each["state"] == "refused" for each in said["units"])
    verdict = [Text(f"would not convert all: {many(refused, 'conversion')} refused", style="bold red")] if refused else []
    verdict += [Text(escaped(f"would not convert all: {each}"), style="bold red") for each in said["obstacles"]]
    return Group(*verdict, table, *(_lines(f"{each['name']}: {each['error']}") for each in said["units"] if each["error"]))


def summary_table(said: Mapping[str, Any]) -> RenderableType:
    """The table that a batch ends with: its jobs and what came of them."""
    made = {each["number"]: each for each in said["units"]}
    table = _table("job", "outcome", "unit", "attempts", "seconds", "written")
    for each in said["jobs"]:
        unit = made[each["unit"]]
        figures = (str(unit["attempts"]), f"{unit['seconds']:.1f}", human_bytes(unit["bytes_written"]))
        table.add_row(each["name"], _state(each["outcome"]), str(each["unit"]), *figures)
    counts = ", ".join(f"{count} {outcome}" for outcome, count in said["counts"].items()) or "no jobs"
    errors = [_lines(f"{each['name']}: {each['error']}") for each in said["jobs"] if each["error"]]
    return Group(table, f"{counts}, in {said['seconds']:.1f} s", *errors)


def jobs_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """The output of `headrace jobs`: a line for each job."""
    table = _table("job", "name", "state", "cause", "since", "outputs", "error")
    for row in rows:
        more = f" and {len(row['outputs']) - 1} more" if len(row["outputs"]) > 1 else ""
        outputs = row["outputs"][0] + more if row["outputs"] else ""
        error = row["error"].strip().splitlines()[-1].strip()[:60] if row["error"] else ""
        since = _time(row["ended"] or row["started"] or row["queued"])
        table.add_row(str(row["number"]), row["name"], _state(row["state"]), row["cause"], since, outputs, error)
    return table


def job_table(row: Mapping[str, Any]) -> RenderableType:
    """The output of `headrace jobs show`: a job, what came of it, and all of what was wrong."""
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    facts.add_row("job", f"{row['number']}, {row['name']}")
    facts.add_row("state", _state(row["state"]))
    written = f"{human_bytes(row['bytes_done'])} of {human_bytes(row['bytes_total'])}" if row["bytes_total"] else ""
    report = f"headrace report {row['outputs'][0]}" if row["state"] in ("done", "up_to_date") and row["outputs"] else ""
    values = {"cause": row["cause"], "source": row["source"], "written": written, "page": row["page"], "host": row["host"]}
    values |= {name: _time(row[name]) for name in ("queued", "started", "ended")}
    values |= {"attempts": str(row["attempts"]), "report": report}
    values |= {"peak memory": human_bytes(row["peak_memory_bytes"]) if row["peak_memory_bytes"] else ""}
    values |= {"exit code": "" if row["exit_code"] is None else str(row["exit_code"])}
    for name, value in values.items():
        if value:
            facts.add_row(name, Text(escaped(str(value))))
    for output in row["outputs"]:
        facts.add_row("output", Text(escaped(output)))
    for key, value in row["unit"]["options"].items():
        if key not in ("target", "output_dir", "model_dir"):
            facts.add_row("option", Text(escaped(f"{key} = {value}")))
    return Group(facts, _lines(row["error"]))


def _table(*columns: str) -> Table:
    table = Table()
    for column in columns:
        table.add_column(column, justify="right" if column in _RIGHT else "left", overflow="fold")
    return table


def _state(state: str) -> Text:
    return Text(state, style=_COLOURS.get(state, "red"))


def _lines(text: str) -> Text:
    """A text of several lines, as the reports of errors are."""
    return Text(escaped(text, keep="\n"))


def _time(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds)) if seconds else ""
