"""The output of the commands about jobs: plain values for --json, and tables made of those values."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.jobs.rows import JobRow, Unit
from pipeline.jobs.store import JobStore
from pipeline.printed import escaped
from pipeline.watching.units import human_bytes

_COLOURS = {"done": "green", "up_to_date": "green", "running": "cyan", "queued": "cyan", "waiting": "yellow", "cancelled": "yellow"}


def unit(planned: Unit) -> dict[str, Any]:
    """A conversion that a batch would make, as plain values."""
    conversion = planned.conversion
    state = "refused" if planned.error else "up_to_date" if planned.up_to_date else "to do"
    return {
        "name": conversion.name,
        "jobs": list(planned.members),
        "source": conversion.source,
        "outputs": list(conversion.outputs),
        "state": state,
        "error": planned.error,
        "bytes": sum(conversion.room.values()),
        "peak_memory_bytes": conversion.peak_memory_bytes,
        "shared_scratch": planned.shared,
        "options": dict(conversion.options),
    }


def units_table(units: Sequence[Mapping[str, Any]]) -> RenderableType:
    """The output of `headrace batch --dry_run`: the conversions in their order."""
    table = _table("conversion", "jobs", "state", "writes", "peak memory")
    for each in units:
        sizes = (human_bytes(each["bytes"]), human_bytes(each["peak_memory_bytes"]))
        table.add_row(each["name"], ", ".join(each["jobs"]), each["state"], *sizes)
    places = dict.fromkeys(each["shared_scratch"] for each in units if each["shared_scratch"])
    shared = [f"shared scratch: {place}" for place in places]
    errors = [f"{each['name']}: {each['error']}" for each in units if each["error"]]
    return Group(table, *map(_lines, [*shared, *errors]))


def summary_table(said: Mapping[str, Any]) -> RenderableType:
    """The table that a batch ends with: its jobs and their results."""
    made = {each["run"]: each for each in said["conversions"]}
    table = _table("job", "outcome", "run", "attempts", "seconds", "written")
    for each in said["jobs"]:
        run = made.get(each["run"], {})
        figures = (str(run.get("attempts", 0)), f"{run.get('seconds', 0):.1f}", human_bytes(run.get("bytes_written", 0)))
        table.add_row(each["name"], _state(each["outcome"]), str(each["run"]), *figures)
    counts = ", ".join(f"{count} {outcome}" for outcome, count in said["counts"].items()) or "no jobs"
    errors = [
        Text(escaped(each["name"]), style="red").append_text(_lines(f": {each['error']}")) for each in said["jobs"] if each["error"]
    ]
    return Group(table, f"{counts}, in {said['seconds']:.1f} s", *errors)


def jobs_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """The output of `headrace jobs`: a line for each job."""
    table = _table("job", "name", "state", "updated", "outputs", "error")
    for row in rows:
        outputs = (
            row["outputs"][0] + (f" and {len(row['outputs']) - 1} more" if len(row["outputs"]) > 1 else "")
            if row["outputs"]
            else ""
        )
        error = row["error"].strip().splitlines()[-1].strip()[:60] if row["error"] else ""
        table.add_row(str(row["id"]), row["name"], _state(row["state"]), _time(row["updated"]), outputs, error)
    return table


def job(store: JobStore, row: JobRow) -> dict[str, Any]:
    """A job with its runs and their attempts, the newest run first."""
    runs = [{**asdict(run), "attempt_list": [asdict(each) for each in store.attempts(run.id)]} for run in store.runs(job=row.id)]
    return {**asdict(row), "runs": runs}


def job_table(said: Mapping[str, Any]) -> RenderableType:
    """The output of `headrace jobs show`: a job, its runs and their attempts."""
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    facts.add_row("job", f"{said['id']}, {said['name']}")
    facts.add_row("state", _state(said["state"]))
    facts.add_row("source", said["source"])
    for output in said["outputs"]:
        facts.add_row("output", output)
    for key, value in said["options"].items():
        if key not in ("target", "output_dir", "model_dir"):
            facts.add_row("option", f"{key} = {value}")
    table = _table("run", "attempt", "cause", "state", "started", "seconds", "written", "peak memory", "exit code")
    for run in said["runs"]:
        heading = (run["cause"], _state(run["state"]), _time(run["started"] or run["queued"]))
        code = "" if run["exit_code"] is None else str(run["exit_code"])
        progress = f"{human_bytes(run['bytes_done'])} of {human_bytes(run['bytes_total'])}" if run["bytes_total"] else ""
        table.add_row(str(run["id"]), "", *heading, "", progress, "", code)
        for each in run["attempt_list"]:
            seconds = "" if each["seconds"] is None else f"{each['seconds']:.1f}"
            sizes = (human_bytes(each["bytes_written"]), human_bytes(each["peak_memory_bytes"]))
            code = "" if each["exit_code"] is None else str(each["exit_code"])
            table.add_row("", str(each["number"]), "", each["outcome"] or "running", _time(each["started"]), seconds, *sizes, code)
    return Group(facts, table, _lines(said["error"]))


def collected_table(said: Mapping[str, Any]) -> RenderableType:
    """The output of `headrace gc`: the scratch removed, and the number of runs forgotten."""
    verb = "would be " if said["dry_run"] else ""
    lines = [f"{verb}removed {place}" for place in said["scratch"]]
    return Group(*lines, f"{said['runs']} runs {verb}forgotten")


def _table(*columns: str) -> Table:
    table = Table()
    for column in columns:
        table.add_column(
            column, justify="right" if column in ("run", "attempts", "seconds", "written", "writes") else "left", overflow="fold"
        )
    return table


def _state(state: str) -> Text:
    return Text(state, style=_COLOURS.get(state, "red"))


def _lines(text: str) -> Text:
    """A text of several lines, as the reports of errors are."""
    return Text(escaped(text, keep="\n"))


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
