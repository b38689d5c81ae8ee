"""Read the rank files once, in the order of their bytes, for both of what is said of them: their checksums and their values.

A few hundred kilobytes at a time are read into memory that is used again, summed, and compared with the source, while they are in
the processor's cache.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import Problem
from pipeline.tensor.checkpoint import Checkpoint
from pipeline.tensor.tensors import tensor_bytes
from stages.verify.contract.integrity import part_sums
from stages.verify.contract.part_sums import RunningSums, Sums, unreadable
from stages.verify.named_weights import SourceWeights
from stages.verify.roundtrip.comparison import SourceRows, TensorComparison
from stages.verify.roundtrip.figures import Figures
from stages.verify.roundtrip.origin import Origin
from stages.verify.values import UINT8, Buffers, read_again

BYTES_AT_ONCE = 1 << 20  # of a tensor that are read at once where they have no origin
TASK_BYTES = 64 << 20  # of a tensor that one task reads, or one part of its checksums where that is larger


@dataclass(frozen=True)
class TensorPart:
    """Some bytes of a tensor of one or several ranks, which one task reads: whole rows, and of each rank as many.

    Several are those whose rows are the same rows of the source, or columns of them, so that the source is read once for all.

    `start`: the first byte. `sums`: of each rank's parts, nothing where headrace.json has none. `origins`: of each rank's rows;
    nothing where they have none in the source.
    """

    ranks: tuple[int, ...]
    name: str
    start: int
    nbytes: int
    sums: tuple[Sums, ...] = field(repr=False)
    origins: tuple[tuple[Origin, ...], ...] = field(repr=False)


class PartChecked(NamedTuple):
    """The result for one rank of a part that begins with byte `start` of its tensor.

    `problem`: of its bytes, None for none. `figures`: of its values, None where these have no origin; where there is a problem they
    say nothing.
    """

    rank: int
    name: str
    start: int
    problem: Problem | None
    figures: Figures | None


def tensor_parts(checkpoint: Checkpoint, source: SourceWeights, origins: Iterable[Origin]) -> Iterator[TensorPart]:
    """List the parts of all tensors that have a checksum or an origin, in the order of the files."""
    by_tensor: dict[tuple[int, str], list[Origin]] = defaultdict(list)
    for origin in origins:
        by_tensor[origin.rank, origin.tensor].append(origin)
    groups: dict[Any, list[int]] = defaultdict(list)
    for rank, tensors in enumerate(checkpoint.ranks):
        for name, tensor in tensors.items():
            own = by_tensor.get((rank, name), ())
            if tensor_bytes(tensor) and (own or part_sums(checkpoint, rank, name)):
                same = tuple(replace(origin, rank=0, columns=None) for origin in own) or rank
                groups[name, tensor.shape, tensor.dtype, same].append(rank)
    for (name, *_), ranks in groups.items():
        own_origins = tuple(tuple(by_tensor.get((rank, name), ())) for rank in ranks)
        sums = [part_sums(checkpoint, rank, name) or [] for rank in ranks]
        of_first = own_origins[0]
        unit = TensorComparison(checkpoint, SourceRows(source), False, ranks[0], name, of_first).unit_bytes if of_first else 1
        for start, nbytes, some in _cut(tensor_bytes(checkpoint.ranks[ranks[0]][name]), unit, sums):
            yield TensorPart(tuple(ranks), name, start, nbytes, some, own_origins)


def check_part(checkpoint: Checkpoint, source: SourceWeights, kept: bool, part: TensorPart) -> list[PartChecked]:
    """Hold a part's bytes against their checksums, and its values against the source's; returns a result for each rank.

    `kept`: the codes of a packed source are in the rank files unchanged. Raises OSError where the source cannot be read.
    """
    rows, buffers = SourceRows(source), Buffers()
    walks = [_RankWalk(checkpoint, rows, kept, part, place, buffers) for place in range(len(part.ranks))]
    unit, values = walks[0].unit, walks[0].values
    first, last = part.start // unit, (part.start + part.nbytes) // unit
    matrix, block = (values.matrix_units, values.block_units) if values else (last, BYTES_AT_ONCE)
    while first < last:
        stop = min(first + block, last, (first // matrix + 1) * matrix)
        for walk in walks:
            walk.check(first, stop)
        first = stop
    return [walk.result(part) for walk in walks]


class _RankWalk:
    """The walk through one rank's bytes of a part; it ends with the first problem."""

    def __init__(
        self, checkpoint: Checkpoint, rows: SourceRows, kept: bool, part: TensorPart, place: int, buffers: Buffers
    ) -> None:
        self.rank, origins = part.ranks[place], part.origins[place]
        tensor = checkpoint.ranks[self.rank][part.name]
        self.subject, self.path = f"rank{self.rank}.safetensors: {part.name}", tensor.path
        self.problem: Problem | None = None
        self.values = TensorComparison(checkpoint, rows, kept, self.rank, part.name, origins, buffers) if origins else None
        self.unit = self.values.unit_bytes if self.values else 1
        self._sums = RunningSums(self.subject, part.sums[place], part.start)
        self._stream = tensor.viewed((tensor_bytes(tensor) // self.unit, self.unit), UINT8)
        self._buffers = buffers

    def check(self, first: int, stop: int) -> None:
        """Read, sum and compare units [first, stop) of the tensor."""
        if self.problem:
            return
        try:
            data = read_again(self._stream, ((first, stop), (0, self.unit)), self._buffers, "units")
        except OSError as error:
            self.problem = unreadable(self.subject, error)
            return
        self._sums.update(data.reshape(-1))
        self.problem = self._sums.problem
        if self.problem or self.values is None:
            return
        try:
            with np.errstate(all="ignore"):  # what is no number is counted as wrong
                self.values.compare(data, first)
        except OSError as error:
            if self.path not in str(error):
                raise  # it is the source that cannot be read
            self.problem = unreadable(self.subject, error)

    def result(self, part: TensorPart) -> PartChecked:
        """The result of the whole walk."""
        return PartChecked(self.rank, part.name, part.start, self.problem, self.values.figures if self.values else None)


def _cut(total: int, unit: int, sums: Sequence[Sums]) -> Iterator[tuple[int, int, tuple[Sums, ...]]]:
    """The parts of tensors of `total` bytes: (first byte, bytes, sums of each rank); they end with units and with summed parts."""
    ends = [list(accumulate(nbytes for nbytes, _ in each)) for each in sums]
    step = -(-TASK_BYTES // unit) * unit
    common = set.intersection(*(set(each) for each in ends if each)) if any(ends) else set(range(step, total, step))
    start = 0
    for end in sorted({*common, total}):
        if end == total or (end - start >= TASK_BYTES and end % unit == 0):
            inside = (
                tuple(part for part, stop in zip(each, stops, strict=True) if start < stop <= end)
                for each, stops in zip(sums, ends, strict=True)
            )
            yield start, end - start, tuple(inside)
            start = end
