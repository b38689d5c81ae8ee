"""The page of one conversion: HTML that a server sends anew once a second while the run goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from pipeline.printed import in_html
from pipeline.watching.charts import bar_rows, timeline
from pipeline.watching.graph_drawing import graph_svg
from pipeline.watching.nodes import GRAPH_MAX_ITEMS
from pipeline.watching.notes import layer
from pipeline.watching.state import RunWatch, Sample, Snapshot
from pipeline.watching.units import human_bytes, human_rate

CAPTION = (
    "Seconds are summed over workers; GB/s are those of one. A stage before <i>scratch</i> or <i>write</i> is done with a group of "
    "blocks when that is. Files are mapped: the disk's time shows in the stage that first looks at the bytes."
)
LEAST_SECONDS = 0.5  # between two samples whose difference says something of the throughput
OWN = (("metrics", "metrics"), ("health", "health"))
# (path, link text) of Dask's pages, beside that of the graph.
DASK = (
    ("groups", "groups"),
    ("individual-task-stream", "task stream"),
    ("individual-fine-performance-metrics", "fine performance metrics"),
    ("status", "status"),
    ("workers", "workers"),
    ("system", "system"),
)


class ConversionPage:
    """The page of a run, for those that serve it."""

    def __init__(self, watch: RunWatch) -> None:
        self._watch = watch

    @property
    def has_ended(self) -> bool:
        """Whether the run has ended."""
        return self._watch.has_ended

    def look(self) -> tuple[str, str, bool]:
        """The page's content as HTML, its title, and whether the run has ended."""
        now = self._watch.snapshot()
        title = f"{now.state}: {now.name}" if now.ended else f"{_percent(now)} {now.name}" if now.name else "headrace"
        return body(now), title, now.ended


def body(now: Snapshot) -> str:
    """Return the page's content as HTML."""
    if not now.name:
        pill = f" <span class='pill {now.state}'>{now.state}</span>" if now.ended else ""
        return f"<h1>headrace{pill}</h1><p class=sub>{'nothing was written' if now.ended else 'the outputs are being begun'}</p>"
    memory = [(sample.seconds, float(sample.memory_bytes)) for sample in now.samples if sample.memory_bytes >= 0]
    return (
        f"{header(now)}<section class='wide'><h2>Graph</h2>{graph_svg(now)}<p class=sub>{CAPTION}</p>{dask_links(now)}</section>"
        f"<div class=two>{timeline('Throughput', rates(now.samples), colour='blue', rate=True)}"
        f"{timeline('Memory of the process, and its limit', memory, colour='teal', limit=now.memory_limit_bytes)}"
        f"{bar_rows('Bytes by stage', _shares(stage_rows(now.stages)), colour='blue')}"
        f"{bar_rows('Rank files', rank_rows(now), colour='teal')}</div><footer>{_links(OWN, '')}</footer>"
    )


def header(now: Snapshot) -> str:
    """Return the HTML above the charts: state, source, outputs, progress bar and figures."""
    facts = [
        (f"{human_bytes(now.done_bytes)} of {human_bytes(now.total_bytes)}", "written in all"),
        ("-" if now.bytes_per_second is None else human_rate(now.bytes_per_second), "throughput"),
        (duration(now.seconds), "elapsed"),
        (of_scratch(now.bytes_read, now.scratch_bytes_read), "read of the source"),
        (of_scratch(now.bytes_written, now.scratch_bytes_written), "written into rank files"),
        (f"{now.done_tasks} of {now.tasks}", "groups of blocks"),
        (layer(now.layer) if now.layer else "-", "last layer" if now.ended else "current layer"),
        (f"{human_bytes(now.peak_memory_bytes)} of {human_bytes(now.memory_limit_bytes)}", "peak memory"),
    ]
    if now.layers:
        part = f" and {100 * now.layer_part:.0f} %" if now.layer_part else ""
        facts.insert(6, (f"{now.calibrated_layers}{part} of {now.layers}", "layers calibrated"))
    if not now.ended:
        facts.insert(2, ("-" if now.eta_seconds is None else duration(now.eta_seconds), "time left"))
    if now.resumed_bytes:
        facts.append((human_bytes(now.resumed_bytes), "done by an earlier run"))
    state = in_html(now.state)
    return (
        f"<div class=head><p class=eyebrow>headrace conversion</p>"
        f"<h1>{in_html(now.name)} <span class='pill {state}'>{state}</span></h1>"
        f"<p class=sub>{in_html(now.source)} → {in_html(', '.join(now.outputs))}</p>"
        f"<div class='bar {state}'><div style='width:{_percent(now)}'></div></div>{fact_list(facts)}</div>"
    )


