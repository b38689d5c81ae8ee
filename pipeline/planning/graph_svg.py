"""Draw a plan's graph as an SVG picture: a row for each phase, its stages from left to right, cuts as drums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.planning.graph_nodes import GraphEdge, GraphNode
from pipeline.planning.graph_words import facts, printable, shortened
from pipeline.printed import in_html

# The colours of all pictures of a plan, those of configs/look/look.css, also in dot's own SVG, whose nodes have the same classes.
STYLE = """
svg { color-scheme: light dark; --paper: #f6f7f9; --card: #ffffff; --fill: #e6ebf1; }
svg { --ink: #0f172a; --soft: #5b6779; --line: #dde3ea; --accent: #2563eb; }
@media screen and (prefers-color-scheme: dark) {
  svg { --paper: #11161d; --card: #1a212b; --fill: #2a3441; --ink: #e6eaf0; --soft: #9aa7b8; --line: #303a47; --accent: #6ea1ff; }
}
.paper { fill: var(--paper); }
text { fill: var(--soft); font: 11.5px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
text.name { fill: var(--ink); font-size: 13.5px; font-weight: 650; }
.source .shape, .output .shape, .engine .shape { fill: var(--fill); }
.shape { fill: var(--card); stroke: var(--line); stroke-width: 1.2; }
.scratch .shape { stroke: var(--accent); stroke-width: 1.8; }
.done .shape { stroke-dasharray: 5 4; }
.flow { fill: none; stroke: var(--soft); stroke-width: 1.4; }
.head { fill: var(--soft); }
""".strip()

WIDTH, GAP, BETWEEN, MARGIN = 148, 34, 14, 16  # of a box; between columns; between boxes of a column; around all
LINE, PADDING, LID = 16, 13, 7  # a line of text; above and below a box's text; how far a drum's lid bulges
LANE, BOW = 44, 26  # between two rows, and below a row in which edges pass boxes by


@dataclass(frozen=True)
class Place:
    """The box of a node: its upper left corner in pixels, its position in the graph, and where its row begins."""

    x: float
    y: float
    row: int
    column: int
    top: float


def svg_text(rows: Sequence[Sequence[Sequence[GraphNode]]], edges: Sequence[GraphEdge]) -> str:
    """The graph as an SVG document."""
    nodes = [node for row in rows for column in row for node in column]
    height = 2 * PADDING + LINE * (1 + max(len(facts(node)) for node in nodes))
    places, bottom = _lay_out(rows, edges, height)
    width = max(place.x for place in places.values()) + WIDTH + MARGIN
    drawn = [*(_edge(places[edge.start], places[edge.end], height) for edge in edges)]
    drawn += [_node(node, places[node.id], height) for node in nodes]
    size = f'width="{width:.0f}" height="{bottom:.0f}" viewBox="0 0 {width:.0f} {bottom:.0f}"'
    label = in_html(printable(" -> ".join(node.name for node in nodes)))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{label}" style="max-width:100%;height:auto">',
            f"<style>{STYLE}</style>",
            '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path class="head" d="M0 0.5 8 4 0 7.5z"/></marker></defs>',
            f'<rect class="paper" width="{width:.0f}" height="{bottom:.0f}" rx="8"/>',
            *drawn,
            "</svg>",
            "",
        ]
    )


def _lay_out(
    rows: Sequence[Sequence[Sequence[GraphNode]]], edges: Sequence[GraphEdge], height: int
) -> tuple[Mapping[str, Place], float]:
    """Where each node stands, by its id, and the height of the picture."""
    columns = {node.id: (r, c) for r, row in enumerate(rows) for c, column in enumerate(row) for node in column}
    bowed = {columns[e.start][0] for e in edges if _passes_by(columns[e.start], columns[e.end])}
    places: dict[str, Place] = {}
    top = float(MARGIN)
    for number, row in enumerate(rows):
        tall = max(len(column) for column in row) * (height + BETWEEN) - BETWEEN
        for c, column in enumerate(row):
            y = top + (tall - len(column) * (height + BETWEEN) + BETWEEN) / 2
            for n, node in enumerate(column):
                places[node.id] = Place(MARGIN + c * (WIDTH + GAP), y + n * (height + BETWEEN), number, c, top)
        top += tall + LANE + (BOW if number in bowed else 0)
    return places, top - LANE + MARGIN


def _passes_by(start: tuple[int, int], end: tuple[int, int]) -> bool:
    return start[0] == end[0] and end[1] != start[1] + 1


def _edge(a: Place, b: Place, height: int) -> str:
    middle = height / 2
    if a.row != b.row:  # along the lane above the row where it ends
        lane = b.top - LANE / 2
        right, x, r = a.x + WIDTH + 12, b.x + WIDTH / 2, 8
        side = -r if x < right else r
        path = (
            f"M{a.x + WIDTH:g} {a.y + middle:g}H{right - r:g}Q{right:g} {a.y + middle:g} {right:g} {a.y + middle + r:g}"
            f"V{lane - r:g}Q{right:g} {lane:g} {right + side:g} {lane:g}"
            f"H{x - side:g}Q{x:g} {lane:g} {x:g} {lane + r:g}V{b.y:g}"
        )
    elif _passes_by((a.row, a.column), (b.row, b.column)):  # below the boxes between
        start, end, low = a.x + WIDTH * 0.6, b.x + WIDTH * 0.4, max(a.y, b.y) + height + BOW * 1.3
        path = f"M{start:g} {a.y + height:g}C{start:g} {low:g} {end:g} {low:g} {end:g} {b.y + height:g}"
    else:
        x, y, end, low = a.x + WIDTH, a.y + middle, b.x, b.y + middle
        half = (x + end) / 2
        path = f"M{x:g} {y:g}H{end:g}" if y == low else f"M{x:g} {y:g}C{half:g} {y:g} {half:g} {low:g} {end:g} {low:g}"
    return f'<path class="flow" d="{path}" marker-end="url(#arrow)"/>'


def _node(node: GraphNode, place: Place, height: int) -> str:
    classes = f"{node.kind} done" if node.done else node.kind
    lines = facts(node)
    x, y = place.x + WIDTH / 2, place.y + (height - LINE * (1 + len(lines))) / 2 + 12
    y += LID / 2 if node.kind == "scratch" else 0
    texts = [f'<text class="name" x="{x:g}" y="{y:g}" text-anchor="middle">{_text(node.name, 18)}</text>']
    texts += [
        f'<text x="{x:g}" y="{y + LINE * n:g}" text-anchor="middle">{_text(line, 23)}</text>' for n, line in enumerate(lines, 1)
    ]
    title = in_html(printable(node.place or node.name))
    return f'<g class="{classes}"><title>{title}</title>{_shape(node, place, height)}{"".join(texts)}</g>'


def _shape(node: GraphNode, place: Place, height: int) -> str:
    x, y = place.x, place.y
    if node.kind != "scratch":
        rounding = 3 if node.kind == "output" else 9
        return f'<rect class="shape" x="{x:g}" y="{y:g}" width="{WIDTH}" height="{height}" rx="{rounding}"/>'
    arc = f"{WIDTH / 2:g} {LID}"
    body = f"M{x:g} {y + LID:g}A{arc} 0 0 1 {x + WIDTH:g} {y + LID:g}V{y + height - LID:g}A{arc} 0 0 1 {x:g} {y + height - LID:g}z"
    lid = f"M{x:g} {y + LID:g}A{arc} 0 0 0 {x + WIDTH:g} {y + LID:g}"
    return f'<path class="shape" d="{body}"/><path class="shape" d="{lid}"/>'


def _text(text: str, most: int) -> str:
    return in_html(shortened(printable(text), most))


def coloured(svg: str) -> str:
    """The SVG that Graphviz draws of our DOT, in these colours."""
    style = f"<style>{STYLE}\n{DOT_STYLE}</style>\n"
    start = svg.index("<g ", svg.index("<svg"))
    return svg[:start] + style + svg[start:]


# Graphviz writes colours as attributes, which a style sheet overrides; edges are a path and the polygon of an arrowhead.
DOT_STYLE = """
.node path, .node polygon, .node ellipse, .node polyline { fill: var(--card); stroke: var(--line); stroke-width: 1.2; }
.source path, .output polygon, .engine polygon { fill: var(--fill); }
.scratch path { stroke: var(--accent); stroke-width: 1.8; }
.done path, .done polygon { stroke-dasharray: 5 4; }
.flow path { stroke: var(--soft); }
.flow polygon { stroke: var(--soft); fill: var(--soft); }
""".strip()
