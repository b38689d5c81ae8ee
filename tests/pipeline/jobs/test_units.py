"""From jobs to conversions: what becomes one, in which order, and what is refused alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from pipeline import convert
from pipeline.jobs.requests import Request
from pipeline.jobs.units import Unit, make_units
from pipeline.planning.job import make_job
from tests.support import checkpoints, quantized_checkpoints
from tests.support.examples import examples


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        checkpoints.write(directory / name, checkpoints.LLAMA, seed=seed)
    return directory


def request(model: Path, output: Path, **options: Any) -> Request:
    job = make_job({"model_dir": str(model), "output_dir": str(output), "scheduler": "threads", **options})
    return Request(output.name, f"test {output.name}", job)


def outputs(units: list[Unit]) -> list[list[str]]:
    return [[Path(output).name for output in unit.outputs] for unit in units]


def test_jobs_that_differ_by_target_alone_become_one(models: Path, tmp_path: Path) -> None:
    asked = [request(models / "a", tmp_path / str(tp), tp_size=tp) for tp in (1, 2, 4)]
    (unit,) = make_units(asked)
    assert unit.members == ("1", "2", "4")
    assert outputs([unit]) == [["1", "2", "4"]]
    assert unit.name == "a (3 jobs)"
    assert [part.members for part in unit.parts] == [("1",), ("2",), ("4",)]
    job = make_job(unit.options)
    assert [target.tp_size for target in job.targets] == [1, 2, 4]
    assert unit.room.keys() == set(unit.outputs)
    assert [part.outputs for part in unit.parts] == [(output,) for output in unit.outputs]
    assert sum(sum(part.room.values()) for part in unit.parts) == sum(unit.room.values())


def test_sources_stay_together_in_the_order_of_their_first_job(models: Path, tmp_path: Path) -> None:
    asked = [
        request(models / "b", tmp_path / "b1"),
        request(models / "a", tmp_path / "a1"),
        request(models / "b", tmp_path / "b2", copy_tokenizer=False, sync=True),
        request(models / "a", tmp_path / "a2", tp_size=2),
        request(models / "b", tmp_path / "b3", dtype="float32"),
    ]
    assert outputs(make_units(asked)) == [["b1", "b3"], ["b2"], ["a1", "a2"]]


def test_one_bad_job_does_not_take_the_others_with_it(models: Path, tmp_path: Path) -> None:
    asked = [request(models / "a", tmp_path / str(tp), tp_size=tp) for tp in (1, 3, 2)]
    asked += [Request("broken", "file.toml", None, ())]
    good, bad, broken = make_units(asked)
    assert (good.members, good.error) == (("1", "2"), "")
    assert bad.members == ("3",)
    assert "--tp_size 3: found num_attention_heads 8" in bad.error
    assert broken.members == ("broken",)


def test_what_is_done_is_seen_to_be(models: Path, tmp_path: Path) -> None:
    convert(model_dir=models / "a", output_dir=tmp_path / "1", scheduler="threads")
    (unit,) = make_units([request(models / "a", tmp_path / "1")])
    assert unit.state == "up_to_date"
    (unit,) = make_units([request(models / "a", tmp_path / "1", overwrite=True)])
    assert unit.state == "to do"
    (unit,) = make_units([request(models / "a", tmp_path / str(tp), tp_size=tp) for tp in (1, 2)])
    assert (unit.state, [part.state for part in unit.parts]) == ("to do", ["up_to_date", "to do"])
    (unit,) = make_units([request(models / "a", tmp_path / "1", dtype="float32")])
    assert "a finished conversion with " in unit.error


def test_asked_for_twice_it_is_done_once_and_two_that_differ_cannot_share_a_directory(models: Path, tmp_path: Path) -> None:
    same = request(models / "a", tmp_path / "x")
    assert len(make_units([same, same])) == 1
    first, second = make_units([same, request(models / "a", tmp_path / "x", tp_size=2)])
    assert first.error == ""
    assert "two jobs that differ, test x and test x; expected a directory for each" in second.error


def test_memory_of_one_is_bounded_by_that_of_all(models: Path, tmp_path: Path) -> None:
    (unit,) = make_units([request(models / "a", tmp_path / "x", workers=1)], max_memory=300 << 20)
    assert unit.options["memory_limit"] == 300 << 20
    assert unit.peak_memory_bytes <= 300 << 20
    (unit,) = make_units([request(models / "a", tmp_path / "x")], max_memory=100 << 20)
    assert "--memory_limit" in unit.error


def test_a_name_that_is_not_utf_8_is_refused(models: Path, tmp_path: Path) -> None:
    output = tmp_path / os.fsdecode(b"\xff")
    (unit,) = make_units([request(models / "a", output)])
    assert "names in UTF-8" in unit.error
    assert unit.name == "\\udcff"
    unit.error.encode()


def test_a_model_on_the_hub_that_is_not_here_is_left_to_convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    (unit,) = make_units([request(Path("nobody/nothing-of-the-kind"), tmp_path / "x", model_dir="nobody/nothing-of-the-kind")])
    assert (unit.error, unit.state, unit.room) == ("", "to do", {})
    assert unit.peak_memory_bytes == 2 << 30


def test_what_is_not_done_names_its_state(models: Path, tmp_path: Path) -> None:
    asked = [request(models / "a", tmp_path / "x"), request(models / "b", tmp_path / "y", tp_size=3)]
    assert [unit.state for unit in make_units(asked)] == ["to do", "refused"]


def test_a_source_that_was_just_written_is_left_for_another_time(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    asked = [request(tmp_path / "model", tmp_path / "x")]
    (unit,) = make_units(asked, settle_seconds=600)
    assert (unit.state, unit.error) == ("unsettled", "")
    for place in (tmp_path / "model", *(tmp_path / "model").iterdir()):
        os.utime(place, (1, 1))
    assert make_units(asked, settle_seconds=600)[0].state == "to do"
    (tmp_path / "model/README.md").touch()
    assert make_units(asked, settle_seconds=600)[0].state == "unsettled"
    assert make_units(asked)[0].state == "to do"


def test_names_are_unique(models: Path, tmp_path: Path) -> None:
    asked = [request(models / name, tmp_path / f"{n}/out", **more) for n, (name, more) in enumerate(
        (("a", {}), ("b", {}), ("b", {"sync": True}), ("a", {"sync": True}))
    )]  # fmt: skip
    units = make_units(asked)
    assert sorted(unit.name for unit in units) == ["out", "out (2)", "out (3)", "out (4)"]
    assert [unit.members for unit in units] == [("out",)] * 4


def test_conversions_of_a_packed_source_that_cannot_be_one_share_a_cut_one_after_the_other(tmp_path: Path) -> None:
    quantized_checkpoints.write(tmp_path / "model", quantized_checkpoints.LLAMA, quantized_checkpoints.gptq())
    asked = [request(tmp_path / "model", tmp_path / "x"), request(tmp_path / "model", tmp_path / "y", sync=True)]
    first, second = make_units(asked)
    assert (first.after, second.after) == ("", first.name)
    assert first.scratch == second.scratch != ()
    for unit in (first, second):
        assert (unit.options["scratch_after"], unit.options["keep_scratch"]) == (["unpack"], True)
        assert unit.options["scratch_outputs"] == [str(tmp_path / "x"), str(tmp_path / "y")]
    # Not where a job says itself what to do.
    others = make_units([asked[0], request(tmp_path / "model", tmp_path / "y", scratch_after="none")])
    assert [(unit.after, unit.scratch) for unit in others] == [("", ()), ("", ())]
    # To remain where one says so.
    kept = make_units([asked[0], request(tmp_path / "model", tmp_path / "y", keep_scratch=True)])
    assert [(bool(unit.scratch), "scratch_outputs" in unit.options) for unit in kept] == [(True, False)] * 2


def test_a_third_waits_for_the_second_and_one_that_is_refused_for_nobody(tmp_path: Path) -> None:
    quantized_checkpoints.write(tmp_path / "model", quantized_checkpoints.LLAMA, quantized_checkpoints.gptq())
    more: list[dict[str, Any]] = [{}, {"sync": True}, {"tp_size": 3, "sync": True}, {"workers": 1}]
    units = make_units([request(tmp_path / "model", tmp_path / f"{n}", **each) for n, each in enumerate(more)])
    by_name = {unit.name: unit for unit in units}
    assert {name: unit.after for name, unit in by_name.items()} == {"0": "", "1": "0", "2": "", "3": "1"}
    assert by_name["2"].state == "refused"


def test_conversions_of_a_dense_source_share_nothing(models: Path, tmp_path: Path) -> None:
    units = make_units([request(models / "a", tmp_path / "x"), request(models / "a", tmp_path / "y", sync=True)])
    assert [(unit.after, unit.scratch) for unit in units] == [("", ()), ("", ())]
    assert not any("scratch_after" in unit.options for unit in units)


def test_engines_are_a_step_of_their_own(models: Path, tmp_path: Path) -> None:
    engine = {"output_dir": f"{tmp_path}/engines/{{target}}", "max_batch_size": 4, "command": ["trtllm-build"]}
    (plain,) = make_units([request(models / "a", tmp_path / "x")])
    assert plain.steps() == [("convert", plain.options)]
    asked = [request(models / "a", tmp_path / f"{tp}", tp_size=tp, engine=engine) for tp in (1, 2)]
    units = make_units(asked)
    assert [name for unit in units for name in unit.engines] == [f"{tmp_path}/engines/1", f"{tmp_path}/engines/2"]
    for unit in units:
        (first, ranks), (second, both) = unit.steps()
        assert (first, second, both) == ("convert", "build", unit.options)
        assert '"engine"' not in json.dumps(ranks)
        assert make_job(ranks).targets[0].output_dir == make_job(both).targets[0].output_dir


def test_engines_replace_those_of_before_and_their_checkpoints_are_not_made_twice(models: Path, tmp_path: Path) -> None:
    engine = {"output_dir": f"{tmp_path}/engines/{{target}}", "command": ["trtllm-build"]}
    (unit,) = make_units([request(models / "a", tmp_path / "x", engine=engine, overwrite=True)])
    (_, ranks), (_, both) = unit.steps()
    assert make_job(ranks).overwrite
    assert "overwrite" not in both
    assert make_job(both).engine == {**engine, "overwrite": True}
    asked = [request(models / "a", tmp_path / str(tp), tp_size=tp, overwrite=True, engine=engine) for tp in (1, 2)]
    for unit in make_units(asked):
        both = unit.steps()[1][1]
        tables = [each["engine"] for each in (both, *both.get("target", ())) if "engine" in each]
        assert tables
        assert all(table["overwrite"] for table in tables)


def test_what_a_power_cut_may_have_damaged_is_looked_at(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is to be on the disk is brought there: `convert` does either without writing a byte."""
    asked = {name: request(models / "a", tmp_path / "1", **options) for name, options in (("", {}), ("sync", {"sync": True}))}
    convert(model_dir=models / "a", output_dir=tmp_path / "1", scheduler="threads")
    assert [make_units([each])[0].state for each in asked.values()] == ["up_to_date", "to do"]
    monkeypatch.setattr("pipeline.sinks.output.boot_mark", lambda: "another boot")
    assert [make_units([each])[0].state for each in asked.values()] == ["to do", "to do"]
    assert convert(model_dir=models / "a", output_dir=tmp_path / "1", scheduler="threads").up_to_date
    assert [make_units([each])[0].state for each in asked.values()] == ["up_to_date", "up_to_date"]


