"""Draw a run's graph as SVG: a box for each stage, with its tasks, seconds and bytes, and arrows between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from textwrap import wrap

from pipeline.printed import in_html
from pipeline.watching.nodes import BUILD, CALIBRATE, FINISH, SCRATCH, SOURCE, LiveEngine, LiveNode
from pipeline.watching.state import Snapshot
from pipeline.watching.units import human_bytes

WIDTH, HEIGHT, GAP = 118, 112, 22  # of a stage's box and between two, in pixels
OUTPUT_WIDTH = 162
LIFT = 34  # how far an arrow that passes over boxes rises
MOST_OUTPUTS = 12  # boxes
KIND_CHARACTERS = 16  # of a line of the source's kind
CHARACTER = 6.3  # the width of one, about


@dataclass(frozen=True)
class Box:
    """A box to draw. `share`: how much of its bar is full, from 0 to 1; None for no bar. `look`: its classes."""

    name: str
    lines: tuple[str, ...]
    share: float | None
    look: str


def graph_svg(now: Snapshot) -> str:
    """Return the graph of a run: source, stages, each output, and each engine behind the builds, from left to right."""
    stages = [source_box(now), *(stage_box(node) for node in now.nodes if node.name != BUILD)]
    builds = [stage_box(node) for node in now.nodes if node.name == BUILD]
    outputs, engines = output_boxes(now), _most([engine_box(engine) for engine in now.engines])
    columns = {box.name: place for place, box in enumerate(stages)}
    arcs = [(columns[a], columns[b]) for a, b in now.edges if a in columns and b in columns]
    top = LIFT + 4 if any(b != a + 1 for a, b in arcs) else 4
    height = max(HEIGHT, max(len(outputs), len(engines)) * (HEIGHT // 2 + 8) - 8)
    middle = top + height / 2
    parts = [_edge(a, b, middle) for a, b in arcs]
    parts += [_drawn(box, place * (WIDTH + GAP) + 2, middle - HEIGHT / 2, HEIGHT) for place, box in enumerate(stages)]
    x = len(stages) * (WIDTH + GAP) + 2
    if outputs:
        parts += _column(outputs, x, middle, from_left=bool(now.nodes), to_right=bool(builds))
        x += OUTPUT_WIDTH + GAP
    for box in builds:
        parts.append(_drawn(box, x, middle - HEIGHT / 2, HEIGHT))
        parts += _column(engines, x + WIDTH + GAP, middle, from_left=True)
        x += WIDTH + GAP + OUTPUT_WIDTH + GAP
    width = x - GAP + (2 if outputs or builds else 0)
    tip = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    return (
        f'<svg class="graph" viewBox="0 0 {width} {top + height + 4:.0f}" width="{width}" role="img" aria-label="the graph">'
        f'<defs>{tip}<path class="tip" d="M0 0L8 4L0 8z"/></marker></defs>{"".join(parts)}</svg>'
    )


def _column(boxes: Sequence[Box], x: float, middle: float, *, from_left: bool, to_right: bool = False) -> Iterable[str]:
    """Draw small boxes below one another, with arrows from the box on their left and to the one on their right."""
    small = HEIGHT // 2 + 8
    first = middle - (len(boxes) * small - 8) / 2
    for place, box in enumerate(boxes):
        y = first + place * small
        beside = y + (small - 8) / 2
        if from_left:
            yield _arrow(x - GAP, middle, x, beside)
        if to_right:
            yield _arrow(x + OUTPUT_WIDTH, beside, x + OUTPUT_WIDTH + GAP, middle)
        yield _drawn(box, x, y, small - 8, OUTPUT_WIDTH)


def source_box(now: Snapshot) -> Box:
    """Return the box of the source: its kind, its size, and how much of it has been read."""
    read = next((node for node in now.nodes if node.name == "read"), None)
    kind, more = [*wrap(now.source_kind, KIND_CHARACTERS), "", ""][:2]
    done = f"{human_bytes(read.nbytes)} read" if read else "not read"
    return Box(SOURCE, (kind, more, human_bytes(now.source_bytes), done), None, "")


def stage_box(node: LiveNode) -> Box:
    """Return the box of a stage."""
    gigabytes = f"{node.nbytes / node.seconds / 1e9:.2f} GB/s" if node.seconds and node.nbytes else ""
    if node.name == FINISH:
        lines: tuple[str, ...] = ("renames files,", "config.json last", "")
    elif node.name == CALIBRATE:
        each = f"{node.seconds / node.done_tasks:.1f} s a layer" if node.done_tasks else ""
        lines = (f"{human_bytes(node.nbytes)} read", f"{node.seconds:.1f} s", each)
    elif node.name == BUILD:
        lines = ("TensorRT-LLM's", "own builder", f"{node.seconds:.1f} s")
    else:
        lines = (human_bytes(node.nbytes), f"{node.seconds:.1f} s", gigabytes)
    unit = {FINISH: "outputs", CALIBRATE: "layers"}.get(node.name, "tasks")
    share = node.done_tasks / node.tasks if node.tasks else 0.0
    look = "done" if node.done_tasks >= node.tasks else "busy" if node.done_tasks else ""
    text = f"{node.done_tasks} of {node.tasks} {unit}"
    return Box(node.name, (*lines, text), share, f"{look} cut" if node.name == SCRATCH else look)


def engine_box(engine: LiveEngine) -> Box:
    """Return a small box for an engine."""
    text = "failed" if engine.failed else f"{engine.done_tasks} of {engine.tasks} built"
    look = "failed" if engine.failed else "done" if engine.done_tasks == engine.tasks else "busy" if engine.done_tasks else ""
    return Box(engine.name, (text,), engine.done_tasks / engine.tasks, look)


def output_boxes(now: Snapshot) -> list[Box]:
    """Return a small box for each output: the bytes of its ranks."""
    totals: dict[str, list[int]] = {}
    for share in now.ranks:
        total = totals.setdefault(share.target, [0, 0])
        total[0] += share.done_bytes
        total[1] += share.total_bytes
    boxes = []
    for name, (done, full) in totals.items():
        whole = name in now.whole
        text = f"{human_bytes(done)}, whole" if whole else f"{human_bytes(done)} of {human_bytes(full)}"
        boxes.append(Box(name, (text,), done / max(full, 1), "done" if whole else "busy" if done else ""))
    return _most(boxes)


def _most(boxes: list[Box]) -> list[Box]:
    """The first boxes of a column, and one that says how many more there are."""
    more = len(boxes) - MOST_OUTPUTS
    return boxes if more <= 0 else [*boxes[:MOST_OUTPUTS], Box(f"and {more} more", (), None, "")]


def _drawn(box: Box, x: float, y: float, height: float, width: float = WIDTH) -> str:
    room = width - 16
    texts = [_text(box.name, x + 10, y + 20, "name", room * 0.88), *_lines(box.lines, x + 10, y + 39, room)]
    bar = ""
    if box.share is not None:
        place = f'x="{x + 10}" y="{y + height - 11:.1f}" height="5" rx="2.5"'
        full = (width - 20) * min(box.share, 1.0)
        bar = f'<rect class="track" {place} width="{width - 20}"/><rect class="fill" {place} width="{full:.1f}"/>'
    frame = f'<rect class="box" x="{x}" y="{y:.1f}" width="{width}" height="{height:.1f}" rx="8"/>'
    return f'<g class="{box.look}"><title>{in_html(box.name)}</title>{frame}{"".join(texts)}{bar}</g>'


def _lines(lines: Sequence[str], x: float, y: float, room: float) -> Iterable[str]:
    for place, line in enumerate(lines):
        if line:
            yield _text(line, x, y + 17 * place, "soft", room)


def _text(text: str, x: float, y: float, look: str, room: float) -> str:
    """Return a line of text; of one that is too long the last characters, which tell more than the first."""
    longest = int(room / CHARACTER)
    shown = text if len(text) <= longest else f"…{text[1 - longest :]}"
    return f'<text class="{look}" x="{x:.1f}" y="{y:.1f}">{in_html(shown)}</text>'


def _edge(start: int, end: int, middle: float) -> str:
    """Return an arrow from one column to another: straight to the next one, else over the boxes between."""
    step = WIDTH + GAP
    if end == start + 1:
        return _arrow(start * step + WIDTH + 2, middle, end * step + 2, middle)
    top = middle - HEIGHT / 2
    a, b = start * step + 2 + WIDTH * 0.7, end * step + 2 + WIDTH * 0.3
    path = f"M{a:.1f} {top:.1f}C{a:.1f} {top - LIFT * 1.2:.1f} {b:.1f} {top - LIFT * 1.2:.1f} {b:.1f} {top:.1f}"
    return f'<path class="edge" marker-end="url(#tip)" d="{path}"/>'


def _arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    half = (to_x - x) / 2
    path = f"M{x:.1f} {y:.1f}C{x + half:.1f} {y:.1f} {to_x - half:.1f} {to_y:.1f} {to_x:.1f} {to_y:.1f}"
    return f'<path class="edge" marker-end="url(#tip)" d="{path}"/>'
