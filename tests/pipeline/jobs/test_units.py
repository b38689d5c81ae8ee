"""From jobs to conversions: what becomes one, in which order, and what is refused alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from pipeline import convert
from pipeline.jobs.requests import Request
from pipeline.jobs.rows import Unit
from pipeline.jobs.units import make_units
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
    return [[Path(output).name for output in unit.conversion.outputs] for unit in units]


def test_jobs_that_differ_by_target_alone_become_one(models: Path, tmp_path: Path) -> None:
    asked = [request(models / "a", tmp_path / str(tp), tp_size=tp) for tp in (1, 2, 4)]
    (unit,) = make_units(asked)
    assert unit.members == ("1", "2", "4")
    assert outputs([unit]) == [["1", "2", "4"]]
    assert unit.conversion.name == "a (3 jobs)"
    assert [part.members for part in unit.parts] == [("1",), ("2",), ("4",)]
    job = make_job(unit.conversion.options)
    assert [target.tp_size for target in job.targets] == [1, 2, 4]
    assert unit.conversion.room.keys() == set(unit.conversion.outputs)
    # Taken apart again they are what they were.
    assert [each.options for each in unit.conversion.split()] == [part.conversion.options for part in unit.parts]
    assert [each.room for each in unit.conversion.split()] == [part.conversion.room for part in unit.parts]


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
    assert unit.up_to_date
    (unit,) = make_units([request(models / "a", tmp_path / "1", overwrite=True)])
    assert not unit.up_to_date
    (unit,) = make_units([request(models / "a", tmp_path / str(tp), tp_size=tp) for tp in (1, 2)])
    assert (unit.up_to_date, [part.up_to_date for part in unit.parts]) == (False, [True, False])
    (unit,) = make_units([request(models / "a", tmp_path / "1", dtype="float32")])
    assert "another source or with other options" in unit.error


def test_asked_for_twice_it_is_done_once_and_two_that_differ_cannot_share_a_directory(models: Path, tmp_path: Path) -> None:
    same = request(models / "a", tmp_path / "x")
    assert len(make_units([same, same])) == 1
    first, second = make_units([same, request(models / "a", tmp_path / "x", tp_size=2)])
    assert first.error == ""
    assert "two jobs that differ, test x and test x; expected a directory for each" in second.error


def test_memory_of_one_is_bounded_by_that_of_all(models: Path, tmp_path: Path) -> None:
    (unit,) = make_units([request(models / "a", tmp_path / "x", workers=1)], max_memory=300 << 20)
    assert unit.conversion.options["memory_limit"] == 300 << 20
    assert unit.conversion.peak_memory_bytes <= 300 << 20
    (unit,) = make_units([request(models / "a", tmp_path / "x")], max_memory=100 << 20)
    assert "--memory_limit" in unit.error


def test_a_name_that_is_not_utf_8_is_refused(models: Path, tmp_path: Path) -> None:
    output = tmp_path / os.fsdecode(b"\xff")
    (unit,) = make_units([request(models / "a", output)])
    assert "names in UTF-8" in unit.error
    assert unit.conversion.name == "\\udcff"
    unit.error.encode()


def test_a_model_on_the_hub_that_is_not_here_is_left_to_convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    (unit,) = make_units([request(Path("nobody/nothing-of-the-kind"), tmp_path / "x", model_dir="nobody/nothing-of-the-kind")])
    assert (unit.error, unit.up_to_date, unit.conversion.room) == ("", False, {})
    assert unit.conversion.peak_memory_bytes == 2 << 30


def test_conversions_of_a_packed_source_that_cannot_be_one_share_scratch(tmp_path: Path) -> None:
    quantized_checkpoints.write(tmp_path / "model", quantized_checkpoints.LLAMA, quantized_checkpoints.gptq())
    asked = [request(tmp_path / "model", tmp_path / "x"), request(tmp_path / "model", tmp_path / "y", sync=True)]
    first, second = make_units(asked)
    assert first.shared == second.shared != ""
    for unit in (first, second):
        assert unit.conversion.resources[-1] == unit.shared, "one after the other"
        assert unit.conversion.scratch == (unit.shared,)
        assert (unit.conversion.options["scratch_after"], unit.conversion.options["keep_scratch"]) == (["unpack"], True)
    # Not where a job says itself what to do, and to remain where one says so.
    assert not any(
        unit.shared for unit in make_units([asked[0], request(tmp_path / "model", tmp_path / "y", scratch_after="none")])
    )
    kept = make_units([asked[0], request(tmp_path / "model", tmp_path / "y", keep_scratch=True)])
    assert all(unit.shared and unit.conversion.scratch == () for unit in kept)


def test_conversions_of_a_dense_source_share_nothing(models: Path, tmp_path: Path) -> None:
    units = make_units([request(models / "a", tmp_path / "x"), request(models / "a", tmp_path / "y", sync=True)])
    assert [unit.shared for unit in units] == ["", ""]
    assert not any("scratch_after" in unit.conversion.options for unit in units)


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
    sources = [unit.conversion.source for unit in units]
    assert sources == sorted(sources, key=sources.index), "jobs of one source stand together"
    merged = [unit for unit in units if not unit.error]
    keys = [(unit.conversion.source, unit.conversion.options.get("sync", False)) for unit in merged]
    assert len(keys) == len(set(keys)), "what can be one is one"
    assert all(bool(unit.error) == (options[int(unit.members[0])]["tp_size"] == 3) for unit in units)
