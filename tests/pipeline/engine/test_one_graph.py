"""Conversions and builds in one graph: what depends on what, what runs beside what, and what a failure leaves."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from distributed import SchedulerPlugin

import stages.write
from pipeline import plan
from pipeline.engine.engines import Engines
from pipeline.engine.log import BuildLog
from pipeline.engine.requests import plan_requests
from pipeline.errors import BadInput, Problem
from pipeline.planning import dask_graph
from pipeline.planning.bind import bind
from pipeline.planning.plans import Plan
from pipeline.run import execute as running
from pipeline.run.cluster import in_process_cluster
from pipeline.run.left_to_do import LeftToDo
from pipeline.run.schedulers import Session, run_distributed
from pipeline.watching.state import RunWatch
from tests.support import checkpoints
from tests.support.builds import alive, names, start
from tests.support.commands import headrace
from tests.support.examples import by_night

pytestmark = pytest.mark.usefixtures("on_path")

ONE = "[[target]]\noutput_dir = 'one'\n"
TWO = f"{ONE}[[target]]\noutput_dir = 'two'\ntp_size = 2\n"
SCHEDULERS = ["local", "threads", "synchronous"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    return tmp_path


def file(folder: Path, scheduler: str, targets: str = TWO, table: str = "[engine]\n") -> Path:
    (folder / "job.toml").write_text(f"model_dir = 'model'\nscheduler = '{scheduler}'\nworkers = 2\n{table}{targets}")
    return folder / "job.toml"


def planned(folder: Path, **options: Any) -> Plan:
    return plan(file(folder, "local"), **options)


def whole(folder: Path, *outputs: str) -> bool:
    """Whether these outputs are there, and neither a journal nor anything else under construction."""
    held = [names(folder / name) for name in outputs]
    return all("config.json" in each and not any(name.endswith(".partial") for name in each) for each in held)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[dask_graph.StageGraph]:
    """The graphs that runs make."""
    made: list[dask_graph.StageGraph] = []

    def keep(*arguments: Any, **more: Any) -> dask_graph.StageGraph:
        made.append(dask_graph.stage_graph(*arguments, **more))
        return made[-1]

    monkeypatch.setattr(running, "stage_graph", keep)
    return made


class Seen(SchedulerPlugin):
    """The tasks of a scheduler: what each waits for, and the resources that it takes."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.waits: dict[Any, set[Any]] = {}
        self.takes: dict[Any, Mapping[str, float]] = {}

    def update_graph(self, scheduler: Any, **_: Any) -> None:
        for key, task in scheduler.tasks.items():
            self.waits[key] = {dependency.key for dependency in task.dependencies}
            self.takes[key] = dict(task.resource_restrictions or {})


@pytest.mark.parametrize("after", ["none", "rename"])
def test_a_scheduler_sees_each_build_behind_its_own_checkpoint(folder: Path, after: str) -> None:
    made = planned(folder, scratch_after=after)
    engines, watch = Engines(plan_requests(made), BuildLog(quiet=True), "local"), RunWatch()
    engines.prepare()
    with in_process_cluster(2, {"GPU": 1}) as client:
        seen = Seen(client.cluster.scheduler)
        client.cluster.scheduler.add_plugin(seen)
        session = Session(lambda graph: run_distributed(client, graph), "", client)
        result = running.execute(made, session=session, watch=watch, builds=engines)
    assert [built.directory.name for built in result.engines] == ["one-engine", "two-engine"]
    builds = {key: waits for key, waits in seen.waits.items() if key[0] == "build"}
    assert {key[1].rpartition(" ")[0]: waits for key, waits in builds.items()} == {
        "one-engine": {("finish", 0)},
        "two-engine": {("finish", 1)},
    }
    assert {key[0] for key, takes in seen.takes.items() if takes} == {"build"}
    assert all(seen.takes[key] == {"GPU": 1} for key in builds)
    # As the plan has said, and as a page shows it.
    assert {name for name, befores in made.dask.dependencies.items() if "finish" in befores} == {"build"}
    assert len(made.dask.layers["build"]) == len(made.builds) == 2
    now = watch.snapshot()
    assert now.nodes[-1].name == "build"
    assert (now.nodes[-1].tasks, now.nodes[-1].done_tasks, now.state) == (2, 2, "done")
    assert now.nodes[-1].seconds >= max(built.seconds for built in result.engines)
    assert [(engine.name, engine.done_tasks, engine.failed) for engine in now.engines] == [
        ("one-engine", 1, False),
        ("two-engine", 1, False),
    ]


