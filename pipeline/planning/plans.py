"""Plan, Target: what a conversion will do, as frozen data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pipeline.errors import Problem
from pipeline.model.model_config import ModelConfig
from pipeline.model.tables import Family
from pipeline.planning.bind import Inputs, all_inputs
from pipeline.planning.build_steps import BuildStep, build_steps
from pipeline.planning.calibrating import Calibrating
from pipeline.planning.dask_graph import whole_graph
from pipeline.planning.engine_options import EngineRequest, job_requests
from pipeline.planning.graph import PlanGraph, collapse
from pipeline.planning.graph_nodes import GraphNode
from pipeline.planning.job import Job
from pipeline.planning.memory import Budget
from pipeline.planning.opening import OpenedSource
from pipeline.planning.phases import Phase
from pipeline.planning.target_options import TargetOptions
from pipeline.printed import InOneLine, many
from pipeline.sinks.output import Output
from pipeline.sinks.output_checks import check_held, check_space, check_taken, free_bytes
from pipeline.sinks.remote import RemoteGroup
from pipeline.sinks.scratch import ScratchGroup
from pipeline.tensor.tensors import Source
from pipeline.tensor.units import human_bytes

if TYPE_CHECKING:
    from dask.highlevelgraph import HighLevelGraph


@dataclass(frozen=True)
class Target:
    """One output of a plan: what was asked, the dtype that it came to, and its directory."""

    options: TargetOptions
    dtype: str
    output: Output


@dataclass(frozen=True, repr=False)
class Plan(InOneLine):
    """Everything that `convert` will do. Made by `pipeline.planning.make_plan.make_plan`; nothing in it changes.

    `packed`: some of the source's modules are unpacked. `calibrating`: what is measured in the same run. `opened`:
    its source as it was opened, to plan it again.
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
    left_out: Mapping[str, str]
    notes: tuple[str, ...] = ()
    packed: bool = False
    calibrating: Calibrating | None = None
    opened: OpenedSource | None = None

    def _line(self) -> str:
        names = ", ".join(target.output.directory.name for target in self.targets)
        size = human_bytes(sum(target.output.size_bytes for target in self.targets))
        return f"{self.source.place} to {names}: {size} in {many(self.tasks, 'task')}, at most {self._peak} of memory"

    def _rows(self) -> list[tuple[str, str]]:
        source = f"{self.source.kind}, {self.family.name}, {human_bytes(self.source.nbytes)}"
        return [
            ("source", f"{self.source.place} ({source})"),
            *(("output", _target_line(target)) for target in self.targets),
            ("reads", human_bytes(self.bytes_read)),
            ("writes", human_bytes(self.bytes_written)),
            *(("scratch", f"after {cut.stage}: {human_bytes(cut.size_bytes)} in {cut.place}") for cut in self.scratch),
            ("tasks", f"{self.tasks} on {many(self.budget.workers, 'worker')}"),
            ("memory", f"at most {self._peak} of {human_bytes(self.budget.limit_bytes)}"),
            ("left out", many(len(self.left_out), "tensor") if self.left_out else ""),
            *(("note", note) for note in self.notes),
        ]

    @property
    def _peak(self) -> str:
        return human_bytes(self.budget.peak_bytes)

    @property
    def tasks(self) -> int:
        return sum(len(phase.groups) for phase in self.phases)

    def first_group(self, phase: int) -> int:
        """The number of a phase's first group: groups are numbered through all phases."""
        return sum(len(each.groups) for each in self.phases[:phase])

    @cached_property
    def bytes_read(self) -> int:
        """The bytes of the source that are read, each once, however often stages look at it."""
        return sum(self._inputs.source.values())

    @cached_property
    def scratch_bytes_read(self) -> int:
        """The bytes of scratch that are read back, each once."""
        return sum(self._inputs.scratch.values())

    @cached_property
    def bytes_written(self) -> int:
        """The bytes that tasks write into rank files: without the files' headers, and without padding, which is reserved."""
        return self.phases[-1].written_bytes(range(len(self.targets)))

    @cached_property
    def scratch_bytes_written(self) -> int:
        """The bytes that tasks write to scratch."""
        return sum(phase.written_bytes(range(len(phase.sinks))) for phase in self.phases[:-1])

    @cached_property
    def _inputs(self) -> Inputs:
        return all_inputs(self)

    @cached_property
    def id(self) -> str:
        """SHA-256 of the ids of all outputs: plans of equal ids write equal bytes."""
        return hashlib.sha256("".join(target.output.id for target in self.targets).encode()).hexdigest()

    @property
    def up_to_date(self) -> bool:
        """Whether every output directory already holds what this plan would write."""
        return all(target.output.complete for target in self.targets)

    def graph(self) -> PlanGraph:
        """The plan's graph as people look at it: a node for each stage with all its tasks, and for each place of bytes."""
        source, whole = self.source, not self.job.overwrite
        what = f"{self.family.name}, {source.dtype or ('packed' if self.packed else 'no type named')}"
        origin = GraphNode("source", "source", source.place.rstrip("/").rpartition("/")[2], 0, source.nbytes, source.place, what)
        outputs = [
            GraphNode(
                f"output.{n}",
                "output",
                target.output.directory.name,
                0,
                target.output.size_bytes,
                str(target.output.directory),
                f"{target.dtype}, {len(target.output.files)} rank{'' if len(target.output.files) == 1 else 's'}",
                whole and target.output.complete,
            )
            for n, target in enumerate(self.targets)
        ]
        engines = [
            (of, GraphNode(f"engine.{n}", "engine", each.engine.name, place=str(each.engine), detail="engine"))
            for n, (of, each) in enumerate(self._engines)
        ]
        layers = self.calibrating.layers if self.calibrating else 0
        return collapse(self, origin, outputs, engines, len(self.builds), layers)

    @property
    def _engines(self) -> list[tuple[int, EngineRequest]]:
        """The engines that the job asks for, each with the number of its target."""
        numbers = {target.output.directory: n for n, target in enumerate(self.targets)}
        return [(numbers[each.checkpoint], each) for each in job_requests(self.job.targets, self.job.engine)]

    @property
    def builds(self) -> tuple[BuildStep, ...]:
        """The steps that build the engines, where no builder has been asked yet."""
        return tuple(step for of, request in self._engines for step in build_steps(request, of, request.ranks))

    @property
    def dask(self) -> HighLevelGraph:
        """The Dask graph of all that the plan does, a layer a stage: what runs where nothing has been done before.

        It is there to be looked at: `plan.dask.visualize("layers.svg")`, or with every task `dask.base.visualize_dsk(plan.dask)`.
        Computing it does not convert: `convert` begins the outputs first.
        """
        layers = self.calibrating.calls() if self.calibrating else ()
        return whole_graph(self, [target.output for target in self.targets], self.builds, layers).highlevel()

    def obstacles(self) -> list[Problem]:
        """The reasons why `convert` could not start now: another conversion in the way, a disk without room, unfit ranges."""
        outputs = [target.output for target in self.targets]
        sinks = [sink for phase in self.phases for sink in phase.sinks if not sink.complete]
        needs = {sink.directory: sink.local_bytes for sink in sinks if sink.local_bytes}
        unfit: list[Problem] = []
        if self.calibrating and not (self.up_to_date and not self.job.overwrite):
            unfit, activations = self.calibrating.unfit(), self.calibrating.plan.activations
            if activations.layers_done < self.calibrating.layers:
                needs[activations.directory] = activations.nbytes
        return check_taken(outputs, self.job.overwrite) or check_held(outputs) or check_space(needs) or unfit

    def summary(self) -> dict[str, Any]:
        """The plan as plain values, as `headrace plan --json` prints it."""
        source, model = self.source, self.model
        return {
            "source": {
                "path": source.place,
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
                {
                    "stage": cut.stage,
                    "path": cut.place,
                    "bytes": phase.written_bytes((number,)),
                    "disk_bytes": cut.size_bytes,
                    "reused": cut.complete,
                }
                for phase in self.phases[:-1]
                for number, cut in enumerate(phase.sinks)
                if isinstance(cut, ScratchGroup | RemoteGroup)
            ],
            "scratch_reasons": dict(self.scratch_reasons),
            **({"calibration": self.calibrating.summary()} if self.calibrating else {}),
            "tasks": self.tasks,
            "workers": self.budget.workers,
            "block_bytes": self.block_bytes,
            "piece_bytes": self.budget.piece_bytes,
            "peak_memory_bytes": self.budget.peak_bytes,
            "memory_limit_bytes": self.budget.limit_bytes,
            "bytes_read": self.bytes_read,
            "scratch_bytes_read": self.scratch_bytes_read,
            "bytes_written": self.bytes_written,
            "scratch_bytes_written": self.scratch_bytes_written,
            "scheduler": self.job.scheduler,
            "plan_id": self.id,
            "obstacles": [str(problem) for problem in self.obstacles()],
        }


def _target_line(target: Target) -> str:
    """An output in a line."""
    output, parallel = target.output, target.options.parallelism
    shape = f"TP {parallel.tp_size} x PP {parallel.pp_size}" if parallel.pp_size > 1 else f"TP {parallel.tp_size}"
    return f"{output.directory} ({target.dtype}, {shape}, {human_bytes(output.size_bytes)})"


def _target_summary(target: Target, overwrite: bool) -> dict[str, Any]:
    output = target.output
    return {
        "path": str(output.directory),
        "id": output.id,
        "dtype": target.dtype,
        "mapping": target.options.parallelism.mapping(),
        "ranks": [{"file": file.path.name, "bytes": file.size_bytes, "tensors": len(file.tensors)} for file in output.files],
        "bytes": output.size_bytes,
        "config": json.loads(output.config),
        "free_bytes_there": free_bytes(output.directory),
        "up_to_date": output.complete and not overwrite,
    }
