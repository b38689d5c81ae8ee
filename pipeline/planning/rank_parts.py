"""The parts of rank files that are assembled, as those in object storage are: which bytes each has, and of which blocks.

Parts of a file are of one size, as some stores ask for, but for the last.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Generic, TypeVar

from pipeline.model.dtypes import BY_TARGET
from pipeline.planning.memory import MAX_PIECE_BYTES, MIB, Need
from pipeline.planning.phases import group_blocks
from pipeline.sinks.output import Output
from pipeline.sinks.rank_file import RankFile, RankFileTensor
from pipeline.tensor.bucket import in_parts
from pipeline.tensor.placement import Located, Region, contiguous, ends, extent, intersect, shift, size, whole
from pipeline.tensor.remote_path import RemotePath
from stages.write.deliveries import Delivery, Locate, deliveries
from stages.write.parts import STREAM, RankPart

if TYPE_CHECKING:
    from pipeline.planning.phases import Group, Sink, Store

T = TypeVar("T")

PART_BYTES = 16 * MIB
MOST_PARTS = 10_000  # of an upload, by S3's limits
MOST_TASKS = 16_384  # that upload the parts of one output: a scheduler takes milliseconds for each
COPIES = 3  # of a part that a worker holds: gathered, on its way, and the pieces that it is made of


def part_bytes(file_bytes: int, output_bytes: int) -> int:
    """The size of the parts of a file of an output, by these two alone, so that a run goes on with another limit of memory."""
    size = PART_BYTES
    while output_bytes > size * MOST_TASKS:
        size *= 2
    least = -(-file_bytes // MOST_PARTS)
    return size if least <= size else -(-least // MIB) * MIB


def file_parts(file: RankFile, sink: int, rank: int, output_bytes: int) -> list[RankPart]:
    """The parts of a rank's file: one that is a stream, where its store does not keep parts."""
    url, size, step = str(file.path), file.size_bytes, part_bytes(file.size_bytes, output_bytes)
    if not in_parts(url):
        return [RankPart(url, sink, rank, STREAM, 0, size, size, file.header, step)]
    starts = range(0, size, step)
    return [
        RankPart(url, sink, rank, number, start, min(start + step, size), size, file.header[start : start + step], step)
        for number, start in enumerate(starts, 1)
    ]