OPTIONS = st.fixed_dictionaries({"model": st.sampled_from("ab"), "tp_size": st.sampled_from([1, 2, 3, 4]), "sync": st.booleans()})


@examples(25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(OPTIONS, max_size=6))
def test_every_job_is_in_one_conversion_and_sources_are_together(
    models: Path, tmp_path: Path, options: list[dict[str, Any]]
) -> None:
    asked = [
        request(models / each["model"], tmp_path / f"{n}", tp_size=each["tp_size"], sync=each["sync"])
        for n, each in enumerate(options)
    ]
    units = make_units(asked)
    assert sorted(name for unit in units for name in unit.members) == sorted(map(str, range(len(options))))
    sources = [unit.source for unit in units]
    assert sources == sorted(sources, key=sources.index), "jobs of one source stand together"
    merged = [unit for unit in units if not unit.error]
    keys = [(unit.source, unit.options.get("sync", False)) for unit in merged]
    assert len(keys) == len(set(keys)), "what can be one is one"
    assert all(bool(unit.error) == (options[int(unit.members[0])]["tp_size"] == 3) for unit in units)
    for unit in units:
        assert Unit.of(json.loads(json.dumps(unit.as_json()))) == Unit.of(unit.as_json())
        assert Unit.of(unit.as_json()) == unit
        assert Unit.of(unit.as_json()).steps() == unit.steps()
