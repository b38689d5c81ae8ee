"""The nodes of a run's graph: for each stage, its tasks, seconds and bytes so far, and the edges between stages.

Only the tasks `scratch`, `write`, `finish` and `build` give results. The stages before them pass on blocks that nothing has read,
and are done when the bytes of their group are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.planning.bind import BoundGroup
    from pipeline.planning.build_steps import BuildStep
    from stages.write import Written

SOURCE, CALIBRATE, SCRATCH, WRITE, FINISH, BUILD = "source", "calibrate", "scratch", "write", "finish", "build"
# Above so many tasks Dask's page draws no graph: our own cluster is told so. A page of 20,000 squares still moves.
GRAPH_MAX_ITEMS = 20_000
# Measured work that is part of another stage's task.
PART_OF = {"dequantize": "quantize", "rope": "rename"}


@dataclass(frozen=True)
class LiveNode:
    """A stage of a run: its tasks, and what they took so far. Seconds are summed over workers."""

    name: str
    tasks: int = 0
    done_tasks: int = 0
    nbytes: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class LiveEngine:
    """An engine of a run: the tasks that build it. `failed`: there will be none."""

    name: str
    tasks: int = 1
    done_tasks: int = 0
    failed: bool = False


class StageProgress:
    """Adds up the nodes of one run from the results of its tasks. Not locked: its owner is."""

    def __init__(
        self, groups: Iterable[BoundGroup] = (), outputs: int = 0, builds: Sequence[BuildStep] = (), layers: int = 0
    ) -> None:
        """`groups`: those that the run does. `outputs`: how many directories it makes whole. `builds`: of engines.

        `layers`: how many it calibrates.
        """
        from pipeline.planning.bind import STAGES  # with numpy, which the command line's help does without

        self._passed: dict[int, tuple[str, ...]] = {}
        self._tasks: dict[str, int] = {}
        self._done: dict[str, int] = {}
        self._totals: dict[tuple[str, str], float] = {}
        before: dict[str, None] = {}  # the stages of groups that end in scratch come before it
        edges: dict[tuple[str, str], None] = {}
        for group in groups:
            stages = tuple(stage for stage, _ in group.stages)
            passed = (*stages, WRITE if group.is_last else SCRATCH)
            self._passed[group.number] = passed
            for stage in passed:
                self._tasks[stage] = self._tasks.get(stage, 0) + 1
            if not group.is_last:
                before |= dict.fromkeys(stages)
            edges |= dict.fromkeys(pairwise(passed))
            if stages[:1] == ("read",):
                edges[SOURCE, "read"] = None
            if layers and group.inputs.layer >= 0:
                edges[CALIBRATE, "quantize" if "quantize" in stages else passed[-1]] = None
            for opener in set(group.openers.values()):
                edges[SCRATCH, opener or passed[-1]] = None
        if layers:
            self._tasks[CALIBRATE] = layers
            edges[SOURCE, CALIBRATE] = None
        if outputs:
            self._tasks[FINISH] = outputs
            edges[WRITE, FINISH] = None
        if builds:
            self._tasks[BUILD] = len(builds)
            if any(step.output is not None for step in builds):
                edges[FINISH, BUILD] = None
        self._engine_of = {step.call.name: step.engine.name for step in builds}
        self._engines: dict[str, LiveEngine] = {}
        for name in self._engine_of.values():
            self._engines[name] = LiveEngine(name, self._engines[name].tasks + 1 if name in self._engines else 1)
        first = [stage for stage in STAGES if stage in before]
        after = [stage for stage in STAGES if stage in self._tasks and stage not in before]
        self._order = [stage for stage in (CALIBRATE, *first, SCRATCH, *after, WRITE, FINISH, BUILD) if stage in self._tasks]
        self.edges = tuple(edges)

    @property
    def graph_tasks(self) -> int:
        """All tasks of the run's graph."""
        return sum(self._tasks.values())

    def advanced(self, written: Written) -> None:
        """Take in the result of a group's last task."""
        passed = self._passed.get(written.number, ())
        for stage in passed:
            self._done[stage] = self._done.get(stage, 0) + 1
        for (measured, unit), value in written.metrics.items():
            stage = PART_OF.get(measured, measured)
            if stage in (WRITE, "write_scratch") and passed:
                stage = passed[-1]
            elif stage not in passed:  # as what is read of scratch
                continue
            self._totals[stage, unit] = self._totals.get((stage, unit), 0.0) + value

    def calibrated(self, metrics: Mapping[tuple[str, str], float]) -> None:
        """Take in what the calibration of a layer took."""
        self._done[CALIBRATE] = self._done.get(CALIBRATE, 0) + 1
        for unit in ("seconds", "bytes"):
            self._totals[CALIBRATE, unit] = self._totals.get((CALIBRATE, unit), 0.0) + metrics.get((CALIBRATE, unit), 0.0)

    def whole(self) -> None:
        """Note that one more output is whole."""
        self._done[FINISH] = self._done.get(FINISH, 0) + 1

    def built(self, name: str, seconds: float, failed: bool) -> None:
        """Note that the build of this name has ended."""
        self._done[BUILD] = self._done.get(BUILD, 0) + 1
        self._totals[BUILD, "seconds"] = self._totals.get((BUILD, "seconds"), 0.0) + seconds
        engine = self._engines[self._engine_of[name]]
        self._engines[engine.name] = replace(engine, done_tasks=engine.done_tasks + 1, failed=engine.failed or failed)

    def engines(self) -> tuple[LiveEngine, ...]:
        """The engines, as far as they are."""
        return tuple(self._engines.values())

    def nodes(self) -> tuple[LiveNode, ...]:
        """The stages in their order of work."""
        return tuple(
            LiveNode(
                stage,
                self._tasks[stage],
                self._done.get(stage, 0),
                self._totals.get((stage, "bytes"), 0.0),
                self._totals.get((stage, "seconds"), 0.0),
            )
            for stage in self._order
        )
