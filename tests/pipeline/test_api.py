"""`import headrace`: arguments, results and typed errors."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from dataclasses import FrozenInstanceError, asdict
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import load_file, save_file

import headrace
import pipeline
from headrace import (
    BadInput,
    EngineFailed,
    HeadraceError,
    Interrupted,
    Job,
    VerificationFailed,
    WriteFailed,
    convert,
    inspect,
    plan,
    report,
    verify,
)
from tests.support import checkpoints
from tests.support.commands import headrace as command
from tests.support.commands import tree
from tests.support.directories import values_bytes
from tests.support.places import ROOT


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
    assert result.bytes_written == values_bytes(output)
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


def test_options_override_the_targets_of_a_job_as_those_of_a_file(model: Path, output: Path) -> None:
    file = model.parent / "job.toml"
    file.write_text("model_dir = 'model'\n[[target]]\noutput_dir = 'out'\ntp_size = 2\nquantization = 'int8'\n")
    job = Job(model_dir=model, target=[{"output_dir": output, "tp_size": 2, "quantization": "int8"}])
    for each in (file, job):
        (target,) = plan(each, tp_size=4, quantization="fp8_rowwise").job.targets
        assert (target.tp_size, target.use_weight_only, target.use_fp8_rowwise) == (4, False, True)
        with pytest.raises(BadInput, match="one directory for 1 targets"):
            plan(each, output_dir=output)
        own = plan(each, target=[{"output_dir": output, "tp_size": 2}, {"output_dir": f"{output}4"}], tp_size=4)
        assert [target.tp_size for target in own.job.targets] == [2, 4], "tables beside an option are their own"


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


def test_every_name_is_there_and_is_the_same_in_both_modules() -> None:
    assert headrace.__all__ == pipeline.__all__ == sorted(set(headrace.__all__))
    assert all(getattr(headrace, name) is getattr(pipeline, name) for name in headrace.__all__ if name != "__version__")
    functions = {"convert", "plan", "verify", "inspect", "report", "build"}
    loaders = {"load_from_gptq_llama", "load_from_hf_checkpoint", "load_from_hf_llama", "load_from_meta_llama"}
    assert {"Job", *functions, *loaders} <= set(headrace.__all__) <= set(dir(headrace))
    for module in (headrace, pipeline):
        with pytest.raises(AttributeError, match="no_such_name"):
            _ = module.no_such_name


def test_every_function_says_its_parameters_results_and_errors() -> None:
    names = [name for name in headrace.__all__ if name.islower() and not name.startswith("_")]
    assert len(names) == 10
    for name in names:
        text = getattr(headrace, name).__doc__
        assert all(f"\n    {title}\n    {'-' * len(title)}\n" in text for title in ("Parameters", "Returns", "Raises")), name


@pytest.mark.parametrize(
    "words", [["-m", "headrace", "--version"], ["-c", "import headrace; print('headrace', headrace.__version__)"]]
)
def test_the_version_is_that_of_the_project(words: list[str]) -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    ran = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout.splitlines()[0] == f"headrace {wanted}"


def test_an_import_loads_nothing_heavy() -> None:
    script = "import sys, headrace; print(*sorted(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(ran.stdout.split())
    assert "pipeline.api" in loaded
    assert not loaded & {"numpy", "torch", "dask", "distributed", "zarr", "pydantic", "typer", "pipeline.planning.job"}


def test_a_shell_is_told_what_a_word_may_become() -> None:
    for words, wanted in (("headrace conv", "convert"), ("headrace convert --tp", "--tp_size")):
        environment = {"_HEADRACE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        run = [sys.executable, "-m", "headrace"]
        ran = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT, env={"PATH": "", **environment})
        assert ran.stdout.split() == [wanted]


def test_an_output_is_verified_against_its_source(model: Path, output: Path) -> None:
    convert(model_dir=model, output_dir=output, tp_size=2, scheduler="threads")
    levels = set()
    found = verify(str(output), str(model), advance=lambda level, *_: levels.add(level))
    found.check()
    assert (found.ok, found.findings, found.logits) == (True, (), None)
    assert levels == {"integrity", "round trip"}
    assert found.integrity is not None
    assert found.integrity.bytes == sum(array.nbytes for path in output.glob("rank*") for array in load_file(path).values())
    assert found.round_trip is not None
    assert all(tensor.exact for tensor in found.round_trip.tensors)
    with pytest.raises(ValidationError):
        found.ok = False  # type: ignore[misc]
    assert verify(output).round_trip is None


def test_what_is_wrong_with_an_output_is_found_and_not_raised(model: Path, output: Path) -> None:
    convert(model_dir=model, output_dir=output, scheduler="threads")
    tensors = load_file(output / "rank0.safetensors")
    tensors["transformer.ln_f.weight"] = np.zeros_like(tensors["transformer.ln_f.weight"])
    save_file(tensors, output / "rank0.safetensors")
    found = verify(output, model)
    assert not found.ok
    assert {finding.subject for finding in found.findings} == {"rank0.safetensors: transformer.ln_f.weight"}
    with pytest.raises(VerificationFailed, match="ln_f"):
        found.check()
    page = report(output, verification=found)
    assert (page.ok, page.verification) == (False, found)
    assert "ln_f" in page.page.read_text()


def test_bad_requests_of_verify_raise_bad_input(model: Path, output: Path) -> None:
    with pytest.raises(BadInput, match=r"no config\.json"):
        verify(output)
    convert(model_dir=model, output_dir=output, scheduler="threads")
    for options in ({"logits": True}, {"prompt": "a"}):
        with pytest.raises(BadInput, match="no source to compare with"):
            verify(output, **options)


def test_a_page_is_written_beside_the_output_or_where_asked(model: Path, output: Path) -> None:
    convert(model_dir=model, output_dir=output, scheduler="threads")
    made = report(output)
    assert made.ok
    assert made.page == output.with_name("out.report.html")
    assert made.verification.source == str(model)  # headrace.json names it
    file = model.parent / "verification.json"
    file.write_text(made.verification.model_dump_json())
    again = report(str(output), page=str(model.parent / "page.html"), verification=str(file))
    assert again.verification == made.verification
    assert again.page.read_text().startswith("<!doctype html>")
    with pytest.raises(BadInput, match="a source beside"):
        report(output, model, verification=file)
    with pytest.raises(BadInput, match="another kind of file"):
        report(output, page=model.parent / "page.txt")


def test_an_inspection_is_what_the_command_prints(model: Path) -> None:
    found = inspect(str(model))
    printed = json.loads(command("inspect", model, "--json").out)
    assert (found.family, found.architecture, found.convertible) == ("llama", "LlamaForCausalLM", True)
    assert found.model is not None
    assert {name: getattr(found.model, name) for name in printed["model"]} == printed["model"]
    assert [{"file": each.file, "bytes": each.bytes} for each in found.files] == printed["files"]
    assert (list(found.tp_sizes), list(found.pp_sizes), found.moe_sizes) == (printed["tp_sizes"], printed["pp_sizes"], {})
    assert [{**asdict(way), "tp_sizes": list(way.tp_sizes)} for way in found.conversions] == printed["conversions"]
    rest = printed.keys() - {"model", "files", "tp_sizes", "pp_sizes", "problems", "conversions"}
    assert {name: getattr(found, name) for name in rest} == {name: printed[name] for name in rest}
    with pytest.raises(FrozenInstanceError):
        found.family = "other"  # type: ignore[misc]


def test_an_inspection_of_experts_and_of_what_is_not_known(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "moe", checkpoints.MIXTRAL)
    found = inspect(tmp_path / "moe")
    assert found.model is not None
    assert found.model.num_experts > 1
    assert found.moe_sizes[2] == ((1, 2), (2, 1))
    checkpoints.write(tmp_path / "other", {**checkpoints.LLAMA, "architectures": ["NobodysForCausalLM"]})
    other = inspect(tmp_path / "other")
    assert (other.family, other.model, other.tp_sizes, other.convertible) == (None, None, (), False)
    assert "NobodysForCausalLM" in other.problems[0]
