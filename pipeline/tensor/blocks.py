"""The blocks of lazy arrays: a stage's share of the small tasks that make them, for a group of blocks.

An array of the stages is made of small tasks, one a block and stage, that would cost a scheduler more than they do. A graph that is
run has one task for a stage of a *group* of blocks instead (pipeline/planning/dask_graph.py), which runs the small ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.tensor.arrays import BlockArray, Needed, SmallTask, block_array

if TYPE_CHECKING:
    from pipeline.tensor.tensors import Block

CHECKSUMS = "checksums"  # what a small task that opens a chunk of scratch depends on, beside blocks
Part = tuple[int, int, str]  # of a chunk: byte offset, bytes, and their 64-bit xxh3 in hexadecimal digits


class ChunksWritten(Protocol):
    """The result of a task that wrote to scratch."""

    @property
    def chunk_parts(self) -> Mapping[str, Sequence[Part]]:
        """The parts that it wrote of each chunk, by the chunk's name."""


@dataclass(frozen=True)
class StageOfGroup:
    """The part of a stage in one group of blocks.

    Attributes
    ----------
    tasks
        The small task of each block that the stage makes, those first that others of the stage need.
    keep
        The numbers of the blocks that the stages behind it need, those that this stage leaves as they are included.
    known
        The parts of chunks of scratch that an earlier run wrote, by the chunk's name.
    """

    tasks: tuple[SmallTask, ...] = ()
    keep: tuple[int, ...] = ()
    known: tuple[tuple[str, tuple[Part, ...]], ...] = ()


def make_blocks(stage: StageOfGroup, *inputs: Mapping[int, Block] | ChunksWritten) -> dict[int, Block]:
    """Make the blocks of a stage, by number: what its Dask task runs. No value is read: that is for those who ask a block.

    `inputs`: the blocks of the stage before it, and the results of the tasks that wrote the chunks of scratch that it opens.
    """
    values: dict[Any, Any] = {}
    parts: dict[str, list[Part]] = {name: list(known) for name, known in stage.known}
    for each in inputs:
        if isinstance(each, Mapping):
            values.update(each)
            continue
        for name, written in each.chunk_parts.items():
            parts.setdefault(name, []).extend(written)
    values[CHECKSUMS] = parts
    for task in stage.tasks:
        values[task.number] = task(values)
    return {number: values[number] for number in stage.keep}


def read_block(array: BlockArray, index: Sequence[int]) -> Any:
    """The block of an array at a chunk index: still unread, as no stage reads before it is asked for values."""
    needed: Needed = {}
    number = block_array(array).collect(tuple(index), needed)
    return make_blocks(StageOfGroup(tuple(task for task, _ in needed.values()), (number,)))[number]