def test_ranks_that_are_built_through_python_are_tasks_of_the_plan(folder: Path) -> None:
    made = plan(file(folder, "local", table="[engine]\nbuilder = 'python'\n"))
    assert [step.call.rank for step in made.builds] == [0, 0, 1]
    waits = {key: set(task.dependencies) for key, task in made.dask.layers["build"].items()}
    assert waits == {
        ("build", "one-engine rank 0"): {("finish", 0)},
        ("build", "two-engine rank 0"): {("finish", 1)},
        ("build", "two-engine rank 1"): {("finish", 1)},
    }
    assert made.graph().line().endswith("finish 2 -> one, two -> build 3 -> engine one-engine, engine two-engine")


def test_an_output_is_whole_when_the_tasks_that_write_to_it_have_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.planning.make_plan.block_bytes", lambda _: 20_000)
    made = planned(folder)
    first, *rest = (bind(made, 0, index, (0, 1)) for index in range(made.tasks))
    alone = replace(first, work=tuple(replace(item, deliveries=((), item.deliveries[1])) for item in first.work))
    finishes = [dask_graph.Finish(n, n, target.output, (), 0.0) for n, target in enumerate(made.targets)]
    graph = dask_graph.stage_graph([alone, *rest], finishes)
    waits = [graph.tasks["finish", n].dependencies for n in (0, 1)]
    assert waits[1] - waits[0] == {("write", first.number)}
    assert len(waits[0]) == made.tasks - 1 > 0


