"""The page of one conversion: a Bokeh document that shows a new Snapshot of the run every second."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from bokeh.events import ConnectionLost
from bokeh.layouts import column, row
from bokeh.models import CustomJS, Div

from pipeline.watching.figures import BLUE, TEAL, Bars, Timeline
from pipeline.watching.state import Sample, Snapshot
from pipeline.watching.units import human_bytes, human_rate

MILLISECONDS = 1000

STYLE = """
:host { font-family: system-ui, sans-serif; color: #0f172a; }
.bk-clearfix { width: 100%; }
h1 { font-size: 20px; margin: 0 0 2px; font-weight: 600; }
h2 { font-size: 15px; margin: 14px 0 4px; font-weight: 600; }
.sub { color: #64748b; margin: 0 0 10px; overflow-wrap: anywhere; }
.bar { height: 14px; border-radius: 7px; background: #e2e8f0; overflow: hidden; margin: 6px 0 12px; }
.bar > div { height: 100%; background: #2563eb; }
.facts { display: flex; flex-wrap: wrap; gap: 10px 36px; margin-bottom: 4px; }
.facts b { display: block; font-size: 17px; font-weight: 600; }
.facts span { color: #64748b; font-size: 12px; }
.pill { display: inline-block; padding: 1px 10px; border-radius: 10px; font-size: 12px; vertical-align: 3px; }
.pill { background: #dbeafe; color: #1e40af; }
.pill.ended, .pill.done { background: #dcfce7; color: #166534; }
.pill.lost, .pill.failed { background: #fee2e2; color: #991b1b; }
a { color: #2563eb; }
table { border-collapse: collapse; width: 100%; margin-bottom: 14px; }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid #e2e8f0; vertical-align: top; }
th { color: #64748b; font-weight: 500; font-size: 12px; }
pre { white-space: pre-wrap; margin: 0; font-size: 12px; }
"""


def conversion_page(look: Callable[[], Snapshot], links: Sequence[tuple[str, str]]) -> Callable[[Any], None]:
    """Return a function that fills a Bokeh document with the run that `look` returns snapshots of.

    `links`: (path, text) of other pages of the same server, shown at the bottom.
    """

    def fill(document: Any) -> None:
        head = Div(text=header(look()), stylesheets=[STYLE], sizing_mode="stretch_width")
        throughput = Timeline("Throughput", rate=True, colour=BLUE)
        memory = Timeline("Memory of the process, and its limit", rate=False, colour=TEAL)
        stages = Bars("Bytes by stage", share=False, colour=BLUE)
        ranks = Bars("Rank files", share=True, colour=TEAL)
        foot = Div(text=" · ".join(f'<a href="{path}">{text}</a>' for path, text in links), stylesheets=[STYLE])

        def update() -> None:
            now = look()
            head.text = header(now)
            throughput.update(rates(now.samples))
            points = [(sample.seconds, float(sample.memory_bytes)) for sample in now.samples if sample.memory_bytes >= 0]
            memory.update(points, now.memory_limit_bytes)
            stages.update(stage_rows(now.stages))
            ranks.update(rank_rows(now))

        figures = [
            row(throughput.figure, memory.figure, sizing_mode="stretch_width"),
            row(stages.figure, ranks.figure, sizing_mode="stretch_width"),
        ]
        document_of(document, update, head, [*figures, foot])

    return fill


def document_of(document: Any, update: Callable[[], None], head: Div, parts: Sequence[Any]) -> None:
    """Fill a document with a heading and `parts` below it, and call `update` now and once a second."""
    update()
    document.title = "headrace"
    document.add_root(column(head, *parts, sizing_mode="stretch_width", margin=16))
    document.js_on_event(ConnectionLost, lost(head))
    document.add_periodic_callback(update, MILLISECONDS)


def header(now: Snapshot) -> str:
    """Return the HTML above the charts: state, source, outputs, progress bar and figures."""
    if now.state == "starting":
        return "<h1>headrace</h1><p class=sub>reading the source's headers</p>"
    share = now.done_bytes / now.total_bytes if now.total_bytes else 1.0
    facts = [
        (f"{human_bytes(now.done_bytes)} of {human_bytes(now.total_bytes)}", "written in all"),
        ("-" if now.bytes_per_second is None else human_rate(now.bytes_per_second), "throughput"),
        ("-" if now.eta_seconds is None else duration(now.eta_seconds), "time left"),
        (duration(now.seconds), "elapsed"),
        (of_scratch(now.bytes_read, now.scratch_bytes_read), "read of the source"),
        (of_scratch(now.bytes_written, now.scratch_bytes_written), "written into rank files"),
        (f"{now.done_tasks} of {now.tasks}", "tasks"),
        (f"{now.phase or '-'} ({', '.join(now.phases)})" if len(now.phases) > 1 else now.phase or "-", "phase"),
        (f"{human_bytes(now.peak_memory_bytes)} of {human_bytes(now.memory_limit_bytes)}", "peak memory"),
    ]
    if now.resumed_bytes:
        facts.append((human_bytes(now.resumed_bytes), "done by an earlier run"))
    return (
        f"<h1>{escape(now.name)} <span class='pill {now.state}'>{now.state}</span></h1>"
        f"<p class=sub>{escape(now.source)} → {escape(', '.join(now.outputs))}</p>"
        f"<div class=bar><div style='width:{100 * share:.1f}%'></div></div>{fact_list(facts)}"
    )


def of_scratch(nbytes: int, scratch: int) -> str:
    """Bytes, and those of scratch beside them where there are any."""
    return f"{human_bytes(nbytes)} (+ {human_bytes(scratch)} scratch)" if scratch else human_bytes(nbytes)


def fact_list(facts: Sequence[tuple[str, str]]) -> str:
    """Return (value, label) pairs as one HTML row; both are escaped."""
    return (
        "<div class=facts>"
        + "".join(f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for value, label in facts)
        + "</div>"
    )


def rates(samples: Sequence[Sample]) -> list[tuple[float, float]]:
    """Return (seconds, bytes per second) for each two consecutive samples."""
    return [
        (b.seconds, (b.done_bytes - a.done_bytes) / (b.seconds - a.seconds)) for a, b in pairwise(samples) if b.seconds > a.seconds
    ]


def stage_rows(stages: Mapping[str, Mapping[str, float]]) -> list[tuple[str | tuple[str, str], float, str]]:
    """Return (stage, bytes, text) for each stage, in the order in which a tensor passes through them."""
    return [
        (stage, totals.get("bytes", 0.0), f"{human_bytes(totals.get('bytes', 0.0))}, {totals.get('seconds', 0.0):.1f} s")
        for stage, totals in sorted(stages.items(), key=lambda item: stage_order(item[0]))
    ]


def stage_order(stage: str) -> tuple[int, str]:
    """Return a sort key for stages in processing order; unknown stages come just before `checksum` and `write`."""
    known = ("read", "read_scratch", "rename", "unpack", "cast", "quantize", "shard")
    last = ("checksum", "write_scratch", "write")
    place = known.index(stage) if stage in known else 100 + last.index(stage) if stage in last else 50
    return place, stage


def rank_rows(now: Snapshot) -> list[tuple[str | tuple[str, str], float, str]]:
    """Return ((target, rank), fraction written, text) for each rank file."""
    return [
        ((share.target, f"rank {share.rank}"), share.done_bytes / max(share.total_bytes, 1), human_bytes(share.done_bytes))
        for share in now.ranks
    ]


def duration(seconds: float) -> str:
    """Format seconds for people: `7 s`, `3:05 min`, `2:04 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}:{whole % 60:02} min" if whole < 3600 else f"{whole // 3600}:{whole // 60 % 60:02} h"


def lost(head: Div) -> CustomJS:
    """Return a script that says in the browser, when the connection is lost, that the run's process has ended."""
    code = "if (!head.text.includes('pill lost')) { head.text += \"<p><span class='pill lost'>the process has ended</span></p>\"; }"
    return CustomJS(args={"head": head}, code=code)
