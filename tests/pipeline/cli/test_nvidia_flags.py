"""Every flag of NVIDIA's scripts that docs/format/runtime-1.2.md lists: taken, taken where it is true, or refused with a remedy."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipeline import BadInput, plan
from pipeline.planning.job import Job
from pipeline.planning.nvidia_table import nvidia_flags
from tests.support import checkpoints, quantized_checkpoints
from tests.support.commands import Ran, convert, headrace, one, refused, tree
from tests.support.directories import contents
from tests.support.places import DOCS

LLAMA, MIXTRAL = checkpoints.LLAMA, checkpoints.MIXTRAL
# flag -> the value of MIXTRAL, and one that it has not.
SHAPE = {
    "vocab_size": (96, 128256),
    "n_positions": (128, 8192),
    "n_layer": (3, 32),
    "n_head": (8, 64),
    "n_kv_head": (4, 1),
    "n_embd": (64, 4096),
    "inter_size": (160, 14336),
    "rms_norm_eps": (1e-05, 1e-06),
    "hidden_act": ("silu", "gelu"),
    "rotary_base": (10000.0, 500000.0),
    "moe_num_experts": (4, 8),
    "moe_top_k": (2, 1),
    "moe_renorm_mode": (1, 0),
}
# flag -> words on a command line, and what the remedy names.
REFUSED = {
    "save_config_only": (["--save_config_only"], "headrace plan --json"),
    "qformat": (["--qformat", "int8_wo"], "--quantization: int8 for int8_wo"),
    "kv_cache_dtype": (["--kv_cache_dtype", "fp8"], "--fp8_kv_cache"),
    "awq_block_size": (["--awq_block_size", "128"], "--group_size"),
    "use_embedding_sharing": (["--use_embedding_sharing"], "Leave it out"),
}
OTHER_NAMES = {"world_size": "tp_size", "output_model_dir": "output_dir", "enable_fp8": "use_fp8", "ckpt_type": "", "log_level": ""}
spellings = pytest.mark.parametrize("dashed", [False, True], ids=["underscores", "dashes"])


def spelled(flag: str, dashed: bool) -> str:
    return f"--{flag.replace('_', '-') if dashed else flag}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "model", MIXTRAL)
    return tmp_path / "model"


def listed() -> set[str]:
    """The flags in the list of docs/format/runtime-1.2.md, section 1."""
    text = (DOCS / "format" / "runtime-1.2.md").read_text()
    section = text[text.index("## 1. ") : text.index("## 2. ")]
    return {flag.replace("-", "_") for flag in re.findall(r"--([a-z][\w-]*)", section)}


def test_every_flag_of_the_list_is_known() -> None:
    flags = listed()
    assert len(flags) > 25
    assert flags - {"use_nvfp4"} <= nvidia_flags().keys() | Job.model_fields.keys()
    assert nvidia_flags().keys() == SHAPE.keys() | REFUSED.keys() | OTHER_NAMES.keys(), "each is tried below"
    assert nvidia_flags().keys() <= flags | {"output_model_dir"}
    assert not nvidia_flags().keys() & Job.model_fields.keys()


@spellings
@pytest.mark.parametrize("flag", SHAPE)
def test_a_shape_that_the_model_has(flag: str, dashed: bool, model: Path) -> None:
    arguments = ("--model_dir", model, "--output_dir", model.parent / "out", spelled(flag, dashed), SHAPE[flag][0])
    assert headrace("plan", *arguments).code == 0
    ran = headrace("batch", *arguments, "--dry_run", "--json")
    assert (ran.code, json.loads(ran.out)["units"][0]["state"]) == (0, "to do"), ran


@spellings
@pytest.mark.parametrize("flag", SHAPE)
def test_a_shape_that_it_has_not(flag: str, dashed: bool, model: Path) -> None:
    own, other = SHAPE[flag]
    problem = one(refused(model, spelled(flag, dashed), other))
    assert problem.startswith(f"--{flag} {other}: found ")
    found, _, expected = problem.partition("; expected ")
    assert (" swiglu in " if flag == "hidden_act" else f" {own} in ") in found
    assert expected.startswith(f"{other}. Leave --{flag} out")
    for command in ("plan", "batch"):
        more = ("--dry_run",) if command == "batch" else ()
        ran = headrace(command, "--model_dir", model, "--output_dir", model.parent / "out", spelled(flag, dashed), other, *more)
        assert f"--{flag} {other}: found" in ran.out + ran.err


def test_all_of_a_pasted_shape_at_once_is_no_other_conversion(model: Path) -> None:
    words = [word for flag, (own, _) in SHAPE.items() for word in (f"--{flag}", own)]
    assert convert(model, model.parent / "shaped", *words).code == 0
    assert convert(model, model.parent / "plain").code == 0
    assert contents(model.parent / "shaped") == contents(model.parent / "plain")
    assert "up to date" in convert(model, model.parent / "plain", *words).out


def test_a_dense_model_has_no_experts(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", LLAMA)
    assert convert(tmp_path / "model", tmp_path / "out", "--moe_num_experts", 0, "--moe_top_k", 0).code == 0
    assert one(refused(tmp_path / "model", "--moe_top_k", 2, output=tmp_path / "x")).startswith(
        "--moe_top_k 2: found experts_per_token 0"
    )


def test_shapes_in_python_and_in_job_files(model: Path) -> None:
    """By headrace's own names: a table of what the model is expected to be."""
    output = model.parent / "out"
    job = model.parent / "job.toml"
    job.write_text("model_dir = 'model'\noutput_dir = 'out'\n[expect]\nnum_hidden_layers = 3\nrotary_base = 10000.0\n")
    expect = {"num_hidden_layers": 3, "rotary_base": 10000.0}
    assert plan(job).id == plan(model_dir=model, output_dir=output, expect=expect).id == plan(model_dir=model, output_dir=output).id
    with pytest.raises(BadInput) as caught:
        plan(job, expect={"num_hidden_layers": 2, "n_layer": 3})
    assert [problem.subject for problem in caught.value.problems] == ["expect.n_layer", "--n_layer 2"]
    assert headrace("batch", job, "--dry_run").code == 0