@pytest.mark.parametrize("scheduler", ["local", "threads"])
def test_an_engine_is_begun_while_another_output_is_converted(
    folder: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert headrace("convert", file(folder, scheduler, ONE, "")).code == 0
    write, waited = stages.write._write_all, []

    def held(*arguments: Any) -> None:
        """Write nothing of `two` before `one` has its engine, which is given a minute."""
        deadline = time.monotonic() + 60
        while not (folder / "one-engine").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        waited.append((folder / "one-engine").exists())
        write(*arguments)

    monkeypatch.setattr(stages.write, "_write_all", held)
    ran = headrace("convert", file(folder, scheduler))
    assert ran.code == 0, ran
    assert all(waited)
    assert len(waited) > 1
    assert {"one-engine", "two-engine"} < names(folder)


def test_a_builder_takes_no_thread_of_the_conversions(folder: Path, on_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one thread for all: the builder of `one` waits, for a minute, until `two` is converted."""
    assert headrace("convert", file(folder, "local", ONE, "")).code == 0
    there, real = f"test -e {folder}/two/config.json", f'exec {on_path}/trtllm-build "$@"'
    wait = f"for n in $(seq 600); do {there} && break; sleep 0.1; done; {there} && {real}"
    (folder / "bin").mkdir()
    (folder / "bin" / "trtllm-build").write_text(f'#!/bin/sh\ncase "$*" in *one*) {wait};; *) {real};; esac\n')
    (folder / "bin" / "trtllm-build").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=os.pathsep)
    ran = headrace("convert", file(folder, "local"), "--workers", 1)
    assert ran.code == 0, ran
    assert {"one-engine", "two-engine"} < names(folder)


def test_engines_are_built_one_after_another_however_many_gpus_there_are(
    folder: Path, on_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each builder would begin with the first GPU."""
    monkeypatch.setattr("pipeline.engine.run.gpus", lambda: 8)
    real = f"{on_path}/trtllm-build"
    alone = f'mkdir {folder}/busy || exit 7; sleep 0.5; {real} "$@"; code=$?; rmdir {folder}/busy; exit $code'
    (folder / "bin").mkdir()
    (folder / "bin" / "trtllm-build").write_text(f'#!/bin/sh\ncase "$*" in *--help*) exec {real} "$@";; esac\n{alone}\n')
    (folder / "bin" / "trtllm-build").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=os.pathsep)
    ran = headrace("convert", file(folder, "local"))
    assert ran.code == 0, ran


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_builder_that_fails_fails_no_conversion_and_a_second_run_builds_alone(
    folder: Path, scheduler: str, graphs: list[dask_graph.StageGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_TROUBLE", "fail")
    ran = headrace("convert", file(folder, scheduler))
    assert ran.code == 4, ran
    assert whole(folder, "one", "two")
    assert ran.err.count("  [TRT] [E] Error Code 2: OutOfMemory (Requested size was 68719476736 bytes.)") == 2
    assert not {"one-engine", "two-engine", "one-engine.partial", "two-engine.partial"} & names(folder)
    assert list(graphs[-1].layers)[-2:] == ["finish", "build"]
    monkeypatch.delenv("STAND_IN_TROUBLE")
    ran = headrace("convert", file(folder, scheduler))
    assert ran.code == 0, ran
    assert {stage: len(tasks) for stage, tasks in graphs[-1].layers.items()} == {"build": 2}
    assert {"one-engine", "two-engine"} < names(folder)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_one_builder_s_failure_leaves_the_other_engine(folder: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_TROUBLE", "once")
    monkeypatch.setenv("STAND_IN_STATE", str(folder / "state"))
    ran = headrace("convert", file(folder, scheduler))
    assert ran.code == 4, ran
    assert whole(folder, "one", "two")
    assert len({"one-engine", "two-engine"} & names(folder)) == 1
    assert headrace("convert", file(folder, scheduler)).code == 0
    assert {"one-engine", "two-engine"} < names(folder)


# One that is killed leaves a builder that may take ten seconds to end.
@pytest.mark.parametrize("sent", by_night([signal.SIGKILL, signal.SIGINT], [signal.SIGINT]), ids=lambda sent: sent.name)
@pytest.mark.parametrize("scheduler", ["local", "threads"])
def test_a_run_that_ends_between_its_conversions_and_its_builds(
    folder: Path, scheduler: str, sent: signal.Signals, graphs: list[dask_graph.StageGraph]
) -> None:
    state = folder / "state"
    job = file(folder, scheduler, ONE, "scratch_after = ['rename']\n[engine]\n")
    running = start("convert", job, STAND_IN_TROUBLE="hang", STAND_IN_STATE=str(state))
    while not state.exists() or not state.read_text():
        assert running.poll() is None, running.communicate()
        time.sleep(0.02)
    # Nothing of the conversion waits for the build: neither its journal nor its scratch.
    while not whole(folder, "one") or (folder / ".headrace-scratch").exists():
        assert running.poll() is None, running.communicate()
        time.sleep(0.02)
    running.send_signal(sent)
    _, errors = running.communicate()
    if sent == signal.SIGINT:
        assert running.returncode == 3, errors
        assert f"interrupted; nothing is left of {folder}/one-engine: run the same command again" in errors
        assert "one-engine.partial" not in names(folder)
    while any(map(alive, json.loads(state.read_text()))):
        time.sleep(0.02)
    assert whole(folder, "one")
    ran = headrace("convert", job)
    assert ran.code == 0, ran
    assert {stage: len(tasks) for stage, tasks in graphs[-1].layers.items()} == {"build": 1}
    assert "rank0.engine" in names(folder / "one-engine")
    assert "one-engine.partial" not in names(folder)


def refused_when_one_is_whole(made: Plan) -> None:
    """A run whose first output is whole when values of the second turn out to be none that a target can hold."""
    left, first = LeftToDo(made), made.targets[0].output
    with ExitStack() as stack:
        left.begin(stack)
        for rank in first.files:
            rank.finish()
        for path in first.copies:
            (first.directory / path.name).write_bytes(path.read_bytes())
        (first.directory / "headrace.json").write_text(json.dumps({"id": first.id}))
        (first.directory / "config.json").write_text(first.config)
        left.whole(0).remove()
        raise BadInput([Problem("a tensor", "NaN", "numbers")])


def test_a_run_that_is_refused_late_takes_nothing_of_an_output_that_is_whole(folder: Path) -> None:
    with pytest.raises(BadInput):
        refused_when_one_is_whole(planned(folder))
    assert whole(folder, "one")
    assert "two" not in names(folder)
