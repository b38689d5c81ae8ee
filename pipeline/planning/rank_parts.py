"""The parts of rank files that are assembled, as those in object storage are: which bytes each has, and of which chunks of scratch.

Parts of a file are of one size, as some stores ask for, but for the last.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.planning.memory import MAX_PIECE_BYTES, MIB, Need
from pipeline.planning.phases import group_blocks
from pipeline.sinks.output import Output
from pipeline.sinks.rank_file import RankFile, RankFileTensor
from pipeline.tensor.bucket import in_parts
from pipeline.tensor.placement import Region, intersect, shift
from pipeline.tensor.remote_path import RemotePath
from stages.write.deliveries import Delivery
from stages.write.parts import STREAM, RankPart

if TYPE_CHECKING:
    from pipeline.planning.phases import Group, Sink, Store

PART_BYTES = 16 * MIB
MOST_PARTS = 10_000  # of an upload, by S3's limits
MOST_TASKS = 16_384  # that upload the parts of one output: a scheduler takes milliseconds for each
COPIES = 3  # of a part that a worker holds: gathered, on its way, and the pieces of chunks that it is made of


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


def _by_rank(stores: Sequence[Store], sinks: Sequence[Sink]) -> dict[tuple[int, int], list[tuple[RankFileTensor, Store]]]:
    """The tensors of each (sink, rank) in the order of its file, each with the store of its chunks."""
    result: dict[tuple[int, int], list[tuple[RankFileTensor, Store]]] = {}
    for store in stores:
        for number, sink in enumerate(sinks):
            for placement in store.placed(number):
                tensor = place_in_file(sink, placement.rank, placement.tensor)
                result.setdefault((number, placement.rank), []).append((tensor, store))
    for own in result.values():
        own.sort(key=lambda each: each[0].offset)
    return result


def _in_part(tensors: Sequence[tuple[RankFileTensor, Store]], part: RankPart) -> list[tuple[RankFileTensor, Store]]:
    start = bisect_right(tensors, part.start, key=lambda each: each[0].offset + each[0].nbytes)
    stop = bisect_left(tensors, part.end, key=lambda each: each[0].offset)
    return list(tensors[start:stop])


def _blocks(tensors: Sequence[tuple[RankFileTensor, Store]], part: RankPart) -> Iterator[tuple[Store, tuple[int, ...]]]:
    for tensor, store in tensors:
        for index in store.arrays[part.sink].grid.regions:
            if delivered(part, store, index, tensor):
                yield store, tuple(index)


def _padding(tensors: Sequence[tuple[RankFileTensor, Store]], part: RankPart) -> Iterator[tuple[int, int]]:
    """The ranges of a part's bytes that no block fills: the last rows of some tensors."""
    for tensor, store in tensors:
        filled = next(store.placed(part.sink)).target
        start = max(tensor.offset + math.prod(stop for _, stop in filled) * store.arrays[part.sink].dtype.itemsize, part.start)
        stop = min(tensor.offset + tensor.nbytes, part.end)
        if start < stop:
            yield start, stop


def delivered(part: RankPart, store: Store, index: Sequence[int], tensor: RankFileTensor) -> tuple[Delivery, ...]:
    """Where the bytes of a chunk go in a part; none where it has none of them. `tensor`: the place of the store's in the file.

    Padding, which nobody writes, is what a part has to begin with.
    """
    region = store.region(index)
    corner = [start for start, _ in region]
    filled = next(store.placed(part.sink)).target
    common = intersect(region, filled)
    if common is None:
        return ()
    runs = _runs(part, tensor, store.arrays[part.sink].dtype.itemsize, common)
    return tuple(Delivery(part.url, offset, shift(run, corner, -1), part.rank) for offset, run in runs)


def place_in_file(sink: Sink, rank: int, tensor: str) -> RankFileTensor:
    """The place of a tensor in a rank's file."""
    assert isinstance(sink, Output)
    return sink.files[rank].tensors[tensor]


def _runs(part: RankPart, tensor: RankFileTensor, itemsize: int, region: Region) -> Iterator[tuple[int, Region]]:
    """The runs of a chunk that a part has: (byte offset in the file, region of the tensor that is one run of bytes there).

    Chunks hold whole rows, so that their bytes are one run of the file.
    """
    shape, _ = tensor.stored
    first = max(part.start - tensor.offset, 0)
    last = min(part.end - tensor.offset, tensor.nbytes)
    if first % itemsize or last % itemsize:
        raise RuntimeError(f"{part.name}: a boundary inside a value of {itemsize} bytes")
    row = math.prod(shape[1:])
    if shape:
        first, last = max(first, region[0][0] * row * itemsize), min(last, region[0][1] * row * itemsize)
    for box in boxes(shape, first // itemsize, last // itemsize):
        at = sum(start * math.prod(shape[axis + 1 :]) for axis, (start, _) in enumerate(box))
        if intersect(box, region) is not None:
            yield tensor.offset + at * itemsize, box


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
    """The parts of all rank files in object storage, a file after the other, in the order in which their groups stand."""
    return list(
        itertools.chain.from_iterable(
            file_parts(file, number, rank, sink.size_bytes)
            for number, sink in enumerate(sinks)
            if isinstance(sink, Output) and isinstance(sink.directory, RemotePath)
            for rank, file in enumerate(sink.files)
        )
    )


def grouped(stores: Sequence[Store], sinks: Sequence[Sink], block_bytes: int) -> tuple[tuple[Group, ...], dict[int, RankPart]]:
    """The groups of the last phase, and those of them that assemble a part, by position: files are written at offsets elsewhere.

    `stores`: where any sink is in object storage, one for each rank tensor of a cut.
    """
    parts, groups = [], []
    by_rank = _by_rank(stores, sinks)
    for part in all_parts(sinks):
        tensors = _in_part(by_rank.get((part.sink, part.rank), ()), part)
        parts.append(replace(part, padding=tuple(_padding(tensors, part))))
        groups.append(tuple(_blocks(tensors, part)))
    remote = {part.sink for part in parts}
    local = [store for store in stores if any(store.placements[n].elements for n in range(len(sinks)) if n not in remote)]
    return (*groups, *group_blocks(local, block_bytes)), dict(enumerate(parts))


def parts_need(parts: Mapping[int, RankPart]) -> list[Need]:
    """The memory of the largest part that a worker gathers."""
    largest = sorted(parts.values(), key=lambda each: each.step_bytes)[-1:]
    return [Need(f"a part of {part.url}", part.step_bytes, COPIES) for part in largest]


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