def locate_in_part(part: RankPart, tensors: Mapping[str, RankFileTensor]) -> Locate:
    """Where regions of its rank's tensors lie in a part: (rank, tensor, region) -> the runs of bytes that the part has.

    `tensors`: those of the part's file.
    """

    def locate(_rank: int, name: str, region: Region) -> Iterator[Located]:
        tensor = tensors[name]
        shape, dtype = tensor.stored
        itemsize = BY_TARGET[dtype].numpy.itemsize
        first, last = max(part.start - tensor.offset, 0), min(part.end - tensor.offset, tensor.nbytes)
        if first % itemsize or last % itemsize:
            raise RuntimeError(f"{part.name}: a boundary inside a value of {itemsize} bytes")
        for box in boxes(shape, first // itemsize, last // itemsize):
            common = intersect(box, region)
            if common is not None:
                for element, run in contiguous(shape, common):
                    yield Located(part.url, tensor.offset + element * itemsize, run)

    return locate


def delivered(part: RankPart, store: Store, index: Sequence[int], file: RankFile) -> tuple[Region, tuple[Delivery, ...]]:
    """The region of a block that has all of the block's values of a part, and where its values go; none where it has none.

    The region is whole rows, in multiples of the store's. Padding, which nobody writes, is what a part has to begin with.
    """
    region = store.region(index)
    own = [placement for placement in store.placed(part.sink) if placement.rank == part.rank]
    found = deliveries(own, region, locate_in_part(part, file.tensors))
    if not found:
        return (), ()
    rows = _rows(extent(region), [to.source for to in found], store.row_multiple)
    corner = [start for start, _ in rows]
    return rows, tuple(replace(to, source=shift(to.source, corner, -1)) for to in found)


def _rows(shape: Sequence[int], regions: Sequence[Region], multiple: int) -> Region:
    """The rows of an array that some regions of it lie in, from a multiple to a multiple."""
    result = list(whole(shape))
    for axis in range(max(len(shape) - 1, min(len(shape), 1))):
        first, last = min(each[axis][0] for each in regions), max(each[axis][1] for each in regions)
        result[axis] = first - first % multiple, min(-(-last // multiple) * multiple, shape[axis])
        if result[axis][1] - result[axis][0] > 1:  # of a stack, rows of one matrix; of several, all of each
            break
    return tuple(result)


class _Ranges(Generic[T]):
    """Some values, each of a range of a file's bytes; those come out that have bytes of a part."""

    def __init__(self, ranges: Iterable[tuple[int, int, T]]) -> None:
        self.ranges = sorted(ranges, key=lambda each: each[:2])
        self.ends = list(itertools.accumulate((end for _, end, _ in self.ranges), max))

    def of(self, part: RankPart) -> Iterator[tuple[int, int, T]]:
        """(start, end, value), as much of each range as the part has."""
        first, last = bisect_right(self.ends, part.start), bisect_left(self.ranges, part.end, key=lambda each: each[0])
        for start, end, value in self.ranges[first:last]:
            if end > part.start:
                yield max(start, part.start), min(end, part.end), value


def _placed(stores: Sequence[Store], sink: int, files: Sequence[RankFile]) -> tuple[list[_Ranges[Store]], list[_Ranges[None]]]:
    """Of each rank's file in a sink, which stores have which bytes, from the first to the last; and its padding."""
    filled: list[list[tuple[int, int, Store]]] = [[] for _ in files]
    padding: list[list[tuple[int, int, None]]] = [[] for _ in files]
    for store in stores:
        for placement in store.placed(sink):
            if not size(placement.target):
                continue
            tensor = files[placement.rank].tensors[placement.tensor]
            shape, dtype = tensor.stored
            itemsize = BY_TARGET[dtype].numpy.itemsize
            if placement.source is not None:
                first, last = ends(shape, placement.target)
                filled[placement.rank].append((tensor.offset + first * itemsize, tensor.offset + last * itemsize, store))
                continue
            for first, run in contiguous(shape, placement.target):
                start = tensor.offset + first * itemsize
                padding[placement.rank].append((start, start + size(run) * itemsize, None))
    return [*map(_Ranges, filled)], [*map(_Ranges, padding)]


def boxes(shape: Sequence[int], first: int, last: int) -> Iterator[Region]:
    """The elements [first, last) of an array in C order, as regions in that order, each of which is one run of elements."""
    if last <= first:
        return
    if not shape:
        yield ()
        return
    inner = math.prod(shape[1:])
    if not inner:
        return
    row, in_row = divmod(first, inner)
    if in_row or last < first - in_row + inner:  # the end of a row, or less
        stop = min(last - row * inner, inner)
        for rest in boxes(shape[1:], in_row, stop):
            yield ((row, row + 1), *rest)
        first = row * inner + stop
        row, in_row = divmod(first, inner)
    whole_rows = last // inner
    if whole_rows > row:
        yield ((row, whole_rows), *((0, size) for size in shape[1:]))
        first = whole_rows * inner
    if first < last:
        for rest in boxes(shape[1:], 0, last - first):
            yield ((whole_rows, whole_rows + 1), *rest)


def all_parts(sinks: Sequence[Sink]) -> list[RankPart]:
    """The parts of all rank files in object storage, in the order in which their groups stand, however they are made.

    Those of all ranks go side by side, as do the rows that ranks take of a tensor.
    """
    return [
        part
        for number, sink in enumerate(sinks)
        if isinstance(sink, Output) and isinstance(sink.directory, RemotePath)
        for part in sorted(
            (part for rank, file in enumerate(sink.files) for part in file_parts(file, number, rank, sink.size_bytes)),
            key=lambda part: (part.start / part.file_bytes, part.rank),
        )
    ]


def grouped(stores: Sequence[Store], sinks: Sequence[Sink], block_bytes: int) -> tuple[tuple[Group, ...], dict[int, RankPart]]:
    """The groups of the last phase, and those of them that assemble a part, by position: files are written at offsets elsewhere.

    `stores`: of the source, or of a cut, where there is one for each rank tensor.
    """
    parts, groups = all_parts(sinks), []
    remote = {part.sink: rank_files(sinks[part.sink]) for part in parts}
    placed = {number: _placed(stores, number, files) for number, files in remote.items()}
    ranges: dict[tuple[int, int, int], _Ranges[tuple[int, ...]]] = {}
    for position, part in enumerate(parts):
        filled, padding = placed[part.sink]
        parts[position] = replace(part, padding=tuple((start, end) for start, end, _ in padding[part.rank].of(part)))
        groups.append(tuple(_blocks(list(filled[part.rank].of(part)), part, remote[part.sink][part.rank], ranges)))
    local = [store for store in stores if any(store.placements[n].elements for n in range(len(sinks)) if n not in remote)]
    return (*groups, *group_blocks(local, block_bytes)), dict(enumerate(parts))


def _blocks(
    placed: Sequence[tuple[int, int, Store]],
    part: RankPart,
    file: RankFile,
    ranges: dict[tuple[int, int, int], _Ranges[tuple[int, ...]]],
) -> Iterator[tuple[Store, tuple[int, ...]]]:
    """The blocks that have bytes of a part, in the order of these.

    `placed`: what the stores have of it. `ranges`: of blocks in files by the store's id, the sink and the rank.
    """
    for store in {id(store): store for _, _, store in placed}.values():
        regions = store.arrays[part.sink].grid.regions
        if len(regions) == 1:
            yield store, next(iter(regions))
            continue
        key = id(store), part.sink, part.rank
        if key not in ranges:
            ranges[key] = _Ranges(_block_ranges(store, part, file))
        near = {index for _, _, index in ranges[key].of(part)}
        yield from ((store, index) for index in sorted(near) if delivered(part, store, index, file)[1])


def _block_ranges(store: Store, part: RankPart, file: RankFile) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """The bytes of a part's file that each block of a store has there, from the first to the last."""
    for placement in (each for each in store.placed(part.sink) if each.rank == part.rank):
        tensor = file.tensors[placement.tensor]
        shape, dtype = tensor.stored
        itemsize = BY_TARGET[dtype].numpy.itemsize
        for index, region in store.arrays[part.sink].grid.regions.items():
            if moved := placement.of(region):
                first, last = ends(shape, moved[0])
                yield tensor.offset + first * itemsize, tensor.offset + last * itemsize, index


def rank_files(sink: Sink) -> Sequence[RankFile]:
    """The files of an output, rank 0 first."""
    assert isinstance(sink, Output)
    return sink.files


def parts_need(parts: Mapping[int, RankPart], fetched: bool) -> list[Need]:
    """The memory of the largest part that a worker gathers. `fetched`: of pieces of the source that are fetched ahead."""
    largest = sorted(parts.values(), key=lambda each: each.step_bytes)[-1:]
    return [Need(f"a part of {part.url}", part.step_bytes, COPIES + fetched) for part in largest]


def aligned_chunks(
    stores: Sequence[Store], target: int, shapes: Mapping[tuple[int, str], tuple[int, ...]]
) -> dict[tuple[int, str], tuple[int, ...]]:
    """The largest chunks of rank tensors of which each is filled by one block of one source tensor, by (rank, name).

    `shapes`: those of the rank tensors of a target, by its number. Padding fills chunks of its own.
    """
    steps: dict[tuple[int, str], list[int]] = {}
    for store in stores:
        blocks = store.arrays[target].chunksize
        for placement in store.placed(target):
            if placement.source is None:
                continue
            key = placement.rank, placement.tensor
            found = steps.setdefault(key, [0] * len(placement.target))
            lead = len(placement.target) - len(placement.source)
            for axis, (start, stop) in enumerate(placement.target):
                bounds = [start, *(() if stop == shapes[key][axis] else (stop,))]
                if axis >= lead:
                    (first, last), block = placement.source[axis - lead], blocks[axis - lead]
                    cuts = range((first // block + 1) * block, last, block)
                    bounds += [start + cut - first for cut in (*cuts[:1], *cuts[1:2])]
                found[axis] = math.gcd(found[axis], *bounds)
    return {key: tuple(step or size for step, size in zip(found, shapes[key], strict=True)) for key, found in steps.items()}


def rank_chunk_bytes(block_bytes: int, remote: bool) -> int:
    """The most bytes of a chunk of rank tensors that parts are made of: few are then looked at twice."""
    return min(block_bytes, MAX_PIECE_BYTES if remote else PART_BYTES // 2)
