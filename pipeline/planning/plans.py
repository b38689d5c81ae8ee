"""Plan, Phase, Store, Target: what a conversion will do, as frozen data."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.errors import Problem
from pipeline.model.model_config import ModelConfig
from pipeline.model.tables import Family
from pipeline.planning.job import Job, TargetOptions
from pipeline.planning.memory import Budget
from pipeline.sinks.journal import Journal
from pipeline.sinks.output import Output
from pipeline.sinks.output_checks import check_space, check_taken, free_bytes
from pipeline.sinks.remote import RemoteGroup
from pipeline.sinks.scratch import ScratchGroup
from pipeline.tensor.placement import Located, Placement, Region, chunk_region, size
from pipeline.tensor.tensors import Source

if TYPE_CHECKING:
    import dask.array as da

VERSION = metadata.version("headrace")


class Sink(Protocol):
    """Where a phase's tensors go: an output directory or a scratch group."""

    @property
    def complete(self) -> bool: ...
    @property
    def directory(self) -> Path: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def local_bytes(self) -> int: ...
    def locate(self, rank: int, tensor: str, region: Region) -> Iterator[Located]: ...
    def begin(self, tasks: int, fresh: bool) -> Journal: ...
    def abandon(self, journal: Journal, created: Path | None) -> None: ...


@dataclass(frozen=True)
class Target:
    """One output of a plan: what was asked, the dtype that it came to, and its directory."""

    options: TargetOptions
    dtype: str
    output: Output


