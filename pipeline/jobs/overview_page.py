"""The daemon's page: all jobs, as a Bokeh document that looks at an Overview once a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from bokeh.layouts import row
from bokeh.models import Div

from pipeline.jobs.overview import Overview
from pipeline.jobs.rows import RunRow
from pipeline.printed import in_html
from pipeline.watching.figures import BLUE, STYLE, TEAL, Bars, Timeline, document_of
from pipeline.watching.page import duration, fact_list, rates, stage_rows
from pipeline.watching.state import Share
from pipeline.watching.units import human_bytes

LONGEST_ERROR = 600  # characters of a report that are shown
RANKS = 64  # bars
FAILURES = 10


def overview_page(look: Callable[[], Overview], memory_limit: int | None = None) -> Callable[[Any], None]:
    """Make a function that builds the page in a Bokeh document and keeps it up to date with `look`.

    `memory_limit`: bytes that all jobs together may use.
    """

    def fill(document: Any) -> None:
        head, jobs, failures = (Div(stylesheets=[STYLE], sizing_mode="stretch_width") for _ in range(3))
        throughput = Timeline("Throughput of all jobs", rate=True, colour=BLUE)
        memory = Timeline("Memory of all jobs, and their limit" if memory_limit else "Memory of all jobs", rate=False, colour=TEAL)
        stages = Bars("Bytes by stage", share=False, colour=BLUE)
        ranks = Bars("Rank files of running jobs", share=True, colour=TEAL)
        foot = Div(text='<a href="metrics">metrics</a> · <a href="health">health</a>', stylesheets=[STYLE])

        def update() -> None:
            now = look()
            head.text, jobs.text, failures.text = header(now), jobs_table(now), failures_table(now.failures)
            throughput.update(rates(now.samples))
            memory.update([(sample.seconds, float(sample.memory_bytes)) for sample in now.samples], memory_limit)
            stages.update(stage_rows(now.reading.stages))
            ranks.update(rank_rows(now))

        figures = [
            row(throughput.figure, memory.figure, sizing_mode="stretch_width"),
            row(stages.figure, ranks.figure, sizing_mode="stretch_width"),
        ]
        document_of(document, update, head, [jobs, failures, *figures, foot])

    return fill


def header(now: Overview) -> str:
    """The text above everything, as HTML."""
    states = now.reading.states
    bad = sum(states.get(state, 0) for state in ("refused", "failed", "crashed", "interrupted"))
    facts = [
        (str(states.get("running", 0)), "running"),
        (str(now.reading.queue_length), "waiting"),
        (str(states.get("done", 0) + states.get("up_to_date", 0)), "done"),
        (str(bad), "failed"),
        (human_bytes(now.reading.stages.get("write", {}).get("bytes", 0.0)), "written"),
        (duration(now.seconds), "at work"),
    ]
    return f"<h1>headrace</h1>{fact_list(facts)}"


def jobs_table(now: Overview) -> str:
    """Runs that work or wait, as HTML."""
    if not now.active:
        return "<h2>Jobs</h2><p class=sub>none waits or runs</p>"
    heads = ("job", "name", "state", "", "written", "throughput", "time left", "memory", "from")
    rows = "".join(_job_row(run, now) for run in now.active)
    return f"<h2>Jobs</h2><table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{rows}</table>"


def _job_row(run: RunRow, now: Overview) -> str:
    live = now.live.get(run.id)
    last = live.progress if live else None
    done, total = (last.bytes, last.total_bytes) if last else (run.bytes_done, run.bytes_total)
    share = done / total if total else 0.0
    at_work = run.state == "running"
    cells = [
        str(run.job),
        f"{in_html(run.name)}<br><span class=sub>{in_html(', '.join(run.outputs))}</span>",
        f"<span class='pill {run.state}'>{run.state}</span>" + (f"<br>attempt {run.attempts}" if run.attempts > 1 else ""),
        f"<div class=bar style='width:140px'><div style='width:{100 * share:.1f}%'></div></div>" if total else "",
        f"{human_bytes(done)} of {human_bytes(total)}" if total else "",
        f"{human_bytes(last.bytes_per_second)}/s" if last and at_work else "",
        duration(last.eta_seconds) if last and at_work else "",
        f"{human_bytes(last.memory_bytes)} of {human_bytes(last.memory_limit_bytes)}" if last and last.memory_bytes >= 0 else "",
        in_html(run.cause),
    ]
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def failures_table(failures: tuple[RunRow, ...]) -> str:
    """Runs that ended badly last, with what was wrong, as HTML."""
    if not failures:
        return "<h2>Recent failures</h2><p class=sub>none</p>"
    rows = "".join(
        f"<tr><td>{_moment(run.ended)}</td><td>{run.job}</td><td>{in_html(run.name)}</td>"
        f"<td><span class='pill failed'>{run.state}</span></td><td><pre>{in_html(_cut(run.error))}</pre></td></tr>"
        for run in failures[:FAILURES]
    )
    return f"<h2>Recent failures</h2><table><tr><th>when</th><th>job</th><th>name</th><th></th><th>message</th></tr>{rows}</table>"


def rank_rows(now: Overview) -> list[tuple[str | tuple[str, str], float, str]]:
    """((job, rank), share that is written, text) of the jobs at work."""
    rows: list[tuple[str | tuple[str, str], float, str]] = []
    for live in now.live.values():
        shares = [Share(*rank) for rank in live.progress.ranks] if live.progress else []
        several = len({share.target for share in shares}) > 1
        for share in shares:
            name = f"{share.target} rank {share.rank}" if several else f"rank {share.rank}"
            part = share.done_bytes / max(share.total_bytes, 1)
            rows.append(((f"{live.name} ({live.job})", name), part, human_bytes(share.done_bytes)))
    return rows[:RANKS]


def _moment(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else ""


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_ERROR else f"{text[:LONGEST_ERROR]} ..."
