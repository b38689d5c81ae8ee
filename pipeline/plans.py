"""Plan, Phase, Store, Target: what a conversion will do, as frozen data."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import Problem
from pipeline.job import Job
from pipeline.memory import Budget
from pipeline.model_config import ModelConfig
from pipeline.output import Output, check_finished, check_space, free_bytes
from pipeline.parallelism import Parallelism
from pipeline.placement import Placement, Region, size
from pipeline.tables import Family
from pipeline.tensors import Source

if TYPE_CHECKING:
    import dask.array as da

VERSION = metadata.version("headrace")


@dataclass(frozen=True)
class Target:
    """One output of a plan: its parallel sizes, its dtype, and its directory."""

    parallelism: Parallelism
    dtype: str
    output: Output


@dataclass(frozen=True)
class Store:
    """One source tensor on its way.

    `arrays[t]` is its Dask array as target t wants it, `placements[t]` where its regions go there (for tied embeddings, to two
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
        total = int(array.size)
        return int(self.source_bytes * elements // max(total, 1))

    def region(self, index: Sequence[int]) -> Region:
        """The region of the tensor that the block at a chunk index covers."""
        chunks = self.arrays[0].chunks
        return tuple((sum(axis[:i]), sum(axis[: i + 1])) for axis, i in zip(chunks, index, strict=True))


Group = tuple[tuple[Store, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Phase:
    """Stores that can run in any order. A phase begins when the one before it has ended."""

    name: str
    stores: tuple[Store, ...]

    def groups(self, block_bytes: int) -> tuple[Group, ...]:
        """The tasks: blocks (store, chunk index) that together are about `block_bytes` of the source, in its order."""
        groups: list[Group] = []
        group: list[tuple[Store, tuple[int, ...]]] = []
        filled = 0
        for store in self.stores:
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
    """Everything that `convert` will do. Made by `pipeline.planning.make_plan`; nothing in it changes."""

    job: Job
    source: Source
    family: Family
    model: ModelConfig
    targets: tuple[Target, ...]
    phases: tuple[Phase, ...]
    groups: tuple[Group, ...] = field(repr=False)
    block_bytes: int
    budget: Budget
    left_out: Mapping[str, str] = field(repr=False)

    @cached_property
    def id(self) -> str:
        """SHA-256 of the source's fingerprint, the options and the version: equal ids write equal bytes."""
        identity = {
            "version": VERSION,
            "options": self.job.options(),
            "source": [file.fingerprint() for file in self.source.files],
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @cached_property
    def bytes_read(self) -> int:
        """Bytes of the source's tensors that are converted; each is read once."""
        return sum(store.source_bytes for phase in self.phases for store in phase.stores)

    @cached_property
    def bytes_written(self) -> int:
        """The total size of the rank files, headers included."""
        return sum(target.output.size_bytes for target in self.targets)

    @cached_property
    def targets_bytes(self) -> int:
        """Bytes of tensors that the tasks write: the rank files less headers and padding."""
        return sum(
            size(placement.target) * array.dtype.itemsize
            for phase in self.phases
            for store in phase.stores
            for array, placements in zip(store.arrays, store.placements, strict=True)
            for placement in placements
            if placement.source is not None
        )

    @property
    def up_to_date(self) -> bool:
        """Whether every output directory already holds what this plan would write."""
        return all(target.output.up_to_date(self.id) for target in self.targets)

    def obstacles(self) -> list[Problem]:
        """What would keep `convert` from starting now: a finished conversion in the way, or a disk without room."""
        outputs = [target.output for target in self.targets]
        return check_finished(outputs, self.id, self.job.overwrite) or check_space(outputs)

    def summary(self) -> dict[str, Any]:
        """What `headrace plan --json` prints."""
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
            "targets": [
                {
                    "path": str(target.output.directory),
                    "dtype": target.dtype,
                    "mapping": target.parallelism.mapping(),
                    "ranks": [
                        {"file": file.path.name, "bytes": file.size_bytes, "tensors": len(file.tensors)}
                        for file in target.output.files
                    ],
                    "bytes": target.output.size_bytes,
                    "free_bytes_there": free_bytes(target.output.directory),
                    "up_to_date": target.output.up_to_date(self.id),
                }
                for target in self.targets
            ],
            "phases": [{"name": phase.name, "tensors": len(phase.stores)} for phase in self.phases],
            "tasks": len(self.groups),
            "workers": self.budget.workers,
            "block_bytes": self.block_bytes,
            "piece_bytes": self.budget.piece_bytes,
            "peak_memory_bytes": self.budget.peak_bytes,
            "memory_limit_bytes": self.budget.limit_bytes,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "scheduler": self.job.scheduler,
            "obstacles": [str(problem) for problem in self.obstacles()],
            "plan_id": self.id,
        }

    def provenance(self, timings: Mapping[str, Any]) -> dict[str, Any]:
        """What headrace.json says: what was converted, from what, how, and how long it took."""
        return {
            "headrace": VERSION,
            "plan_id": self.id,
            "source": {
                "path": str(self.source.location),
                "kind": self.source.kind,
                "files": [file.fingerprint() for file in self.source.files],
            },
            "options": self.job.options(),
            "left_out": dict(self.left_out),
            "timings": dict(timings),
        }