def test_a_shape_beside_that_of_a_job_file_is_one_more(model: Path) -> None:
    job = model.parent / "job.toml"
    job.write_text("model_dir = 'model'\noutput_dir = 'out'\n[expect]\nnum_hidden_layers = 3\nhidden_size = 1\n")
    own = SHAPE["vocab_size"][0]
    assert "--n_embd 1: found hidden_size" in one(refused_by(job, "--vocab_size", own))
    assert one(refused_by(job, "--n_embd", SHAPE["n_embd"][0], "--n_layer", 4)).startswith("--n_layer 4: found")
    assert headrace("plan", job, "--n_embd", SHAPE["n_embd"][0]).code == 0


def refused_by(job: Path, *words: object) -> list[str]:
    """The problems that a plan of a job file is refused with."""
    ran = headrace("plan", job, *words)
    assert ran.code == 2, ran
    return [line.removeprefix("  - ") for line in ran.err.splitlines() if line.startswith("  - ")]


def test_a_batch_does_what_was_pasted(model: Path) -> None:
    """Each of its conversions is a process of its own that reads a job file."""
    words = ("--model_dir", model, "--output_dir", model.parent / "out")
    assert headrace("batch", *words, "--world-size", 2, "--n_layer", 3, "--hidden_act", "silu", "--log_level", "info").code == 0
    assert json.loads((model.parent / "out" / "config.json").read_text())["mapping"]["tp_size"] == 2


@spellings
@pytest.mark.parametrize("flag", REFUSED)
def test_a_flag_that_is_refused(flag: str, dashed: bool, model: Path) -> None:
    (name, *value), remedy = REFUSED[flag]
    words = [spelled(name.removeprefix("--"), dashed), *value]
    problem = one(refused(model, *words))
    assert problem.startswith(f"--{' '.join([flag, *value])}: found ")
    assert remedy in problem
    for command in ("plan", "batch"):
        before = tree(model.parent)
        ran = headrace(command, "--model_dir", model, "--output_dir", model.parent / "out", *words)
        assert (ran.code, tree(model.parent)) == (2, before)
        assert remedy in ran.err


@pytest.mark.parametrize("words", [("-sq", "0.5"), ("-sq=0.5",), ("--smoothquant=0.5",)], ids=str)
def test_the_short_name_of_smoothquant(words: tuple[str, ...], model: Path) -> None:
    problems = refused(model, "--quantization", "int8", *words)
    assert problems[0].startswith("--quantization int8: found --smoothquant 0.5 beside it")


