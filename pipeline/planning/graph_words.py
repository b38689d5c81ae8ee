"""The words in a picture of a plan's graph."""

from __future__ import annotations

from pipeline.planning.graph_nodes import GraphNode
from pipeline.tensor.units import human_bytes


def facts(node: GraphNode) -> list[str]:
    """The lines below a node's name: what it is, its tasks, its bytes, and whether it is there already."""
    lines = [node.detail] if node.detail else []
    if node.kind == "stage":
        lines.append(f"{node.tasks:,} task{'' if node.tasks == 1 else 's'}")
    if node.nbytes:
        lines.append(human_bytes(node.nbytes))
    return [*lines, "there already"] if node.done else lines


def printable(text: str) -> str:
    """The text with what cannot be seen, or stands in no file of text, written as escapes."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shortened(text: str, most: int) -> str:
    """At most so many characters of a text: its beginning and its end."""
    if len(text) <= most:
        return text
    tail = (most - 1) // 2
    return f"{text[: most - 1 - tail]}…{text[-tail:]}"
