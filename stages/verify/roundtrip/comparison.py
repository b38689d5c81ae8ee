"""Compare the values of rank files with those of the source, rectangle by rectangle.

Values that are stored as numbers must be the source's, rounded once to the model's type, bit for bit. Values that are stored as
codes may differ by as much as their format allows (figures.py).
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from pipeline.tensor.checkpoint import Checkpoint
from stages.verify.matrices import Matrix, matrix
from stages.verify.named_weights import SourceWeights
from stages.verify.roundtrip.figures import BlockPlace, Figures, allowed, rounding
from stages.verify.roundtrip.matching import ComparisonTask
from stages.verify.roundtrip.origin import Origin
from stages.verify.values import read

STEP_ELEMENTS = 1 << 21  # compared at once: values; 8 MiB as float32


def compare(checkpoint: Checkpoint, source: SourceWeights, task: ComparisonTask, kept: bool) -> dict[tuple[int, str], Figures]:
    """Compare some rows of a source tensor with every rank that holds some of them.

    `kept`: the codes of a packed source are in the rank files unchanged. Returns figures by (rank, tensor's name).
    """
    result: dict[tuple[int, str], Figures] = defaultdict(Figures)
    if not task.name:
        (origin,) = task.origins
        _compare_padding(checkpoint, origin, result[origin.rank, origin.tensor])
        return dict(result)
    shape = source.shape(task.name)
    exact, kept = source.exact(task.name), kept and source.coded(task.name)
    width = shape[1] if len(shape) > 1 else 1
    step = max(STEP_ELEMENTS // max(width, 1) // 64, 1) * 64
    matrices: dict[Origin, Matrix] = {}
    for start in range(*task.rows, step):
        stop = min(start + step, task.rows[1])
        values = source.rows(task.name, start, stop)
        for origin in task.origins:
            first, last = max(start, origin.source_rows[0]), min(stop, origin.source_rows[1])
            if first >= last:
                continue
            expected = values[first - start : last - start]
            expected = expected[:, slice(*origin.columns)] if origin.columns else expected
            row = origin.rows[0] + first - origin.source_rows[0]
            figures = result[origin.rank, origin.tensor]
            if expected.ndim == 1:
                _compare_vector(checkpoint, origin, row, expected, exact, figures)
                continue
            if origin not in matrices:
                matrices[origin] = matrix(checkpoint, origin.rank, origin.module, origin.expert)
            _compare_matrix(checkpoint, matrices[origin], origin, row, expected, exact, kept, figures)
    return dict(result)


def _compare_padding(checkpoint: Checkpoint, origin: Origin, figures: Figures) -> None:
    """Count the rows behind the end of the vocabulary, which must be zeros."""
    tensor = checkpoint.ranks[origin.rank][origin.tensor]
    other_axes = tuple((0, n) for n in tensor.shape[1:])
    width = max(int(torch.tensor(tensor.shape[1:]).prod()), 1)
    for start in range(*origin.rows, max(STEP_ELEMENTS // width, 1)):
        values = read(tensor, ((start, min(start + max(STEP_ELEMENTS // width, 1), origin.rows[1])), *other_axes)).float()
        if values.any():
            figures.compare(values, torch.zeros_like(values), 0.0, BlockPlace(start))
        else:
            figures.equal(values.numel())


def _compare_vector(checkpoint: Checkpoint, origin: Origin, row: int, expected: Tensor, exact: bool, figures: Figures) -> None:
    actual = read(checkpoint.ranks[origin.rank][origin.tensor], ((row, row + len(expected)),))
    _compare_numbers(actual, expected, origin, exact, figures, BlockPlace(row))


def _compare_matrix(
    checkpoint: Checkpoint,
    stored: Matrix,
    origin: Origin,
    row: int,
    expected: Tensor,
    exact: bool,
    kept: bool,
    figures: Figures,
) -> None:
    place = BlockPlace(row, origin.expert)
    if stored.kind == "dense":
        _compare_numbers(stored.stored(row, row + len(expected)), expected, origin, exact, figures, place)
        return
    actual, numbers = stored.rows(row, row + len(expected)), expected.float()
    if stored.prequant is not None:
        actual = actual * stored.prequant
    figures.compare(actual, numbers, allowed(stored, numbers, row, model_dtype(checkpoint), kept), place)


def model_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The type of the tensors that a checkpoint does not quantize: config.json's `dtype`, float32 where it names no other."""
    return {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(checkpoint.config.get("dtype", ""), torch.float32)


def _compare_numbers(actual: Tensor, expected: Tensor, origin: Origin, exact: bool, figures: Figures, place: BlockPlace) -> None:
    """Count values that are stored as numbers, which must be the source's, rounded once.

    Where the source is packed (not `exact`), its numbers may have been computed in another order: they may differ by two roundings.
    """
    if actual.shape != expected.shape:
        figures.compare(torch.full(expected.shape, torch.nan), expected.float(), 0.0, place)
        return
    if origin.added:
        # An addition in float16 is rounded there (docs/format/families.md, section 7).
        expected = expected + origin.added if expected.dtype == torch.float16 else expected.float() + origin.added
    rounded = expected.to(actual.dtype)
    same = same_bits(actual, rounded)
    if same and same_bits(rounded.to(expected.dtype), expected):
        figures.equal(actual.numel())
    elif same or not exact:
        figures.compare(actual.float(), expected.float(), rounding(expected.float(), actual.dtype) * 2, place, exact=same)
    else:
        figures.compare(actual.float(), rounded.float(), 0.0, place)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one type are equal bit for bit, NaN and signs of zeros included."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))