def of_scratch(nbytes: int, scratch: int) -> str:
    """Bytes, and those of scratch beside them where there are any."""
    return f"{human_bytes(nbytes)} (+ {human_bytes(scratch)} scratch)" if scratch else human_bytes(nbytes)


def dask_links(now: Snapshot) -> str:
    """Return the links to Dask's own pages of the run, or why there are none, as HTML."""
    if now.scheduler in ("threads", "synchronous"):
        text = f"Dask draws no graph of this run: --scheduler {now.scheduler} has no dashboard; the default scheduler has."
        return f"<p class=sub>{in_html(text)}</p>"
    if now.ended:
        return "<p class=sub>Dask's own pages went with the run.</p>"
    base = "" if now.scheduler == "local" else now.dashboard.removesuffix("status")
    if now.scheduler != "local":  # its own limit is not known here
        drawn = _links((("graph", "graph"),), base)
    elif now.graph_tasks > GRAPH_MAX_ITEMS:
        drawn = f"no graph, as {now.graph_tasks} tasks are more than the {GRAPH_MAX_ITEMS} that its page can show"
    else:
        drawn = _links((("graph", f"graph of {now.graph_tasks} tasks"),), base)
    return f"<p class=sub>Dask shows: {drawn} · {_links(DASK, base)}</p>"


def _links(pages: Sequence[tuple[str, str]], base: str) -> str:
    return " · ".join(f'<a href="{in_html(base + path)}">{in_html(text)}</a>' for path, text in pages)


def _percent(now: Snapshot) -> str:
    share = now.done_bytes / now.total_bytes if now.total_bytes else float(now.state == "done")
    return f"{100 * min(share, 1.0):.1f}%"


def _shares(rows: Sequence[tuple[str | tuple[str, str], float, str]]) -> list[tuple[str | tuple[str, str], float, str]]:
    """Rows with each value as a share of the largest."""
    largest = max([1.0, *(value for _, value, _ in rows)])
    return [(name, value / largest, text) for name, value, text in rows]


def fact_list(facts: Sequence[tuple[str, str]]) -> str:
    """Return (value, label) pairs as one HTML row; both are escaped."""
    return (
        "<div class=facts>"
        + "".join(f"<div><b>{in_html(value)}</b><span>{in_html(label)}</span></div>" for value, label in facts)
        + "</div>"
    )


def rates(samples: Sequence[Sample]) -> list[tuple[float, float]]:
    """Return (seconds, bytes per second) for each two consecutive samples, and the first rate at the time of the first sample.

    The last sample, which may follow at once on the one before, stands for that too.
    """
    kept = (
        [*samples[:-2], samples[-1]] if len(samples) > 2 and samples[-1].seconds - samples[-2].seconds < LEAST_SECONDS else samples
    )
    points = [
        (b.seconds, (b.done_bytes - a.done_bytes) / (b.seconds - a.seconds)) for a, b in pairwise(kept) if b.seconds > a.seconds
    ]
    return [(kept[0].seconds, points[0][1]), *points] if points else []


def stage_rows(stages: Mapping[str, Mapping[str, float]]) -> list[tuple[str | tuple[str, str], float, str]]:
    """Return (stage, bytes, text) for each stage, in the order in which a tensor passes through them."""
    return [
        (stage, totals.get("bytes", 0.0), f"{human_bytes(totals.get('bytes', 0.0))}, {totals.get('seconds', 0.0):.1f} s")
        for stage, totals in sorted(stages.items(), key=lambda item: stage_order(item[0]))
    ]


def stage_order(stage: str) -> tuple[int, str]:
    """Return a sort key for stages in processing order; unknown stages come just before `checksum` and `write`."""
    known = ("calibrate", "read", "read_scratch", "rename", "unpack", "dequantize", "cast", "quantize", "shard")
    last = ("checksum", "write_scratch", "write")
    place = known.index(stage) if stage in known else 100 + last.index(stage) if stage in last else 50
    return place, stage


def rank_rows(now: Snapshot) -> list[tuple[str | tuple[str, str], float, str]]:
    """Return ((target, rank), fraction written, text) for each rank file."""
    return [
        (
            (share.target, f"rank {share.rank}"),
            share.done_bytes / max(share.total_bytes, 1),
            f"{human_bytes(share.done_bytes)} of {human_bytes(share.total_bytes)}",
        )
        for share in now.ranks
    ]


def duration(seconds: float) -> str:
    """Format seconds for people: `7 s`, `3:05 min`, `2:04 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}:{whole % 60:02} min" if whole < 3600 else f"{whole // 3600}:{whole // 60 % 60:02} h"
