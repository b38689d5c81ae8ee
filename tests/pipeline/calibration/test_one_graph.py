"""A conversion that calibrates: the bytes of a calibration by itself, in one graph that is drawn, watched and taken up again."""

from __future__ import annotations

import io
import json
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import pipeline.planning.make_plan as planning
from pipeline import BadInput, Interrupted, WriteFailed, convert, plan
from pipeline.calibration import layer_task
from pipeline.errors import Problem
from pipeline.run.execute import _Run, execute
from pipeline.run.foresee import done_tasks
from pipeline.sinks import output_checks
from pipeline.sinks.activations import Activations
from pipeline.sinks.journal import Journal
from pipeline.sinks.scratch import JOURNAL
from pipeline.watching import page
from pipeline.watching.layers import LayerProgress
from pipeline.watching.listener import Silent
from pipeline.watching.progress import ProgressLines
from pipeline.watching.state import RunWatch
from stages.calibrate.layers import LayeredModel
from tests.pipeline.run.test_workers import Start
from tests.pipeline.run.test_workers import cluster as cluster
from tests.support import checkpoints
from tests.support import quantized_checkpoints as source
from tests.support.commands import headrace
from tests.support.directories import contents

LAYERS = 3
CONFIG = {**source.LLAMA, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": LAYERS}
SMOOTH: dict[str, Any] = {"smoothquant": 0.5, "per_channel": True, "per_token": True, "dtype": "float16"}


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The options of a conversion in many groups."""
    monkeypatch.setattr(planning, "block_bytes", lambda *_: 60_000)
    checkpoints.save(tmp_path / "model", CONFIG, source.values(CONFIG))
    save_file({"input_ids": np.random.default_rng(0).integers(0, 96, (3, 12))}, tmp_path / "tokens")
    return {"model_dir": tmp_path / "model", **SMOOTH}


@pytest.fixture
def expected(made: dict[str, Any], tmp_path: Path) -> dict[str, bytes]:
    """The ranks of a calibration by itself."""
    ran = headrace("calibrate", made["model_dir"], "--output", tmp_path / "ranges", "--calibration_tokens", tmp_path / "tokens")
    assert ran.code == 0, ran
    convert(**made, output_dir=tmp_path / "expected", act_range=tmp_path / "ranges", scheduler="threads")
    return ranks(tmp_path / "expected")


def ranks(output: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(output).items() if name.startswith("rank") or name == "config.json"}


WAYS: dict[str, dict[str, Any]] = {
    "local": {},
    "threads": {"scheduler": "threads"},
    "synchronous": {"scheduler": "synchronous"},
    "cuts": {"scratch_after": "read,rename,unpack,shard"},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_bytes_are_those_of_a_calibration_by_itself(
    way: str, made: dict[str, Any], expected: dict[str, bytes], tmp_path: Path
) -> None:
    result = convert(**made, **WAYS[way], output_dir=tmp_path / "out", calibration_tokens=tmp_path / "tokens")
    assert ranks(tmp_path / "out") == expected
    assert result.stages["calibrate"]["seconds"] > 0
    assert not list((tmp_path / ".headrace-scratch").glob("*")), "scratch is removed"
    assert headrace("verify", tmp_path / "out", "--source", made["model_dir"]).code == 0
    assert convert(**made, output_dir=tmp_path / "out", calibration_tokens=tmp_path / "tokens").up_to_date


def test_workers_elsewhere_calibrate(made: dict[str, Any], expected: dict[str, bytes], tmp_path: Path, cluster: Start) -> None:
    convert(**made, output_dir=tmp_path / "out", calibration_tokens=tmp_path / "tokens", scheduler=cluster("true"))
    assert ranks(tmp_path / "out") == expected


@pytest.mark.parametrize("after", [(), ("read",), ("unpack",)], ids=str)
def test_what_reads_ranges_waits_for_its_own_layer(after: tuple[str, ...], made: dict[str, Any], tmp_path: Path) -> None:
    planned = plan(**made, output_dir=tmp_path / "out", calibration_tokens=tmp_path / "tokens", scratch_after=after)
    dask, graph = planned.dask, planned.graph()
    calibrate = dask.layers["calibrate"]
    assert [set(task.dependencies) for task in calibrate.values()] == [set(), {("calibrate", 0)}, {("calibrate", 1)}]
    waits: dict[int, set[int]] = {}
    for key, task in ((key, task) for name, layer in dask.layers.items() if name != "calibrate" for key, task in layer.items()):
        for name, layer in (each for each in task.dependencies if each[0] == "calibrate"):
            waits.setdefault(key[1], set()).add(layer)
            assert key[0] == ("quantize" if not after else "scratch"), name
    assert all(len(layers) == 1 for layers in waits.values())
    # Behind a cut of what is read all ranges, which are small, come in one group.
    assert set.union(*waits.values()) == ({LAYERS - 1} if "read" in after else set(range(LAYERS)))
    found: Counter[str] = Counter()
    for node in graph.nodes:
        found[node.name] += node.tasks
    assert +found == {name: len(layer) for name, layer in dask.layers.items()}
    drawn = {(edge.start, edge.end.partition(".")[2]) for edge in graph.edges if "calibrate" in (edge.start, edge.end)}
    assert drawn == {("source", ""), ("calibrate", "quantize" if not after else "scratch")}
    assert "calibrate 3" in graph.line()
    assert ">calibrate<" in graph.to_svg()


class Stopped(BaseException):
    """Ends a run as a kill would, without its consent."""


def test_a_run_that_is_stopped_goes_on_with_the_layer_that_it_was_at(
    made: dict[str, Any], expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**made, "output_dir": tmp_path / "out", "calibration_tokens": tmp_path / "tokens", "scheduler": "threads"}
    run, seen = LayeredModel.run, list[int]()

    def watching(self: LayeredModel, number: int, hidden: np.ndarray) -> np.ndarray:
        seen.append(number)
        if seen == [0, 0, 0, 1, 1]:
            raise Stopped
        return run(self, number, hidden)

    monkeypatch.setattr(LayeredModel, "run", watching)
    with pytest.raises(Stopped):
        convert(**options)
    assert not (tmp_path / "out" / "config.json").exists()
    seen.clear()
    convert(**options)
    assert seen == [1, 1, 1, 2, 2, 2]
    assert ranks(tmp_path / "out") == expected


def test_the_plan_of_a_run_that_was_stopped_begins_no_calibration(made: dict[str, Any], tmp_path: Path) -> None:
    options = {**made, "output_dir": tmp_path / "out", "calibration_tokens": tmp_path / "tokens", "scheduler": "synchronous"}
    planned, done = plan(**options), list[Any]()

    class Stopping(Silent):
        def advanced(self, written: Any) -> None:
            done.append(written)
            if len(done) == 3:
                raise Stopped

    with pytest.raises(Stopped):
        execute(planned, Stopping())
    (place,) = (tmp_path / ".headrace-scratch").glob("*-calibrate-*")
    with closing(Journal(place / JOURNAL)):  # another run's
        assert done_tasks(planned) == len(done) < planned.tasks


def test_scratch_that_is_kept_is_measured_once(made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**made, "calibration_tokens": tmp_path / "tokens", "scheduler": "threads", "keep_scratch": True}
    convert(**options, output_dir=tmp_path / "one")
    monkeypatch.setattr(LayeredModel, "run", None)  # which nothing calls
    convert(**{**options, "smoothquant": 0.7}, output_dir=tmp_path / "two")
    listed = json.loads(headrace("scratch", "ls", tmp_path / ".headrace-scratch", "--json").out)
    assert [cut["stage"] for cut in listed] == ["calibrate"]


def interrupted(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The scratch that a conversion leaves which is stopped when it is about to name its files."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.sinks.output._replace", stop)
        with pytest.raises(Interrupted):
            convert(**options)
    (place,) = Path(options["output_dir"]).parent.glob(".headrace-scratch/*-calibrate-*")
    assert list(place.glob("ranges.*"))
    return place


@pytest.mark.parametrize("how", ["other ranges", "the same ranges", "no ranges", "kept"])
def test_the_scratch_of_an_unfinished_conversion_goes_with_it(
    how: str, made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**made, "output_dir": tmp_path / "out", "calibration_tokens": tmp_path / "tokens", "scheduler": "threads"}
    place = interrupted({**options, "keep_scratch": how == "kept"}, monkeypatch)
    before = sorted(place.rglob("*"))
    if how == "other ranges":
        save_file({"input_ids": np.random.default_rng(1).integers(0, 96, (3, 12))}, tmp_path / "tokens")
    elif how == "the same ranges":
        options["smoothquant"] = 0.7
        monkeypatch.setattr(LayeredModel, "run", None)  # which nothing calls
    else:
        options = {"model_dir": made["model_dir"], "output_dir": tmp_path / "out", "scheduler": "threads"}
    convert(**options, overwrite=True)
    assert sorted(place.rglob("*")) == (before if how == "kept" else [])
    assert (tmp_path / ".headrace-scratch").exists() == (how == "kept")


def test_scratch_that_a_run_needs_no_more_goes_when_it_goes_on(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**made, "output_dir": tmp_path / "out", "calibration_tokens": tmp_path / "tokens", "scheduler": "threads"}
    place = interrupted(options, monkeypatch)
    assert not convert(**options).up_to_date
    assert not place.exists()


def test_those_who_watch_see_layers_and_time(made: dict[str, Any], tmp_path: Path) -> None:
    watch, stream = RunWatch(), io.StringIO()
    planned = plan(**made, output_dir=tmp_path / "out", calibration_tokens=tmp_path / "tokens", scheduler="synchronous")
    snapshots = []

    class Looking(ProgressLines):
        def calibrated(self, done: int, layers: int, seconds_left: float) -> None:
            super().calibrated(done, layers, seconds_left)
            snapshots.append(watch.snapshot())

    execute(planned, Looking(stream, watch), watch=watch)
    assert [(now.calibrated_layers, now.layers) for now in snapshots] == [(1, 3), (2, 3), (3, 3)]
    first = snapshots[0]
    node = next(node for node in first.nodes if node.name == "calibrate")
    assert (node.tasks, node.done_tasks) == (3, 1)
    assert first.eta_seconds == pytest.approx(2 * node.seconds)
    assert ("source", "calibrate") in first.edges
    assert ("calibrate", "quantize") in first.edges
    assert "1 of 3</b><span>layers calibrated" in page.body(first)
    assert "1 of 3 layers" in page.body(first)
    assert "layer 1 of 3 calibrated" in stream.getvalue()


def test_the_time_left_is_that_of_the_layers_that_were_done(tmp_path: Path) -> None:
    files = Activations(tmp_path, (4, 1, 1), np.dtype(np.float32), "", "")
    progress = LayerProgress(5, 6, files, now=100.0)
    assert (progress.look(), progress.done, progress.seconds_left(107.0)) == (False, 1, None)
    files.begin(1)
    files.write(1, 0, np.ones((1, 1), np.float32))
    assert progress.look()
    assert not progress.look()
    assert (progress.part, progress.seconds_left(107.0)) == (0.25, 4.75 * 28)
    progress.advanced(2.0, 110.0)
    progress.advanced(4.0, 114.0)
    assert (progress.done, progress.part, progress.seconds_left(115.0)) == (3, 0.0, 9.0)


def test_memory_and_time_are_in_the_plan(made: dict[str, Any], tmp_path: Path) -> None:
    options = {**made, "output_dir": tmp_path / "out", "calibration_tokens": tmp_path / "tokens"}
    said = plan(**options).summary()
    calibration = said["calibration"]
    assert calibration["layer_bytes"] == 2 * sum(
        values.size for name, values in source.values(CONFIG).items() if ".layers.0." in name
    )
    assert calibration["seconds"] > 0
    assert said["peak_memory_bytes"] > calibration["peak_bytes"] > calibration["layer_bytes"]
    with pytest.raises(BadInput) as refused:
        plan(**options, memory_limit="500MiB")
    (problem,) = refused.value.problems
    assert problem.subject == "--memory_limit"
    wanted = int(problem.expected.split()[0])
    assert plan(**options, memory_limit=f"{wanted}MiB").budget.peak_bytes <= wanted << 20
    with pytest.raises(BadInput):
        plan(**options, memory_limit=f"{wanted - 2}MiB")
    ran = headrace("plan", *[word for name, value in options.items() for word in words(name, value)])
    assert ran.code == 0, ran
    assert "3 layers in float16 on cpu, 3 samples of 12 tokens; memory at most" in " ".join(ran.out.split())


def words(name: str, value: Any) -> tuple[object, ...]:
    return (f"--{name}",) if value is True else (f"--{name}", value)


REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "two": (("--smoothquant", 0.5, "--calibration_tokens", "a", "--act_range", "b"), "--calibration_tokens: found --act_range"),
    "nothing": (("--calibration_tokens", "tokens"), "found a target that uses no ranges"),
    "a name": (
        ("--smoothquant", 0.5, "--dtype", "float16", "--calib_dataset", "ccdv/cnn_dailymail"),
        "hf download --repo-type dataset",
    ),
    "no texts": (("--smoothquant", 0.5, "--act_range", "b", "--calib_size", 7), "--calib_size 7: found nothing that it is about"),
    "no device": (
        ("--int8_kv_cache", "--calibration_tokens", "tokens", "--calibration_device", "cuda:77"),
        "--calibration_device cuda:77: found none that torch computes on",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_requests_that_are_refused(what: str, made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags, said = REFUSED[what]
    ran = headrace("convert", "--model_dir", made["model_dir"], "--output_dir", tmp_path / "out", *flags)
    assert ran.code == 2, ran
    assert said in ran.err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".headrace-scratch").exists()


def test_activations_of_which_no_scale_can_be_made(made: dict[str, Any], tmp_path: Path) -> None:
    tensors = source.values(CONFIG)
    tensors["model.layers.1.self_attn.o_proj.weight"] *= 0
    checkpoints.save(tmp_path / "model", CONFIG, tensors)
    options = {**made, "output_dir": tmp_path / "out", "calibration_tokens": tmp_path / "tokens", "scheduler": "threads"}
    with pytest.raises(BadInput, match=r"model.layers.1.self_attn.o_proj\|y: found nothing but zeros"):
        convert(**options)
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / ".headrace-scratch").glob("*"))


def test_a_machine_that_cannot_run_the_model_costs_nothing_that_was_done(
    made: dict[str, Any], expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a worker without transformers or the device: only wrong values have what was done removed."""
    options = {**made, "output_dir": tmp_path / "out", "calibration_tokens": tmp_path / "tokens", "scheduler": "synchronous"}
    opened, calls = layer_task.Opened, list[layer_task.LayerCall]()
    run = opened.run

    def running(self: layer_task.Opened, call: layer_task.LayerCall) -> Any:
        if call.layer == 1:
            raise KeyboardInterrupt
        return run(self, call)

    with monkeypatch.context() as patch:
        patch.setattr(opened, "run", running)
        with pytest.raises(Interrupted):
            convert(**options)

    def refused(call: layer_task.LayerCall) -> None:
        calls.append(call)
        raise BadInput([Problem("transformers", "not installed", "the library")])

    with monkeypatch.context() as patch:
        patch.setattr(layer_task, "Opened", refused)
        with pytest.raises(WriteFailed, match=r"layer 1 cannot be measured on .*: found not installed.*run the same command again"):
            convert(**options)
    assert [call.layer for call in calls] == [1]
    assert (tmp_path / "out/headrace.json.partial").exists()
    (place,) = (tmp_path / ".headrace-scratch").glob("*-calibrate-*")
    assert (place / "ranges.0.safetensors").exists()
    convert(**options)
    assert ranks(tmp_path / "out") == expected


@pytest.mark.parametrize("measures", [False, True])
def test_a_source_that_is_measured_is_looked_at_again_though_groups_read_scratch_alone(
    made: dict[str, Any], tmp_path: Path, measures: bool
) -> None:
    planned = plan(**made, output_dir=tmp_path / "out", calibration_tokens=tmp_path / "tokens")
    assert planned.calibrating
    run = _Run(planned, Silent(), 0.0, RunWatch())
    run.left.phases[-1].sinks = (0,)  # of which no group reads the source
    run.left.calibrations = planned.calibrating.calls() if measures else ()
    run._count_bytes()
    (finish,) = run._finishes()
    assert (finish.bytes_read, finish.source) == (0, planned.source.files if measures else ())


def test_scratch_that_cannot_be_written_is_refused(made: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "scratch").write_text("a file")
    options = {**made, "output_dir": tmp_path / "out", "calibration_tokens": tmp_path / "tokens", "scheduler": "threads"}
    with pytest.raises(BadInput, match=r"expected a directory that can be written.* or choose another --scratch"):
        convert(**options, scratch=tmp_path / "scratch" / "here")
    assert not (tmp_path / "out").exists(), "what was begun is undone"


def test_a_disk_has_room_for_the_activations_too(made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**made, "output_dir": tmp_path / "out", "calibration_tokens": tmp_path / "tokens", "scheduler": "threads"}
    planned = plan(**options)
    assert planned.calibrating is not None
    files, (target,) = planned.calibrating.plan.activations, planned.targets
    room = target.output.size_bytes + files.nbytes - 1
    monkeypatch.setattr(output_checks, "free_bytes", lambda _: room)
    (problem,) = planned.obstacles()
    assert "1 bytes more" in problem.expected
    monkeypatch.undo()
    convert(**{**options, "output_dir": tmp_path / "other"}, keep_scratch=True)
    monkeypatch.setattr(output_checks, "free_bytes", lambda _: room)
    assert planned.obstacles() == [], "once they are measured no more is needed"
