"""Round trip: the values of rank files against those of the source that they are, rectangle by rectangle.

Where values are stored as numbers they must be the source's, rounded once to the model's type, bit for bit; where they are codes,
within what the format allows (figures.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from pipeline.tensor.checkpoint import Checkpoint
from stages.verify.matrices import Matrix, matrix
from stages.verify.roundtrip.figures import Figures, Where, allowed, rounding
from stages.verify.roundtrip.matching import Task
from stages.verify.roundtrip.origin import Piece
from stages.verify.values import read

STEP_ELEMENTS = 1 << 21  # compared at once: 8 MiB as float32


class Weights(Protocol):
    """A model's weights by Hugging Face's names, rows on demand."""

    def names(self) -> Sequence[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def rows(self, name: str, start: int, stop: int) -> Tensor: ...


class Source(Weights, Protocol):
    """Those of a source, which may be packed: `exact` where it stores the numbers themselves."""

    def exact(self, name: str) -> bool: ...


def compare(checkpoint: Checkpoint, source: Source, task: Task, kept: bool) -> dict[tuple[int, str], Figures]:
    """Compare some rows of a source tensor with every rank that holds some of them: figures by rank and tensor.

    `kept`: codes of a packed source are in the rank files as they were.
    """
    result: dict[tuple[int, str], Figures] = defaultdict(Figures)
    if not task.name:
        (piece,) = task.pieces
        _padding(checkpoint, piece, result[piece.rank, piece.tensor])
        return dict(result)
    shape = source.shape(task.name)
    exact = source.exact(task.name)
    wide = shape[1] if len(shape) > 1 else 1
    step = max(STEP_ELEMENTS // max(wide, 1) // 64, 1) * 64
    matrices: dict[Piece, Matrix] = {}
    for start in range(*task.rows, step):
        stop = min(start + step, task.rows[1])
        values = source.rows(task.name, start, stop)
        for piece in task.pieces:
            first, last = max(start, piece.source_rows[0]), min(stop, piece.source_rows[1])
            if first >= last:
                continue
            part = values[first - start : last - start]
            part = part[:, slice(*piece.columns)] if piece.columns else part
            row = piece.rows[0] + first - piece.source_rows[0]
            figures = result[piece.rank, piece.tensor]
            if part.ndim == 1:
                _vector(checkpoint, piece, row, part, exact, figures)
                continue
            if piece not in matrices:
                matrices[piece] = matrix(checkpoint, piece.rank, piece.module, piece.expert)
            _matrix(checkpoint, matrices[piece], piece, row, part, exact, kept and not exact, figures)
    return dict(result)


def _padding(checkpoint: Checkpoint, piece: Piece, figures: Figures) -> None:
    """Rows behind the vocabulary's end are zeros."""
    tensor = checkpoint.ranks[piece.rank][piece.tensor]
    rest = tuple((0, n) for n in tensor.shape[1:])
    width = max(int(torch.tensor(tensor.shape[1:]).prod()), 1)
    for start in range(*piece.rows, max(STEP_ELEMENTS // width, 1)):
        values = read(tensor, ((start, min(start + max(STEP_ELEMENTS // width, 1), piece.rows[1])), *rest)).float()
        if values.any():
            figures.compare(values, torch.zeros_like(values), 0.0, Where(start))
        else:
            figures.equal(values.numel())


def _vector(checkpoint: Checkpoint, piece: Piece, row: int, wanted: Tensor, exact: bool, figures: Figures) -> None:
    got = read(checkpoint.ranks[piece.rank][piece.tensor], ((row, row + len(wanted)),))
    _numbers(got, wanted, piece, exact, figures, Where(row))


def _matrix(
    checkpoint: Checkpoint, held: Matrix, piece: Piece, row: int, wanted: Tensor, exact: bool, kept: bool, figures: Figures
) -> None:
    where = Where(row, piece.expert)
    if held.kind == "dense":
        _numbers(held.stored(row, row + len(wanted)), wanted, piece, exact, figures, where)
        return
    got, numbers = held.rows(row, row + len(wanted)), wanted.float()
    if held.prequant is not None:
        got = got * held.prequant
    figures.compare(got, numbers, allowed(held, numbers, row, model_dtype(checkpoint), kept), where)


def model_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The type of what a checkpoint does not quantize."""
    return {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(checkpoint.config.get("dtype", ""), torch.float32)


def _numbers(got: Tensor, wanted: Tensor, piece: Piece, exact: bool, figures: Figures, where: Where) -> None:
    """Values stored as numbers: the source's, rounded once. What was unpacked may have been computed in another order."""
    if got.shape != wanted.shape:
        figures.compare(torch.full(wanted.shape, torch.nan), wanted.float(), 0.0, where)
        return
    if piece.added:
        # An addition in float16 is rounded there (families, Gemma).
        wanted = wanted + piece.added if wanted.dtype == torch.float16 else wanted.float() + piece.added
    rounded = wanted.to(got.dtype)
    same = same_bits(got, rounded)
    if same and same_bits(rounded.to(wanted.dtype), wanted):
        figures.equal(got.numel())
    elif same or not exact:
        figures.compare(got.float(), wanted.float(), rounding(wanted.float(), got.dtype) * 2, where, exact=same)
    else:
        figures.compare(got.float(), rounded.float(), 0.0, where)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one type are equal bit for bit, NaN and signs of zeros included."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))
