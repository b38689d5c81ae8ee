"""`quantization` and NVIDIA's flags are two ways to ask for one thing: the same plan, the same bytes, and never both at odds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from pipeline import BadInput, Job, plan
from pipeline.model.quantization import Quantization
from pipeline.planning.job import make_job
from pipeline.planning.keywords import QuantizationName
from pipeline.planning.quantizations import QUANTIZATIONS
from tests.support import act_ranges, checkpoints, quantized_checkpoints
from tests.support.commands import convert as run
from tests.support.commands import headrace, one, refused
from tests.support.directories import contents

# name -> NVIDIA's flags as people type them, and a kind of source that can have it. Written by hand, not from the table.
ASKED: dict[str, tuple[tuple[str, ...], quantized_checkpoints.Format | None]] = {
    "none": ((), None),
    "int8": (("--use_weight_only",), None),
    "int4": (("--use_weight_only", "--weight_only_precision", "int4"), None),
    "int4_gptq": (("--use_weight_only", "--weight_only_precision", "int4_gptq"), quantized_checkpoints.gptq()),
    "int8_gptq": (("--use_weight_only", "--weight_only_precision", "int8_gptq"), quantized_checkpoints.gptq(bits=8)),
    "int4_awq": (("--use_weight_only", "--weight_only_precision", "int4_awq"), quantized_checkpoints.modelopt_awq()),
    "fp8": (("--use_fp8",), quantized_checkpoints.modelopt_float8()),
    "fp8_rowwise": (("--use_fp8_rowwise",), None),
    "nvfp4": (("--use_nvfp4",), quantized_checkpoints.nvfp4()),
}
# Those of measured activations: of float16 alone, and with a file of ranges.
SMOOTHED: dict[str, tuple[str, ...]] = {
    "w8a8_sq": ("--smoothquant", "0.5", "--per_channel", "--per_token"),
    "w8a8_sq_per_channel": ("-sq", "0.5", "--per_channel"),
    "w8a8_sq_per_token": ("--smoothquant", "0.5", "--per_token"),
    "w8a8_sq_per_tensor": ("--smoothquant", "0.5"),
}
ALGORITHMS = {
    "none": None,
    "int8": "W8A16",
    "int4": "W4A16",
    "int4_gptq": "W4A16_GPTQ",
    "int8_gptq": "W8A16_GPTQ",
    "int4_awq": "W4A16_AWQ",
    "fp8": "FP8",
    "fp8_rowwise": "FP8_PER_CHANNEL_PER_TOKEN",
    "nvfp4": "NVFP4",
    "w8a8_sq": "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN",
    "w8a8_sq_per_channel": "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN",
    "w8a8_sq_per_token": "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN",
    "w8a8_sq_per_tensor": "W8A8_SQ_PER_TENSOR_PLUGIN",
}
CONFIG = quantized_checkpoints.LLAMA


def made(folder: Path, kind: quantized_checkpoints.Format | None) -> Path:
    if kind is None:
        checkpoints.save(folder, CONFIG, quantized_checkpoints.values(CONFIG))
    else:
        quantized_checkpoints.write(folder, CONFIG, kind)
    return folder


def test_every_name_is_tried_here() -> None:
    assert ASKED.keys() | SMOOTHED.keys() == QUANTIZATIONS.keys() == set(get_args(QuantizationName))
    assert {name: row.algorithm for name, row in QUANTIZATIONS.items()} == ALGORITHMS


@pytest.mark.parametrize("name", ASKED)
def test_a_name_is_its_flags(name: str, tmp_path: Path) -> None:
    flags, kind = ASKED[name]
    model = made(tmp_path / "model", kind)
    for more, output in (((f"--quantization={name}",), "named"), (flags, "flags"), ((*flags, "--quantization", name), "both")):
        ran = run(model, tmp_path / output, "--dtype", "bfloat16", "--tp_size", 2, "--quiet", *more)
        assert ran.code == 0, ran
    assert contents(tmp_path / "named") == contents(tmp_path / "flags") == contents(tmp_path / "both")
    algorithm = json.loads((tmp_path / "named" / "config.json").read_text())["quantization"]["quant_algo"]
    assert algorithm == Quantization(ALGORITHMS[name]).config()["quant_algo"]
    again = headrace("convert", "--model_dir", model, "--output_dir", tmp_path / "flags", "--dtype", "bfloat16", "--tp_size", 2,
                     "--scheduler", "threads", "--quantization", name)  # fmt: skip
    assert "up to date" in again.out, "not the same plan"


@pytest.mark.parametrize("name", SMOOTHED)
def test_a_name_of_smoothquant_is_its_flags(name: str, tmp_path: Path) -> None:
    model, ranges = made(tmp_path / "model", None), act_ranges.write(tmp_path / "ranges", quantized_checkpoints.values(CONFIG))
    shape = ("--dtype", "float16", "--tp_size", 2, "--act_range", ranges, "--quiet")
    named = (f"--quantization={name}",)
    for more, output in ((named, "named"), (SMOOTHED[name], "flags"), ((*SMOOTHED[name], *named), "both")):
        assert run(model, tmp_path / output, *shape, *more).code == 0
    assert contents(tmp_path / "named") == contents(tmp_path / "flags") == contents(tmp_path / "both")
    written = json.loads((tmp_path / "named" / "config.json").read_text())["quantization"]
    assert (written["quant_algo"], written["smoothquant_val"]) == (ALGORITHMS[name], 0.5)
    other = ("--smoothquant", 0.8, *SMOOTHED[name][2:])
    for more, output in (((*named, "--smoothquant", 0.8), "0.8"), (other, "0.8 by flags")):
        assert run(model, tmp_path / output, *shape, *more).code == 0
    assert contents(tmp_path / "0.8") == contents(tmp_path / "0.8 by flags") != contents(tmp_path / "named")
    assert json.loads((tmp_path / "0.8" / "config.json").read_text())["quantization"]["smoothquant_val"] == 0.8
    job = make_job({"model_dir": model, "output_dir": tmp_path, "quantization": name, "smoothquant": 0.8})
    assert (job.quantization, job.smoothquant) == (name, 0.8)


@pytest.mark.parametrize("name", ASKED)
def test_a_name_in_a_job_a_target_and_a_job_file(name: str, tmp_path: Path) -> None:
    flags, kind = ASKED[name]
    model, output = made(tmp_path / "model", kind), tmp_path / "out"
    values = {"dtype": "bfloat16", "scheduler": "threads"}
    (tmp_path / "job.toml").write_text(f'model_dir = "model"\noutput_dir = "out"\ndtype = "bfloat16"\nquantization = "{name}"\n')
    (tmp_path / "targets.toml").write_text(
        f'model_dir = "model"\n[[target]]\noutput_dir = "out"\ndtype = "bfloat16"\nquantization = "{name}"\n'
    )
    options: dict[str, Any] = {}
    for word in flags:
        if word.startswith("--"):
            options[last := word.removeprefix("--")] = True
        else:
            options[last] = word
    ids = {
        plan(model_dir=model, output_dir=output, **values, **options).id,
        plan(model_dir=model, output_dir=output, **values, quantization=name).id,
        plan(Job(model_dir=model, output_dir=output, **values, quantization=name)).id,
        plan(model_dir=model, target=[{"output_dir": output, "quantization": name}], **values).id,
        plan(tmp_path / "job.toml").id,
        plan(tmp_path / "targets.toml").id,
    }
    assert len(ids) == 1
    by_flags = make_job({"model_dir": model, "output_dir": output, **options})
    assert by_flags.quantization == name, "the name follows from the flags"
    assert by_flags == make_job({"model_dir": model, "output_dir": output, "quantization": name})


AT_ODDS = [
    (("--quantization", "int8", "--use_fp8_rowwise"), "--use_fp8_rowwise beside it"),
    (("--quantization", "int4", "--use_weight_only"), "--weight_only_precision int8 beside it"),
    (("--quantization", "int4", "--use_weight_only", "--weight_only_precision", "int8"), "--weight_only_precision int8 beside it"),
    (("--quantization", "none", "--use_fp8"), "--use_fp8 beside it"),
    (("--quantization", "w8a8_sq", "--no_per_token"), "--no_per_token beside it"),
    (("--quantization", "w8a8_sq_per_tensor", "--per_channel"), "--per_channel beside it"),
    (("--quantization", "int8", "--smoothquant", "0.5"), "--smoothquant 0.5 beside it"),
    (("--quantization", "fp8", "--no_use_fp8"), "--no_use_fp8 beside it"),
]


@pytest.mark.parametrize(("flags", "found"), AT_ODDS, ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_a_name_and_flags_that_say_something_else(flags: tuple[str, ...], found: str, tmp_path: Path) -> None:
    model = made(tmp_path / "model", None)
    problem = one(refused(model, *flags))
    assert problem.startswith(f"--quantization {flags[1]}: found {found}; expected what {flags[1]} stands for")


def test_all_problems_come_together(tmp_path: Path) -> None:
    options = {"model_dir": tmp_path, "dtype": "float8", "quantization": "int8", "use_fp8": True, "mlp_bias": "drop"}
    with pytest.raises(BadInput) as caught:
        make_job({**options, "output_dir": tmp_path / "out"})
    assert [problem.subject for problem in caught.value.problems] == ["--quantization int8", "--dtype", "--mlp_bias"]
    with pytest.raises(BadInput) as caught:
        make_job({"model_dir": tmp_path, "target": [{"output_dir": "a", "quantization": "fp8", "use_weight_only": True}, {}]})
    assert caught.value.problems[0].subject == "--quantization fp8"


@pytest.mark.parametrize("precision", ["int8", "int4", "int4_gptq", "int8_gptq", "int4_awq"])
def test_a_precision_without_weights_that_are_quantized_is_refused(precision: str, tmp_path: Path) -> None:
    model = made(tmp_path / "model", None)
    problem = one(refused(model, "--weight-only-precision", precision))
    assert problem.startswith(f"--weight_only_precision {precision}: found no --use_weight_only")
    assert f"--quantization {precision}" in problem
    with pytest.raises(BadInput, match="found no --use_weight_only"):
        plan(model_dir=model, target=[{"output_dir": tmp_path / "x", "weight_only_precision": precision}])


def test_a_precision_that_one_target_uses_may_stand_above_all(tmp_path: Path) -> None:
    model = made(tmp_path / "model", None)
    target = [{"output_dir": tmp_path / "x"}, {"output_dir": tmp_path / "y", "use_weight_only": True}]
    job = make_job({"model_dir": model, "target": target, "weight_only_precision": "int4"})
    assert [each.quantization for each in job.targets] == ["none", "int4"]


def test_what_is_nearer_wins(tmp_path: Path) -> None:
    """A target over its job, and an option over a file, whichever of the two ways each is written in."""
    (tmp_path / "m").mkdir()
    base = {"model_dir": tmp_path / "m"}

    def names(table: dict[str, Any], **above: Any) -> str:
        (each,) = make_job({**base, **above, "target": [{"output_dir": tmp_path / "x", **table}]}).targets
        return each.quantization

    assert names({}, quantization="int4") == "int4"
    assert names({"quantization": "fp8_rowwise"}, quantization="int4") == "fp8_rowwise"
    assert names({"quantization": "fp8_rowwise"}, use_weight_only=True) == "fp8_rowwise"
    assert names({"quantization": "none"}, use_weight_only=True) == "none"
    assert names({"weight_only_precision": "int8"}, quantization="int4") == "int8"
    assert names({"use_weight_only": False, "use_fp8": True}, quantization="int4") == "fp8"

    file = tmp_path / "job.toml"
    file.write_text('model_dir = "m"\noutput_dir = "x"\nquantization = "int4"\n')
    assert make_job({"use_weight_only": False}, file).quantization == "none"
    assert make_job({"quantization": "fp8"}, file).quantization == "fp8"
    assert make_job({"weight_only_precision": "int8"}, file).quantization == "int8"
    file.write_text(
        'model_dir = "m"\n[[target]]\noutput_dir = "x"\nuse_fp8 = true\n[[target]]\noutput_dir = "y"\nquantization = "int8"\n'
    )
    assert [each.quantization for each in make_job({"quantization": "int4"}, file).targets] == ["int4", "int4"]
    assert [each.quantization for each in make_job({}, file).targets] == ["fp8", "int8"]
