"""Match a checkpoint with a source by names and shapes: which rectangles hold the same values, and which have no counterpart.

Every value of a rank file must have an origin, and every value of the source a place on some rank.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.errors import Problem
from pipeline.tensor.checkpoint import Checkpoint
from stages.verify.matrices import matrix
from stages.verify.roundtrip.model_split import Span
from stages.verify.roundtrip.origin import Origin, origins


@dataclass(frozen=True)
class SourceMatch:
    """A checkpoint matched with a source: where the ranks' values come from, and the problems that names and shapes alone show."""

    origins: tuple[Origin, ...] = field(repr=False)
    problems: tuple[Problem, ...]


def match_source(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], left_out: Iterable[str] = ()) -> SourceMatch:
    """Match a checkpoint with a source by names and shapes.

    `shapes`: of the source's tensors by name. `left_out`: the names of those that the checkpoint's headrace.json says it leaves
    out.
    """
    rank_origins = origins(checkpoint.config, shapes, [rank.keys() for rank in checkpoint.ranks])
    problems = [*_without_origin(checkpoint, rank_origins), *_without_source(rank_origins, shapes)]
    origins_by_source = defaultdict(list)
    for origin in rank_origins:
        origins_by_source[origin.source].append(origin)
    omitted = set(left_out)
    for name, shape in shapes.items():
        if name in omitted and name not in origins_by_source:
            continue
        uncovered_rows = uncovered(shape, [(origin.source_rows, origin.columns) for origin in origins_by_source.get(name, ())])
        if uncovered_rows:
            problems.append(Problem(name, f"{uncovered_rows} in no rank file", "every value of the source on some rank"))
    return SourceMatch(tuple(rank_origins), tuple(problems))


def uncovered(shape: Sequence[int], rectangles: Iterable[tuple[Span, Span | None]]) -> str:
    """Name rows of a tensor that no rectangle covers, in words; "" where all are covered. `rectangles`: (rows, columns or None)."""
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


def _without_origin(checkpoint: Checkpoint, rank_origins: Sequence[Origin]) -> Iterator[Problem]:
    """Report weights and biases with rows that no rule explains."""
    rows: dict[tuple[int, str, int | None], int] = defaultdict(int)
    for origin in rank_origins:
        rows[origin.rank, origin.tensor, origin.expert] += origin.rows[1] - origin.rows[0]
    for (rank, tensor, expert), count in rows.items():
        stored = checkpoint.ranks[rank][tensor]
        if tensor.endswith(".weight") and len(stored.shape) > 1:
            length = matrix(checkpoint, rank, tensor.removesuffix(".weight"), expert).shape[0]
        else:
            length = stored.shape[0]
        if count != length:
            subject = f"rank{rank}.safetensors: {tensor}"
            yield Problem(subject, f"{length} rows", f"{count}, as many as the source has for it")
    explained = {(rank, tensor) for rank, tensor, _ in rows}
    for number, tensors in enumerate(checkpoint.ranks):
        for name in tensors:
            if name.endswith((".weight", ".bias")) and (number, name) not in explained:
                yield Problem(f"rank{number}.safetensors: {name}", "a tensor that nothing of the source becomes", "none")


def _without_source(rank_origins: Iterable[Origin], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Problem]:
    """Report tensors whose source tensor is not there, or has not the rows or columns that config.json makes them of."""
    missing = {origin.source: origin for origin in rank_origins if origin.source and origin.source not in shapes}
    for name, origin in missing.items():
        yield Problem(f"rank{origin.rank}.safetensors: {origin.tensor}", "a tensor", f"none, as the source has no {name}")
    beyond = {
        origin.source: origin for origin in rank_origins if origin.source in shapes and _is_beyond(origin, shapes[origin.source])
    }
    for name, origin in beyond.items():
        rows, columns = origin.source_rows, origin.columns
        part = f"rows {rows[0]} to {rows[1]}" + (f", columns {columns[0]} to {columns[1]}" if columns else "")
        found, expected = f"{part} of {name}, by config.json", f"some of the {list(shapes[name])} that the source has"
        yield Problem(f"rank{origin.rank}.safetensors: {origin.tensor}", found, expected)


def _is_beyond(origin: Origin, shape: tuple[int, ...]) -> bool:
    """Whether an origin is not inside a source tensor of a shape."""
    width = shape[1] if len(shape) > 1 else 1
    return origin.source_rows[1] > (shape[0] if shape else 1) or (origin.columns is not None and origin.columns[1] > width)
