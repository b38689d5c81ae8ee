"""The nouns of a plan's graph as people look at it: nodes and edges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NodeKind = Literal["source", "stage", "scratch", "output", "engine"]


@dataclass(frozen=True)
class GraphNode:
    """A node of a plan's graph: a stage with all its tasks, or a place of bytes.

    Attributes
    ----------
    id
        Names the node in the graph: "source", "0.read" (a stage by its phase), "scratch.0", "output.0", "engine.0".
    name
        The stage's name, or that of the directory or file.
    tasks
        How many tasks the stage has; 0 for a place.
    nbytes
        Of the source, the size of its tensors; of `read`, the bytes of the source that it reads; of `scratch`, a cut and `write`,
        the bytes that tasks write; of an output, the size of its rank files; of other stages, the bytes of the source, or of the
        cut before them, that their groups are made of; 0 for `finish`, `build` and engines.
    place
        The path or URL of a place; "" for a stage.
    detail
        A few words on it, such as the source's kind.
    done
        What it stands for is there already, so that `convert` leaves it out.
    """

    id: str
    kind: NodeKind
    name: str
    tasks: int = 0
    nbytes: int = 0
    place: str = ""
    detail: str = ""
    done: bool = False


@dataclass(frozen=True)
class GraphEdge:
    """The flow of bytes from one node to another, by their ids."""

    start: str
    end: str
