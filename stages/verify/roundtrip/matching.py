"""Match a checkpoint with a source by names and shapes: which rectangles to compare, and what needs no values to see.

Every value of a rank file must have an origin, and every value of the source a place on some rank.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import Problem
from pipeline.tensor.checkpoint import Checkpoint
from stages.verify.matrices import matrix
from stages.verify.roundtrip.origin import Piece, Span, origins

TASK_ELEMENTS = 1 << 25


@dataclass(frozen=True)
class Task:
    """Some rows of one source tensor, and the pieces of rank tensors that hold some of them."""

    name: str
    rows: Span
    pieces: tuple[Piece, ...] = field(repr=False)

    def elements(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """How many values of the source it looks at."""
        return (self.rows[1] - self.rows[0]) * math.prod(shapes[self.name][1:]) if self.name else 1


@dataclass(frozen=True)
class Trip:
    """What a checkpoint and a source have to do with one another: the tasks to compare them, and what needs no values to see."""

    tasks: tuple[Task, ...] = field(repr=False)
    problems: tuple[Problem, ...]


def trip(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], left_out: Iterable[str] = ()) -> Trip:
    """Match a checkpoint with a source by names and shapes.

    `shapes`: of the source's tensors. `left_out`: those of them that the checkpoint says it has not, by its own provenance.
    """
    pieces = origins(checkpoint.config, shapes, [rank.keys() for rank in checkpoint.ranks])
    problems = [*_without_origin(checkpoint, pieces), *_without_source(pieces, shapes)]
    held = defaultdict(list)
    for piece in pieces:
        held[piece.source].append(piece)
    padding = held.pop("", [])
    omitted = set(left_out)
    for name, shape in shapes.items():
        if name in omitted and name not in held:
            continue
        missing = uncovered(shape, [(piece.source_rows, piece.columns) for piece in held.get(name, ())])
        if missing:
            problems.append(Problem(name, f"{missing} in no rank file", "every value of the source on some rank"))
    tasks = [Task(name, rows, tuple(held[name])) for name, shape in shapes.items() if name in held for rows in _cuts(shape)]
    tasks += [Task("", (0, 1), (piece,)) for piece in padding]
    return Trip(tuple(tasks), tuple(problems))


def _cuts(shape: Sequence[int]) -> Iterator[Span]:
    """Rows of a tensor for each task."""
    step = max(TASK_ELEMENTS // max(math.prod(shape[1:]), 1), 64)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def uncovered(shape: Sequence[int], rectangles: Iterable[tuple[Span, Span | None]]) -> str:
    """Which rows of a tensor none of some rectangles holds, in words; "" for none."""
    width = shape[1] if len(shape) > 1 else 1
    columns = {(rows, span or (0, width)) for rows, span in rectangles}
    edges = sorted({0, width, *(edge for _, span in columns for edge in span)})
    for left, right in itertools.pairwise(edges):
        reached = 0
        for start, stop in sorted(rows for rows, span in columns if span[0] <= left and right <= span[1]):
            if start > reached:
                break
            reached = max(reached, stop)
        if reached < shape[0]:
            return f"rows from {reached}" + (f", columns {left} to {right}" if (left, right) != (0, width) else "")
    return ""


def _without_origin(checkpoint: Checkpoint, pieces: Sequence[Piece]) -> Iterator[Problem]:
    """Weights and biases with rows that no rule explains."""
    rows: dict[tuple[int, str, int | None], int] = defaultdict(int)
    for piece in pieces:
        rows[piece.rank, piece.tensor, piece.expert] += piece.rows[1] - piece.rows[0]
    for (rank, tensor, expert), count in rows.items():
        held = checkpoint.ranks[rank][tensor]
        if tensor.endswith(".weight") and len(held.shape) > 1:
            length = matrix(checkpoint, rank, tensor.removesuffix(".weight"), expert).shape[0]
        else:
            length = held.shape[0]
        if count != length:
            subject = f"rank{rank}.safetensors: {tensor}"
            yield Problem(subject, f"{length} rows", f"{count}, as many as the source has for it")
    known = {(rank, tensor) for rank, tensor, _ in rows}
    for number, tensors in enumerate(checkpoint.ranks):
        for name in tensors:
            if name.endswith((".weight", ".bias")) and (number, name) not in known:
                yield Problem(f"rank{number}.safetensors: {name}", "a tensor that nothing of the source becomes", "none")


def _without_source(pieces: Iterable[Piece], shapes: Mapping[str, Any]) -> Iterator[Problem]:
    missing = {piece.source: piece for piece in pieces if piece.source and piece.source not in shapes}
    for name, piece in missing.items():
        yield Problem(f"rank{piece.rank}.safetensors: {piece.tensor}", "a tensor", f"none, as the source has no {name}")
