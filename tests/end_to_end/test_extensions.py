"""A format and a source from another package, by the public API and the command line: they convert as our own do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import BadInput, convert
from stages.quantization.packed_format import PackedFormat
from stages.quantization.sources import format_named
from tests.support import checkpoints
from tests.support import quantized_checkpoints as source
from tests.support.commands import headrace
from tests.support.directories import contents
from tests.support.extensions import TOY, installed, toy_entry_points
from tests.support.quantized_checkpoints import LLAMA, MIXTRAL, Arrays, Format, Packed

PHI = {**LLAMA, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
FUSED = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}
FLAGS: dict[str, Any] = {"scheduler": "threads", "tp_size": 2}


@pytest.fixture(autouse=True)
def _toy(tmp_path: Path) -> Iterator[None]:
    with installed(tmp_path / "site", TOY, toy_entry_points()):
        yield


def toy() -> Format:
    """The toy's format, whose codes and scales are those of symmetric GPTQ."""

    def quantize(module: str, weight: np.ndarray) -> Packed:  # noqa: ARG001
        codes, zeros, scales = source.grouped(weight, 4, 64, True, np.dtype(np.float16))
        return Packed({"levels": codes.T.astype(np.uint8), "steps": scales.T}, source.numbers(codes, zeros, scales))

    return Format(quantize, {"quant_method": "toy"}, "W4A16_GPTQ")


def values(config: dict[str, Any]) -> Arrays:
    """A float model; Phi-3's has q, k and v, and both halves of the MLP, as one tensor each."""
    tensors = source.values(config)
    if config is PHI:
        for layer in range(config["num_hidden_layers"]):
            for whole, parts in FUSED.items():
                folder = f"model.layers.{layer}.{whole.partition('.')[0]}"
                held = [tensors.pop(f"{folder}.{part}.weight") for part in parts]
                tensors[f"model.layers.{layer}.{whole}.weight"] = np.concatenate(held)
    return tensors


def write_folder(directory: Path, config: dict[str, Any], tensors: Arrays) -> None:
    """A checkpoint of the toy's source."""
    directory.mkdir()
    (directory / "model.json").write_text(json.dumps(config))
    for name, array in tensors.items():
        np.save(directory / f"{name}.npy", np.ascontiguousarray(array))


@pytest.mark.parametrize("config", [LLAMA, PHI, MIXTRAL], ids=["llama", "fused", "experts"])
@pytest.mark.parametrize("flags", [{}, {"dequantize": True}], ids=["codes", "numbers"])
def test_a_format_converts_as_one_of_our_own(config: dict[str, Any], flags: dict[str, Any], tmp_path: Path) -> None:
    for name, kind in {"toy": toy(), "gptq": source.gptq()}.items():
        source.write(tmp_path / name, config, kind, tensors=values(config))
        convert(model_dir=tmp_path / name, output_dir=tmp_path / f"out-{name}", **FLAGS, **flags)
    assert contents(tmp_path / "out-toy") == contents(tmp_path / "out-gptq")
    written = json.loads((tmp_path / "out-toy/config.json").read_text())["quantization"]["quant_algo"]
    assert written == (None if flags else "W4A16_GPTQ")


def test_a_source_converts_as_one_of_our_own(tmp_path: Path) -> None:
    tensors = checkpoints.write(tmp_path / "ours", checkpoints.LLAMA)
    write_folder(tmp_path / "theirs", checkpoints.LLAMA, tensors)
    for name in ("ours", "theirs"):
        convert(model_dir=tmp_path / name, output_dir=tmp_path / f"out-{name}", **FLAGS)
    assert contents(tmp_path / "out-theirs") == contents(tmp_path / "out-ours")


def test_a_format_in_a_source_both_from_outside(tmp_path: Path) -> None:
    stored, _ = source.quantized(values(LLAMA), toy(), LLAMA["num_hidden_layers"])
    write_folder(tmp_path / "theirs", source.described(LLAMA, toy()), stored)
    source.write(tmp_path / "ours", LLAMA, source.gptq(), tensors=values(LLAMA))
    for name in ("ours", "theirs"):
        convert(model_dir=tmp_path / name, output_dir=tmp_path / f"out-{name}", **FLAGS)
    assert contents(tmp_path / "out-theirs") == contents(tmp_path / "out-ours")


def test_what_the_format_refuses_is_said_before_a_byte_is_written(tmp_path: Path) -> None:
    stored, _ = source.quantized(values(LLAMA), toy(), LLAMA["num_hidden_layers"])
    module = "model.layers.1.mlp.down_proj"
    stored[f"{module}.steps"] = stored[f"{module}.steps"][:, 1:]
    checkpoints.save(
        tmp_path / "model", source.described(LLAMA, toy()), {key: np.ascontiguousarray(v) for key, v in stored.items()}
    )
    with pytest.raises(BadInput) as refused:
        convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", **FLAGS)
    (problem,) = refused.value.problems
    assert str(problem) == f"{module}.steps: found shape [8, 255]; expected [groups of 512, 256]"
    assert not (tmp_path / "out").exists()


def test_without_an_algorithm_of_tensorrt_llm_it_becomes_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(format_named("toy")), "native", PackedFormat.native)
    source.write(tmp_path / "model", LLAMA, toy())
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", **FLAGS)
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "same", dequantize=True, **FLAGS)
    assert contents(tmp_path / "out") == contents(tmp_path / "same")


def test_the_command_line_lists_and_knows_them(tmp_path: Path) -> None:
    said = json.loads(headrace("formats", "--json").out)
    (found,) = [each for each in said["quantized"] if each["name"] == "toy"]
    assert found["is"] == "Toy: a code of 4 bits a byte, in-features first, and a step for each group of in-features"
    assert said["sources"][0]["name"] == "huggingface"
    assert said["sources"][-1]["name"] == "numpy-folder"
    source.write(tmp_path / "model", LLAMA, toy())
    assert json.loads(headrace("inspect", tmp_path / "model", "--json").out)["quantization"] == "toy"
    (tmp_path / "nothing").mkdir()
    ran = headrace("plan", "--model_dir", tmp_path / "nothing", "--output_dir", tmp_path / "out")
    assert ran.code == 2
    assert "or a folder of .npy files with a model.json" in ran.err


def test_a_broken_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/toy_broken.py").write_text("FORMAT = object()\n")
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    groups = {"headrace.formats": {"broken": "toy_broken:FORMAT"}}
    with installed(tmp_path / "other", tmp_path / "modules", groups), pytest.raises(BadInput) as refused:
        convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", **FLAGS)
    (problem,) = refused.value.problems
    assert problem.subject == "entry point broken of headrace.formats of the package toy"
    members = (
        "name, title, numbers, keeps, proof, parameters, accepts, arrange, check, module_settings, unpack, heights, act_order, "
        "native, zero_points, notes"
    )
    assert problem.found == f"toy_broken:FORMAT without {members}"