@dataclass(frozen=True)
class Store:
    """One tensor on its way through a phase.

    `arrays[s]` is its Dask array as sink s wants it, `placements[s]` where its regions go there (for tied embeddings, to two
    tensors). `itemsize` is that of the widest form its values take on the way; rows are cut at multiples of `row_multiple`.
    """

    name: str
    arrays: tuple[da.Array, ...]
    placements: tuple[tuple[Placement, ...], ...]
    itemsize: int
    row_multiple: int
    source_bytes: int

    def block_bytes(self, index: Sequence[int]) -> int:
        """The bytes of the source that the block at a chunk index stands for."""
        array = self.arrays[0]
        elements = math.prod(axis[i] for axis, i in zip(array.chunks, index, strict=True))
        return int(self.source_bytes * elements // max(array.size, 1))

    def region(self, index: Sequence[int]) -> Region:
        """The region of the tensor that the block at a chunk index covers."""
        return chunk_region(self.arrays[0].chunks, index)

    def written_bytes(self, sink: int) -> int:
        """The bytes that tasks write to a sink; padding is reserved, not written."""
        itemsize = self.arrays[sink].dtype.itemsize
        return sum(size(placement.target) * itemsize for placement in self.placements[sink] if placement.source is not None)


Group = tuple[tuple[Store, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Phase:
    """Stores that can run in any order, and the groups of their blocks. Those of a later phase read the chunks that it writes.

    `passes`: the stages that each of its groups passes, whether or not they do anything there. `here`: its tasks run in this
    process, whatever the scheduler, as they read what is in its memory.
    """

    name: str
    stores: tuple[Store, ...]
    sinks: tuple[Sink, ...]
    groups: tuple[Group, ...] = field(repr=False)
    passes: tuple[str, ...] = ()
    here: bool = False

    @property
    def pending(self) -> tuple[int, ...]:
        """The numbers of the sinks that are not whole yet."""
        return tuple(number for number, sink in enumerate(self.sinks) if not sink.complete)

    def written_bytes(self, sinks: Sequence[int]) -> int:
        """The bytes that tasks write to some of the sinks."""
        return sum(store.written_bytes(sink) for store in self.stores for sink in sinks)


def group_blocks(stores: Sequence[Store], block_bytes: int) -> tuple[Group, ...]:
    """The tasks: blocks (store, chunk index) that together are about `block_bytes` of the source, in its order."""
    groups: list[Group] = []
    group: list[tuple[Store, tuple[int, ...]]] = []
    filled = 0
    for store in stores:
        for index in np.ndindex(*store.arrays[0].numblocks):
            nbytes = store.block_bytes(index)
            if group and filled + nbytes > block_bytes:
                groups.append(tuple(group))
                group, filled = [], 0
            group.append((store, index))
            filled += nbytes
    return (*groups, tuple(group)) if group else tuple(groups)


@dataclass(frozen=True)
class Plan:
    """Everything that `convert` will do. Made by `pipeline.planning.make_plan.make_plan`; nothing in it changes.

    `packed`: some of the source's modules are unpacked. `stage_of`: the stage that made each layer of the arrays.
    """

    job: Job
    source: Source
    family: Family
    model: ModelConfig
    targets: tuple[Target, ...]
    phases: tuple[Phase, ...]
    scratch: tuple[ScratchGroup | RemoteGroup, ...]
    scratch_reasons: Mapping[str, str]
    block_bytes: int
    budget: Budget
    left_out: Mapping[str, str] = field(repr=False)
    notes: tuple[str, ...] = ()
    packed: bool = False
    stage_of: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def tasks(self) -> int:
        return sum(len(phase.groups) for phase in self.phases)

    def first_group(self, phase: int) -> int:
        """The number of a phase's first group: groups are numbered through all phases."""
        return sum(len(each.groups) for each in self.phases[:phase])

    @cached_property
    def bytes_read(self) -> int:
        """Bytes read of the source and of scratch, each tensor once a phase."""
        return sum(store.source_bytes for phase in self.phases for store in phase.stores)

    @cached_property
    def bytes_written(self) -> int:
        """The total size of the rank files, headers included."""
        return sum(target.output.size_bytes for target in self.targets)

    @cached_property
    def id(self) -> str:
        """SHA-256 of the ids of all outputs: plans of equal ids write equal bytes."""
        return hashlib.sha256("".join(target.output.id for target in self.targets).encode()).hexdigest()

    @property
    def up_to_date(self) -> bool:
        """Whether every output directory already holds what this plan would write."""
        return all(target.output.complete for target in self.targets)

    def obstacles(self) -> list[Problem]:
        """The reasons why `convert` could not start now: another conversion in the way, or a disk without room."""
        outputs = [target.output for target in self.targets]
        sinks = [sink for phase in self.phases for sink in phase.sinks if not sink.complete]
        needs = {sink.directory: sink.local_bytes for sink in sinks if sink.local_bytes}
        return check_taken(outputs, self.job.overwrite) or check_space(needs)

    def summary(self) -> dict[str, Any]:
        """The plan as plain values, as `headrace plan --json` prints it."""
        source, model = self.source, self.model
        return {
            "source": {
                "path": str(source.location),
                "kind": source.kind,
                "family": self.family.name,
                "architecture": model.architecture,
                "dtype": source.dtype,
                "tensors": len(source.tensors),
                "bytes": source.nbytes,
                "left_out": dict(self.left_out),
            },
            "notes": list(self.notes),
            "targets": [_target_summary(target, self.job.overwrite) for target in self.targets],
            "phases": [{"name": phase.name, "tensors": len(phase.stores), "tasks": len(phase.groups)} for phase in self.phases],
            "scratch": [
                {"stage": cut.stage, "path": cut.place, "bytes": cut.size_bytes, "reused": cut.complete} for cut in self.scratch
            ],
            "scratch_reasons": dict(self.scratch_reasons),
            "tasks": self.tasks,
            "workers": self.budget.workers,
            "block_bytes": self.block_bytes,
            "piece_bytes": self.budget.piece_bytes,
            "peak_memory_bytes": self.budget.peak_bytes,
            "memory_limit_bytes": self.budget.limit_bytes,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "scheduler": self.job.scheduler,
            "plan_id": self.id,
            "obstacles": [str(problem) for problem in self.obstacles()],
        }


def _target_summary(target: Target, overwrite: bool) -> dict[str, Any]:
    output = target.output
    return {
        "path": str(output.directory),
        "id": output.id,
        "dtype": target.dtype,
        "mapping": target.options.parallelism.mapping(),
        "ranks": [{"file": file.path.name, "bytes": file.size_bytes, "tensors": len(file.tensors)} for file in output.files],
        "bytes": output.size_bytes,
        "free_bytes_there": free_bytes(output.directory),
        "up_to_date": output.complete and not overwrite,
    }
