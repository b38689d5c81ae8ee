"""`--sm`: what a plan says of the GPUs that integer weights are for; weights in no order, and what cannot be without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from pipeline import convert, plan
from pipeline.model.kernels import ANY, generations
from pipeline.planning.job import Job
from pipeline.reporting.verification import verify
from tests.support import checkpoints, gguf_files
from tests.support import quantized_checkpoints as source
from tests.support.commands import headrace, one, refused
from tests.support.directories import contents

LLAMA = {**source.LLAMA, "num_hidden_layers": 1}
MIXTRAL = {**source.MIXTRAL, "num_hidden_layers": 1}
INT8: dict[str, Any] = {"use_weight_only": True}
INT4: dict[str, Any] = {**INT8, "weight_only_precision": "int4"}
ALIKE = "GPUs of generation 75, 80, 86, 87, 89, 120 and 121 read (--sm 80, the default)"


def model_of(tmp_path: Path, kind: str = "", config: dict[str, Any] = LLAMA) -> Path:
    if kind:
        source.write(tmp_path / "model", config, source.formats()[kind])
    else:
        checkpoints.save(tmp_path / "model", config, source.values(config))
    return tmp_path / "model"


def notes(model: Path, **options: Any) -> str:
    made = plan(model_dir=model, output_dir=model.parent / "out", **options).notes
    return "\n".join(note for note in made if "in the last" not in note)  # the model was written a moment ago


def test_the_options_are_those_of_the_table() -> None:
    assert get_args(Job.model_fields["sm"].annotation) == (*generations(), ANY)


def test_without_a_generation_the_plan_says_which_it_is_for(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    for options in (INT8, INT4):
        assert ALIKE in notes(model, **options)
        assert ALIKE in notes(model, **options, tp_size=2)
        assert notes(model, **options, sm=80) == notes(model, **options, sm=100) == ""
    assert notes(model) == notes(model, use_fp8_rowwise=True) == ""
    said = headrace("plan", "--model_dir", model, "--output_dir", tmp_path / "out", "--use_weight_only").out
    assert "75, 80, 86, 87, 89, 120 and 121" in " ".join(said.split())


def test_each_target_of_a_job_file_may_name_its_own(tmp_path: Path) -> None:
    model, tables = model_of(tmp_path), [{"output_dir": tmp_path / "a", "sm": 90}, {"output_dir": tmp_path / "b", "sm": "any"}]
    said = [note for note in plan(model_dir=model, target=tables, **INT8).notes if "in the last" not in note]
    assert [ALIKE in note for note in said] == [False]
    assert any(ALIKE in note for note in plan(model_dir=model, target=[tables[0], {"output_dir": tmp_path / "c"}], **INT8).notes)


def test_codes_of_a_source_have_an_order_too(tmp_path: Path) -> None:
    model = model_of(tmp_path, "gptq")
    assert ALIKE in notes(model)
    assert ALIKE not in notes(model, dequantize=True)


@pytest.mark.parametrize("sm", [120, 121, "any"])
def test_what_the_loader_arranges_wrongly_is_said_aloud(sm: Any, tmp_path: Path) -> None:
    model = model_of(tmp_path, "modelopt awq")
    assert "1.2's loader arranges W4A16_AWQ weights wrongly on GPUs of 120 and 121" in notes(model, sm=sm)
    assert notes(model) == notes(model, sm=90) == notes(model, sm=sm, dequantize=True) == ""


# --- weights in no order


@pytest.mark.parametrize("config", [LLAMA, MIXTRAL], ids=["llama", "mixtral"])
@pytest.mark.parametrize("options", [INT8, INT4], ids=["int8", "int4"])
def test_numbers_that_the_loader_quantizes(options: dict[str, Any], config: dict[str, Any], tmp_path: Path) -> None:
    """The ranks are those of an unquantized target, and config.json that of a quantized one."""
    model = model_of(tmp_path, config=config)
    common: dict[str, Any] = {"model_dir": model, "tp_size": 2, "scheduler": "threads"}
    convert(output_dir=tmp_path / "any", sm="any", **options, **common)
    convert(output_dir=tmp_path / "plain", **common)
    convert(output_dir=tmp_path / "codes", **options, **common)
    unordered, plain_, codes = (contents(tmp_path / name) for name in ("any", "plain", "codes"))
    assert unordered["config.json"] == codes["config.json"] != plain_["config.json"]
    for rank in range(2):
        assert unordered[f"rank{rank}.safetensors"] == plain_[f"rank{rank}.safetensors"]
    said = json.loads((tmp_path / "any/headrace.json").read_text())
    assert said["options"]["sm"] == "any"
    assert any("the builder's own GPU" in note for note in said["notes"])
    result = verify(tmp_path / "any", model, logits=True)
    result.check()
    assert result.round_trip is not None
    assert all(row["exact"] for row in result.round_trip["tensors"])


@pytest.mark.parametrize("kind", ["gptq", "compressed fp8", "modelopt awq", "compressed w8a8"])
def test_numbers_made_of_a_packed_source(kind: str, tmp_path: Path) -> None:
    model = model_of(tmp_path, kind)
    convert(model_dir=model, output_dir=tmp_path / "out", sm="any", dequantize=True, tp_size=2, scheduler="threads", **INT8)
    verify(tmp_path / "out", model).check()
    weight = load_file(tmp_path / "out/rank0.safetensors")["transformer.layers.0.mlp.fc.weight"]
    assert str(weight.dtype) == "torch.float16"


def test_numbers_of_a_gguf_file(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "model.gguf", LLAMA, source.values(LLAMA), "Q8_0")
    convert(model_dir=tmp_path / "model.gguf", output_dir=tmp_path / "out", sm="any", scheduler="threads", **INT4)
    verify(tmp_path / "out", tmp_path / "model.gguf").check()


def test_tiles_are_asked_for_all_the_same(tmp_path: Path) -> None:
    """The loader pads what is no whole tile, whoever has quantized it."""
    model = model_of(tmp_path, config={**LLAMA, "intermediate_size": 288})
    assert "288 a rank; expected a multiple of 64" in one(refused(model, "--use_weight_only", "--sm", "any"))


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        *(("gptq", ()), ("gptq 8 bits", ()), ("awq", ()), ("compressed w4a16", ()), ("gptq", ("--requantize",))),
        *(("compressed w8a8", ()), ("gptq a row", ())),
    ],
    ids=str,
)
def test_codes_that_only_one_order_can_be_of(kind: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    """The loader would make other codes of those that have a scale a row, of the numbers that they stand for."""
    problem = one(refused(model_of(tmp_path, kind), "--sm", "any", *flags))
    algorithm = source.formats()[kind].algorithm
    assert problem.startswith(f"--sm any: found {algorithm} codes; expected the GPU's generation")
    assert "--dequantize --use_weight_only --sm any" in problem


@pytest.mark.parametrize("kind", ["", "compressed fp8", "compressed fp8 dynamic", "modelopt awq"])
def test_what_has_no_order_anyway(kind: str, tmp_path: Path) -> None:
    model, common = model_of(tmp_path, kind), {"scheduler": "threads"}
    for sm in ("any", 80):
        convert(model_dir=model, output_dir=tmp_path / str(sm), sm=sm, **common)
    assert contents(tmp_path / "any") == contents(tmp_path / "80")
    verify(tmp_path / "any", model).check()


@pytest.mark.parametrize(("kind", "options"), [("", INT8), ("gptq", {})], ids=["int8", "gptq"])
def test_codes_where_numbers_are_said_to_be(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = model_of(tmp_path, kind)
    convert(model_dir=model, output_dir=tmp_path / "out", sm=80, tp_size=2, scheduler="threads", **options)
    path = tmp_path / "out/headrace.json"
    said = json.loads(path.read_text())
    said["options"]["sm"] = "any"
    path.write_text(json.dumps(said))
    (finding,) = verify(tmp_path / "out", model).findings
    assert finding.level == "integrity"
    assert finding.problem.found.endswith("which are in the order of one generation of GPUs")


def test_numbers_that_were_changed(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    convert(model_dir=model, output_dir=tmp_path / "out", sm="any", scheduler="threads", **INT8)
    path, name = tmp_path / "out/rank0.safetensors", "transformer.layers.0.mlp.fc.weight"
    tensors = load_file(path)
    tensors[name][3, 5] += 1
    save_file(tensors, path)
    assert any(name in finding.problem.subject for finding in verify(tmp_path / "out", model).findings)
    assert np.isfinite(tensors[name].float().numpy()).all()
