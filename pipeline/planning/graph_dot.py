"""Write a plan's graph in Graphviz's language."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipeline.planning.graph_nodes import GraphEdge, GraphNode
from pipeline.planning.graph_words import facts, printable

SHAPES = {"source": "box", "stage": "box", "scratch": "cylinder", "output": "folder", "engine": "component"}


def dot_text(rows: Iterable[Iterable[Sequence[GraphNode]]], edges: Iterable[GraphEdge]) -> str:
    """The graph as text for `dot`. Nodes carry their kind as a class, so that a style sheet can colour the SVG that it draws."""
    lines = [
        "digraph headrace {",
        '  graph [rankdir=LR, bgcolor="transparent", fontname="sans-serif", nodesep=0.3, ranksep=0.4];',
        '  node [style="rounded", fontname="sans-serif", fontsize=11, margin="0.16,0.08"];',
        '  edge [arrowsize=0.7, class="flow"];',
    ]
    for row in rows:
        for column in row:
            lines += [f"  {_node(node)}" for node in column]
    lines += [f"  {_quoted(edge.start)} -> {_quoted(edge.end)};" for edge in edges]
    return "\n".join([*lines, "}", ""])


def _node(node: GraphNode) -> str:
    label = "\\n".join(_escaped(text) for text in (node.name, *facts(node)))
    classes = f"{node.kind} done" if node.done else node.kind
    style = "" if SHAPES[node.kind] == "box" else ', style=""'
    values = f'label="{label}", tooltip={_quoted(node.place or node.name)}, shape={SHAPES[node.kind]}{style}, class="{classes}"'
    return f"{_quoted(node.id)} [{values}];"


def _quoted(text: str) -> str:
    return f'"{_escaped(text)}"'


def _escaped(text: str) -> str:
    """Text between quotes in DOT: backslashes begin escapes there, and `&` a character of HTML."""
    return printable(text).replace("\\", "\\\\").replace('"', '\\"').replace("&", "&amp;")
