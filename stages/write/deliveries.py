"""Where the values of source blocks go, worked out before anything is read: placements and a block's region give deliveries."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pipeline.tensor.placement import Located, Placement, Region, shift, slices
from pipeline.tensor.tensors import Block


@dataclass(frozen=True, slots=True)
class Delivery:
    """One destination of a part of a block.

    The values of the block's region `source` go, in C order, to the bytes from `offset` of the file at `path`. Where `offset` is
    -1, `path` is the URL of a Zarr array, and the values, which are a whole chunk of it, go to its region `target`. `rank`: the
    output rank that the file belongs to. `chunk`, `file_bytes`: of a chunk of scratch, as in Located.
    """

    path: str
    offset: int
    source: Region
    rank: int
    target: Region = ()
    chunk: str = ""
    file_bytes: int = 0


@dataclass(frozen=True, slots=True)
class BlockWrite:
    """The work of a task for one source block: its deliveries to each sink, and how it is cut into pieces.

    Parameters
    ----------
    name
        The source tensor.
    deliveries
        One tuple of deliveries for each sink.
    itemsize
        The bytes of the widest type that a value has on its way from source to sink.
    piece_bytes
        The most bytes of a piece.
    row_multiple
        Pieces are cut at multiples of this many rows.
    region
        The part of the block that deliveries count by, as they have values of it alone; () for all of the block.
    """

    name: str
    deliveries: tuple[tuple[Delivery, ...], ...]
    itemsize: int
    piece_bytes: int
    row_multiple: int
    region: Region = ()

    def parts(self, blocks: Iterable[Block]) -> list[Block]:
        """The part of each version of the block that the deliveries count by."""
        return [block[slices(self.region)] if self.region else block for block in blocks]


Locate = Callable[[int, str, Region], Iterable[Located]]  # (rank, tensor, region) -> where the region's bytes lie


def deliveries(placements: Iterable[Placement], region: Region, locate: Locate) -> tuple[Delivery, ...]:
    """Return the deliveries of a source's block to one sink.

    Parameters
    ----------
    placements
        Where the regions of the source go. Those without a source are padding, for which reserved files have zeros already.
    region
        The block's region of the source.
    locate
        A function of (rank, tensor, region) that yields where the region's bytes lie in the sink.
    """
    result = []
    for placement in placements:
        moved = placement.of(region)
        if moved is None:
            continue
        target, move = moved
        lead = len(target) - len(move)
        origin = [start for start, _ in region]
        for place in locate(placement.rank, placement.tensor, target):
            source = shift(shift(place.region[lead:], move, -1), origin, -1)
            whole_chunk = place.region if place.offset < 0 else ()
            delivery = Delivery(place.path, place.offset, source, placement.rank, whole_chunk, place.chunk, place.file_bytes)
            result.append(delivery)
    return tuple(result)