def test_all_that_is_wrong_comes_together(model: Path) -> None:
    problems = refused(model, "--save_config_only", "--ckpt_type", "keras", "--dtype", "float8")
    subjects = ["--ckpt_type", "--save_config_only", "--dtype"]
    assert [problem.partition(":")[0] for problem in problems] == subjects


def test_a_remedy_is_true(model: Path) -> None:
    """config.json is what `plan --json` prints."""
    output = model.parent / "out"
    said = headrace("plan", "--model_dir", model, "--output_dir", output, "--tp_size", 2, "--json")
    assert convert(model, output, "--tp_size", 2).code == 0
    (target,) = json.loads(said.out)["targets"]
    assert json.dumps(target["config"], indent=4) == (output / "config.json").read_text()


def test_gemmas_names(model: Path) -> None:
    words = ("--ckpt-type", "hf", "--model-dir", model, "--output-model-dir", model.parent / "theirs", "--world-size", 2)
    assert headrace("convert", *words, "--scheduler", "threads").code == 0
    assert convert(model, model.parent / "ours", "--tp_size", 2).code == 0
    assert contents(model.parent / "theirs") == contents(model.parent / "ours")
    ran = headrace("batch", *words, "--dry_run", "--json")
    assert (ran.code, json.loads(ran.out)["units"][0]["state"]) == (0, "up_to_date")


def test_gemmas_name_of_fp8(tmp_path: Path) -> None:
    quantized_checkpoints.write(tmp_path / "model", quantized_checkpoints.LLAMA, quantized_checkpoints.modelopt_float8())
    assert convert(tmp_path / "model", tmp_path / "theirs", "--enable-fp8").code == 0
    assert convert(tmp_path / "model", tmp_path / "ours", "--use_fp8").code == 0
    assert contents(tmp_path / "theirs") == contents(tmp_path / "ours")
    checkpoints.write(tmp_path / "plain", LLAMA)
    assert "--use_fp8" in one(refused(tmp_path / "plain", "--enable_fp8", output=tmp_path / "x"))


def test_two_names_of_one_option_that_differ(model: Path) -> None:
    problem = one(refused(model, "--world_size", 2, "--tp_size", 4))
    assert problem == "--world_size 2: found --tp_size 4 beside it; expected one of the two: they are one option"
    assert convert(model, model.parent / "out", "--world_size", 2, "--tp_size", 2).code == 0


@pytest.mark.parametrize("level", ["internal_error", "error", "warning", "info", "verbose", "debug", "trace"])
def test_log_levels(level: str, model: Path) -> None:
    ran = convert(model, model.parent / "out", "--log-level", level)
    assert ran.code == 0
    assert bool(ran.out or ran.err) == (level not in ("internal_error", "error"))
    assert headrace("plan", "--model_dir", model, "--output_dir", model.parent / "out", "--log_level", level).out


def test_a_batch_heeds_a_log_level(model: Path) -> None:
    words = ("--model_dir", model, "--output_dir", model.parent / "out-{tp_size}", "--tp_size", "1,3")
    quiet = headrace("batch", *words, "--log_level", "error")
    assert (quiet.code, quiet.out) == (2, "")
    (line,) = [each for each in quiet.err.splitlines() if not each.startswith("  - ")]
    assert "out-3: " in line, "what is wrong, and nothing else"
    assert headrace("batch", *words[:-1], 1, "--quiet") == Ran(0, "", "")
    loud = headrace("batch", *words[:-1], 1, "--log_level", "info")
    assert (loud.code, bool(loud.out)) == (0, True)


def test_a_log_level_that_is_none(model: Path) -> None:
    assert one(refused(model, "--log_level", "loud")).startswith("--log_level: found 'loud'; expected internal_error or error or")


def test_workers_are_threads(model: Path) -> None:
    ran = headrace("plan", "--model_dir", model, "--output_dir", model.parent / "out", "--tp_size", 4, "--workers", 4, "--json")
    assert json.loads(ran.out)["workers"] == 4
    text = " ".join(re.sub("[│╭╰─╮╯]", " ", headrace("convert", "--help").out).split())
    assert "ranks at once" in text
