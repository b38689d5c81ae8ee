"""Cuts: where a plan's tensors go through scratch, and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.planning.direct_parts import needs_cut
from pipeline.planning.job import SCRATCH_STAGES
from pipeline.planning.memory import scratch_window
from pipeline.planning.phases import Phase, Store, group_blocks
from pipeline.planning.rank_parts import aligned_chunks, rank_chunk_bytes
from pipeline.sinks.remote import RemoteArray, RemoteGroup
from pipeline.sinks.scratch import ScratchArray, ScratchGroup, scratch_id
from pipeline.tensor.arrays import BlockArray
from pipeline.tensor.names import TensorName, split_name
from pipeline.tensor.placement import NOWHERE, FixedPlacements, Placement, RankTensor, whole
from pipeline.tensor.remote_path import RemotePath
from pipeline.tensor.tensors import TensorMap

if TYPE_CHECKING:
    from pipeline.planning.opening import OpenedSource

Group = ScratchGroup | RemoteGroup
ALWAYS = ("read", "rename")  # the stages that every group passes, whether or not they do anything there
ReadBack = Callable[[str, Mapping[str, Any]], Mapping[str, BlockArray]]


class Cuts:
    """The cuts of one plan as it is composed: each adds a phase that stores to Zarr, and gives back a map that reads it.

    `identity`: what the tensors' values depend on, beside the source. `read_back` makes Dask arrays of scratch arrays, one chunk a
    chunk.
    """

    def __init__(self, opened: OpenedSource, identity: Sequence[Any], block_bytes: int, read_back: ReadBack) -> None:
        job, source, workers = opened.job, opened.source, opened.workers
        # Workers elsewhere cannot read what is in the memory of this process: it goes to scratch first.
        self.carried = source.in_memory and job.elsewhere
        # Outputs that cannot be written at offsets are assembled of whole rank tensors.
        self.assembled = any(isinstance(target.output_dir, RemotePath) for target in job.targets)
        # Nor can those that do not see the outputs' directories write there.
        self.apart = workers.apart
        forced = {"read": self.carried, "shard": self.apart}
        asked = {*job.cuts, *(stage for stage, needed in forced.items() if needed)}
        self.stages = tuple(stage for stage in SCRATCH_STAGES if stage in asked)
        self.why_assembled = "it was asked for" if "shard" in job.cuts else ""  # of chunks, and not of the source
        self.directories = [target.output_dir for target in job.targets]
        self.root = job.scratch_root
        self.remote = "://" in self.root
        # Workers that have scratch in a bucket in common, and perhaps nothing else, leave rank files to this process.
        asked_here = job.elsewhere and self.remote and "shard" in self.stages and not self.assembled
        self.assembled_here = self.apart or asked_here
        self.source, self.matches = source, opened.matches
        self.identity, self.block_bytes, self.read_back = identity, block_bytes, read_back
        self.keep, self.outputs = job.keep_scratch, tuple(map(str, job.scratch_outputs))
        self.window = scratch_window(max(job.threads, workers.threads)) + 2  # blocks, and those being written and read
        self.phases: list[Phase] = []
        self.groups: list[Group] = []

    def cut(self, stage: str, tensors: TensorMap) -> TensorMap:
        """The tensors as they are, or, where the job names `stage`, as they are read back from scratch after it."""
        if stage not in self.stages:
            return tensors
        # Names that share an array (ties) are stored once and share what is read back.
        first: dict[BlockArray, TensorName] = {}
        for name, array in tensors.items():
            first.setdefault(array, name)
        shapes = {(0, str(name)): (tensors[name].shape, tensors[name].chunksize, tensors[name].dtype) for name in first.values()}
        group = self._group(stage, shapes)
        stores = tuple(self._store(name, tensors) for name in first.values())
        self._add(stage, stores, (group,), before=stage)
        back = self.read_back(stage, {name: array for (_, name), array in group.arrays.items()})
        return {name: back[str(first[array])] for name, array in tensors.items()}

    def cut_ranks(
        self, stores: tuple[Store, ...], ranks: Sequence[Sequence[RankTensor]], dtypes: Mapping[str, np.dtype]
    ) -> tuple[Store, ...]:
        """The stores as they are, or, where the job cuts after `shard`, whole rank tensors read back from scratch.

        `ranks[t]` are the tensors of target t; each target has a group of its own.
        """
        if self.assembled and not self.why_assembled:
            earlier = "chunks of the cut before it are checked whole" if self.phases else ""
            self.why_assembled = earlier or needs_cut(stores, self.directories, bool(self.source.url))
        if "shard" not in self.stages and not self.why_assembled:
            return stores
        groups, again = [], []
        written = _written(stores)
        for number, tensors in enumerate(ranks):
            stored = {(tensor.rank, tensor.name): tensor.stored or (tensor.shape, tensor.dtype) for tensor in tensors}
            assembled = isinstance(self.directories[number], RemotePath)
            shapes = {key: self._rank_shape(shape, dtypes[dtype], assembled) for key, (shape, dtype) in stored.items()}
            if self.remote:  # chunks are put whole: none is of two blocks
                chunks = aligned_chunks(stores, number, {key: shape for key, (shape, _) in stored.items()})
                shapes = {key: (shape, chunks.get(key, chunk), dtype) for key, (shape, chunk, dtype) in shapes.items()}
            group = self._group(f"shard{number}", shapes)
            groups.append(group)
            back = self.read_back(f"shard{number}", {f"rank{rank}/{name}": array for (rank, name), array in group.arrays.items()})
            for rank, name in group.arrays:
                array = back[f"rank{rank}/{name}"]
                filled = whole(array.shape)
                if array.shape:
                    filled = ((0, written.get((number, rank, name), 0)), *filled[1:])
                rest = ((filled[0][1], array.shape[0]), *filled[1:]) if array.shape else ()
                padding = (Placement(rank, name, None, rest),) if filled != whole(array.shape) else ()
                place = FixedPlacements((Placement(rank, name, filled, filled), *padding))
                placements = tuple(place if other == number else NOWHERE for other in range(len(ranks)))
                again.append(Store(name, (array,) * len(ranks), placements, array.dtype.itemsize, 1, int(array.nbytes)))
        self._add("shard", stores, tuple(groups), before="shard")
        return tuple(again)

    def notes(self) -> tuple[str, ...]:
        """Where rank files are written, where that is not on the workers."""
        why = "some workers do not see their place" if self.apart else "no worker needs to see their place"
        here = f"rank files are written by this process, from the scratch after shard that the workers write: {why}"
        return (here,) if self.assembled_here else ()

    def reasons(self) -> dict[str, str]:
        """For each stage, whether tensors are cut after it, why, and what it costs or would cost."""
        chosen = {phase.name.rpartition(" ")[2]: phase.written_bytes(range(len(phase.sinks))) for phase in self.phases}
        result = {}
        for stage in SCRATCH_STAGES:
            if stage == "read" and self.carried:
                result[stage] = (
                    f"cut: {chosen[stage]:,} bytes written, as the model is in this process and the workers are elsewhere"
                )
            elif stage == "shard" and self.assembled and stage in chosen:
                why = f"as object storage takes files in order, and {self.why_assembled}"
                result[stage] = f"cut: {chosen[stage]:,} bytes written and read again, {why}"
            elif stage == "shard" and self.assembled:
                result[stage] = "no cut: each part of a rank file is made of the source's rows at once"
            elif stage == "shard" and self.apart:
                result[stage] = f"cut: {chosen[stage]:,} bytes written and read again, as workers do not see the outputs' place"
            elif stage in chosen:
                result[stage] = f"cut, as asked: {chosen[stage]:,} bytes written and read again (not needed: {_UNNEEDED[stage]})"
            else:
                result[stage] = f"no cut: {_UNNEEDED[stage]}"
        return result

    def _rank_shape(
        self, shape: tuple[int, ...], dtype: np.dtype, assembled: bool
    ) -> tuple[tuple[int, ...], tuple[int, ...], np.dtype]:
        row_bytes = max(math.prod(shape[1:]) * dtype.itemsize, 1)
        most = rank_chunk_bytes(self.block_bytes, self.remote) if assembled else self.block_bytes
        rows = min(max(most // row_bytes, 1), max(shape[0], 1))
        return shape, (rows, *shape[1:]), dtype

    def _group(self, stage: str, shapes: Mapping[tuple[int, str], tuple[Any, Any, Any]]) -> Group:
        listed = sorted((rank, name, shape, chunks, str(dtype)) for (rank, name), (shape, chunks, dtype) in shapes.items())
        key = scratch_id(stage, [earlier.stage for earlier in self.groups], self.identity, listed)
        place = self.source.location
        last = self.source.url.rpartition("/")[2] or (place.name if place.is_dir() else place.stem)
        name = f"{last}-{stage}-{key}.zarr"
        if self.remote:
            url = f"{self.root}/{name}"
            remote = {
                (rank, tensor): RemoteArray(
                    f"{url}/{_folder(stage, rank)}{tensor}", tuple(shape), tuple(chunks), np.dtype(dtype), self._origin(tensor)
                )
                for (rank, tensor), (shape, chunks, dtype) in shapes.items()
            }
            return RemoteGroup(url, stage, key, self.source.place, self.keep, remote, self.outputs)
        directory = Path(self.root) / name
        arrays = {}
        for (rank, name), (shape, chunks, dtype) in shapes.items():
            folder = directory / f"{_folder(stage, rank)}{name}"
            arrays[rank, name] = ScratchArray(folder, tuple(shape), tuple(chunks), np.dtype(dtype), self._origin(name))
        # Parts of a file are of its order, not the source's; and of what this process reads or writes alone, all is there at once.
        at_once = self.assembled or self.assembled_here or (self.carried and stage == "read")
        bound = sum(array.nbytes for array in arrays.values()) if at_once else self.window * self.block_bytes
        return ScratchGroup(directory, stage, key, self.source.place, self.keep, arrays, bound, self.outputs)

    def _origin(self, tensor: str) -> str:
        """The source tensor that a scratch array comes from."""
        return str(self.matches.origin(split_name(tensor)))

    def _store(self, name: TensorName, tensors: TensorMap) -> Store:
        array = tensors[name]
        nbytes = int(array.nbytes) if self.phases else self.matches.source_bytes(name, self.source.named)
        region = whole(array.shape)
        placements = FixedPlacements((Placement(0, str(name), region, region),))
        return Store(name, (array,), (placements,), max(array.dtype.itemsize, 4), 1, nbytes)

    def passes(self, before: str = "write") -> tuple[str, ...]:
        """The stages that every group passes since the last cut, up to the cut after the stage `before`, or the writing."""
        done = [stage for phase in self.phases for stage in phase.passes]
        upto = ALWAYS[: ALWAYS.index(before) + 1] if before in ALWAYS else ALWAYS
        return tuple(stage for stage in upto if stage not in done)

    def _add(self, stage: str, stores: tuple[Store, ...], sinks: tuple[Group, ...], before: str) -> None:
        self.groups += sinks
        here = self.carried and stage == "read"
        groups = group_blocks(stores, self.block_bytes)
        self.phases.append(Phase(f"scratch after {stage}", stores, sinks, groups, self.passes(before), here))


def _folder(stage: str, rank: int) -> str:
    """The part of an array's path, in its group, before its name: a rank's, after the split."""
    return f"rank{rank}/" if stage.startswith("shard") else ""


def _written(stores: Sequence[Store]) -> dict[tuple[int, int, str], int]:
    """How many rows of rank tensors blocks fill, by target, rank and name; below them is padding, which is zeros."""
    result: dict[tuple[int, int, str], int] = {}
    for store in stores:
        for number in range(len(store.arrays)):
            for placement in store.placed(number):
                if placement.source is not None and placement.target:
                    key = number, placement.rank, placement.tensor
                    result[key] = max(result.get(key, 0), placement.target[0][1])
    return result


_UNNEEDED = {
    "read": "the source is local and can be mapped",
    "rename": "renaming costs nothing",
    "unpack": "all targets of a job share each task, so that nothing is unpacked twice",
    "shard": "the outputs can be written at offsets",
}
