"""`from pipeline import convert, plan, Job`: arguments, results and typed errors."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from pydantic import ValidationError

import pipeline
from pipeline import BadInput, EngineFailed, HeadraceError, Interrupted, Job, WriteFailed, convert, plan
from tests.support import checkpoints
from tests.support.commands import tree


@pytest.fixture
def model(tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    return tmp_path / "model"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_what_a_conversion_returns(model: Path, output: Path) -> None:
    result = convert(model_dir=model, output_dir=output, tp_size=2, scheduler="threads")
    assert result.outputs == tuple(
        output / name for name in ("rank0.safetensors", "rank1.safetensors", "config.json", "headrace.json")
    )
    assert set(result.outputs) == set(output.iterdir())
    assert result.bytes_read == sum(array.nbytes for array in checkpoints.values(checkpoints.LLAMA).values())
    assert result.bytes_written == sum(path.stat().st_size for path in output.glob("rank*"))
    assert result.seconds > 0
    assert result.peak_memory_bytes > 10 << 20
    assert result.up_to_date is False
    assert {"read", "write"} <= result.stages.keys()
    assert result.stages["read"]["bytes"] == result.bytes_read
    with pytest.raises(FrozenInstanceError):
        result.seconds = 0  # type: ignore[misc]


def test_a_second_conversion_is_up_to_date(model: Path, output: Path) -> None:
    first = convert(model_dir=model, output_dir=output, scheduler="threads")
    before = tree(output)
    again = convert(model_dir=model, output_dir=output, scheduler="threads")
    assert (again.up_to_date, again.bytes_read, again.bytes_written) == (True, 0, 0)
    assert again.outputs == first.outputs
    assert tree(output) == before


def test_a_job_a_file_a_path_and_keywords_mean_the_same(model: Path, output: Path) -> None:
    file = model.parent / "job.toml"
    file.write_text("model_dir = 'model'\noutput_dir = 'out'\ntp_size = 2\nmemory_limit = '1GiB'\n")
    options = {"model_dir": str(model), "output_dir": output, "tp_size": 2, "memory_limit": "1GiB"}
    plans = [plan(Job(**options)), plan(str(file)), plan(file), plan(**options), plan(file, tp_size=2)]
    assert len({each.id for each in plans}) == 1
    assert all(each.job == plans[0].job for each in plans)
    assert plans[0].job.memory_limit == 1 << 30


def test_options_override_a_job(model: Path, output: Path) -> None:
    job = Job(model_dir=model, output_dir=output, tp_size=2, pp_size=3, memory_limit="1GiB", scheduler="threads")
    changed = plan(job, tp_size=4)
    assert (changed.job.tp_size, changed.job.pp_size, changed.job.memory_limit, job.tp_size) == (4, 3, 1 << 30, 2)
    convert(job, tp_size=4)
    assert json.loads((output / "config.json").read_text())["mapping"]["tp_size"] == 4


def test_a_job_is_frozen_and_checked(model: Path, output: Path) -> None:
    job = Job(model_dir=model, output_dir=output)
    with pytest.raises(ValidationError):
        job.tp_size = 2  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Job(model_dir=model, output_dir=output, tp_size=0)


def test_a_plan_writes_nothing_and_its_summary_is_json(model: Path, output: Path) -> None:
    before = tree(model.parent)
    made = plan(model_dir=model, output_dir=output, tp_size=2)
    summary = made.summary()
    assert json.loads(json.dumps(summary)) == summary
    assert made.bytes_written == summary["bytes_written"]
    assert not made.up_to_date
    assert made.obstacles() == []
    assert tree(model.parent) == before


@pytest.mark.parametrize("options", [{"tp_size": 3}, {"dtype": "int4"}, {"no_such_option": 1}, {"tp_size": "two"}], ids=str)
@pytest.mark.parametrize("call", [plan, convert])
def test_bad_requests_raise_bad_input_with_their_problems(model: Path, output: Path, options: dict, call: object) -> None:
    with pytest.raises(BadInput) as refusal:
        call(model_dir=model, output_dir=output, **options)  # type: ignore[operator]
    problem = refusal.value.problems[0]
    assert next(iter(options)) in problem.subject
    assert problem.found
    assert problem.expected
    assert refusal.value.exit_code == 2
    assert not output.exists()


def test_a_job_with_options_that_do_not_fit_is_bad_input(model: Path, output: Path) -> None:
    with pytest.raises(BadInput, match="no_such_option"):
        convert(Job(model_dir=model, output_dir=output), no_such_option=1)
    assert not output.exists()


def test_a_bad_scheduler_in_a_job_is_bad_input(model: Path, output: Path) -> None:
    with pytest.raises(BadInput, match="scheduler"):
        convert(Job(model_dir=model, output_dir=output, scheduler="cluster"))
    assert not output.exists()


def test_a_finished_conversion_in_the_way_is_bad_input_of_convert_and_an_obstacle_of_plan(model: Path, output: Path) -> None:
    convert(model_dir=model, output_dir=output, scheduler="threads")
    with pytest.raises(BadInput, match="--overwrite"):
        convert(model_dir=model, output_dir=output, tp_size=2, scheduler="threads")
    assert len(plan(model_dir=model, output_dir=output, tp_size=2).obstacles()) == 1
    assert plan(model_dir=model, output_dir=output, tp_size=2, overwrite=True).obstacles() == []


def test_the_tree_of_errors() -> None:
    assert [error.exit_code for error in (HeadraceError, BadInput, Interrupted, WriteFailed, EngineFailed)] == [1, 2, 3, 3, 4]
    assert all(issubclass(error, HeadraceError) for error in (BadInput, Interrupted, WriteFailed, EngineFailed))
    errors = {"BadInput", "EngineFailed", "HeadraceError", "Interrupted", "WriteFailed"}
    loaders = {"load_from_gptq_llama", "load_from_hf_checkpoint", "load_from_hf_llama", "load_from_meta_llama"}
    assert set(pipeline.__all__) == {"Job", "build", "convert", "plan"} | errors | loaders
