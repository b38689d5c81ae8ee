"""read, GGUF: tensors as they are packed, and metadata under the names that the family's table asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from pipeline.errors import BadInput
from pipeline.model.model_config import ModelConfig, model_config
from pipeline.model.tables import find_family
from pipeline.tensor.tensors import Source
from stages.read import open_source, read
from tests.support import checkpoints, gguf_files
from tests.support.checkpoints import LLAMA3
from tests.support.lazy import values

# Heads wide enough for wavelengths in all three bands of Llama 3.1's rule.
LLAMA31 = {**checkpoints.LLAMA, "head_dim": 64, "rope_theta": 500000.0}


def write(path: Path, kind: str = "F16", config: dict[str, Any] = checkpoints.LLAMA, **more: Any) -> dict[str, np.ndarray]:
    return gguf_files.write(path, config, checkpoints.values(config), kind, **more)


def configured(source: Source) -> ModelConfig:
    family = find_family("gguf", source.architecture)
    assert family is not None
    return model_config(source.config, family, source.architecture, source.config_name)


def factors(scaling: dict[str, Any], base: float, head_size: int) -> np.ndarray:
    """What llama.cpp's converter stores as `rope_freqs`, in its own words."""
    result = []
    for exponent in range(0, head_size, 2):
        wavelength = 2 * np.pi * base ** (exponent / head_size)
        low = scaling["original_max_position_embeddings"] / scaling["low_freq_factor"]
        high = scaling["original_max_position_embeddings"] / scaling["high_freq_factor"]
        if wavelength < high:
            result.append(1.0)
        elif wavelength > low:
            result.append(scaling["factor"])
        else:
            smooth = scaling["original_max_position_embeddings"] / wavelength - scaling["low_freq_factor"]
            smooth /= scaling["high_freq_factor"] - scaling["low_freq_factor"]
            result.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(result, dtype=np.float32)


def test_metadata_is_the_configuration(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", config={**checkpoints.LLAMA, "head_dim": 16, "rope_theta": 50000.0})
    model = configured(open_source(tmp_path / "model.gguf"))
    assert (model.architecture, model.vocab_size, model.hidden_size, model.num_hidden_layers) == ("LlamaForCausalLM", 96, 64, 3)
    assert (model.num_attention_heads, model.num_key_value_heads, model.head_size) == (8, 4, 16)
    assert (model.intermediate_size, model.max_position_embeddings, model.hidden_act) == (160, 128, "silu")
    # Stored as float32: the number that was meant, not its nearest double.
    assert (model.norm_epsilon, model.rotary_base, model.rotary_scaling) == (1e-5, 50000.0, None)
    assert (model.attn_bias, model.num_experts) == (False, 0)


def test_a_bias_of_the_attention_is_seen(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", config={**checkpoints.LLAMA, "attention_bias": True})
    assert configured(open_source(tmp_path / "model.gguf")).attn_bias


@pytest.mark.parametrize(("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")])
def test_plain_tensors_keep_their_names_and_bytes(kind: str, dtype: str, tmp_path: Path) -> None:
    held = write(tmp_path / "model.gguf", kind)
    source = open_source(tmp_path / "model.gguf")
    assert (source.container, source.architecture, source.dtype) == ("gguf", "llama", dtype)
    assert source.tensors.keys() == held.keys()
    for name, array in read(source.tensors, 1000, 4).items():
        assert array.dtype.name == (dtype if array.ndim > 1 else "float32")
        assert values(array).astype(np.float32).tobytes() == held[name].tobytes(), name


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def test_packed_tensors_stay_packed_under_their_type(kind: str, tmp_path: Path) -> None:
    held = write(tmp_path / "model.gguf", kind)
    source = open_source(tmp_path / "model.gguf")
    assert source.dtype is None
    assert kind in source.kind
    quantization = gguf.GGMLQuantizationType[kind]
    for name, array in held.items():
        packed = name.removesuffix("weight") + f"gguf_{kind}"
        assert (name in source.tensors, packed in source.tensors) == (array.ndim == 1, array.ndim > 1)
        if array.ndim > 1:
            bytes_ = values(read(source.tensors, 1000, 4)[packed])
            assert bytes_.dtype == np.uint8
            assert gguf.quants.dequantize(bytes_, quantization).tobytes() == array.tobytes(), name


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_experts_come_in_stacks(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", kind, checkpoints.MIXTRAL)
    source = open_source(tmp_path / "model.gguf")
    assert source.architecture == "llama+experts"
    model = configured(source)
    assert (model.architecture, model.num_experts, model.experts_per_token) == ("MixtralForCausalLM", 4, 2)
    parameter = "weight" if kind == "F16" else f"gguf_{kind}"
    assert source.tensors[f"blk.0.ffn_gate_exps.{parameter}"].shape[:2] == (4, 160)
    assert source.tensors["blk.0.ffn_gate_inp.weight"].dtype == np.float32


@pytest.mark.parametrize("as_directory", [False, True])
def test_parts_are_one_source(as_directory: bool, tmp_path: Path) -> None:
    held = write(tmp_path / "model.gguf", parts=3)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"model-{n:05}-of-00003.gguf" for n in (1, 2, 3)]
    source = open_source(tmp_path if as_directory else tmp_path / names[1])
    assert [file.path.name for file in source.files] == names
    assert source.tensors.keys() == held.keys()
    assert configured(source).num_hidden_layers == 3
    for name, array in read(source.tensors, 1 << 20, 1).items():
        assert values(array).astype(np.float32).tobytes() == held[name].tobytes(), name


def test_a_missing_part_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", parts=3)
    (tmp_path / "model-00002-of-00003.gguf").unlink()
    with pytest.raises(BadInput, match="model-00002-of-00003"):
        open_source(tmp_path / "model-00001-of-00003.gguf")


@pytest.mark.parametrize("other", ["model.gguf", "other-00001-of-00002.gguf"])
def test_parts_beside_another_model_are_refused(other: str, tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", parts=3)
    write(tmp_path / other)
    with pytest.raises(BadInput, match="one GGUF model"):
        open_source(tmp_path)
    assert len(open_source(tmp_path / "model-00003-of-00003.gguf").files) == 3


def test_many_missing_parts_are_one_problem(tmp_path: Path) -> None:
    write(tmp_path / "model-00002-of-00099.gguf")
    with pytest.raises(BadInput) as caught:
        open_source(tmp_path)
    (problem,) = caught.value.problems
    assert problem.found.startswith("1 of 99 parts; there is no model-00001-of-00099.gguf, model-00003-of-00099.gguf, ")
    assert problem.found.endswith(" and 93 more")


@pytest.mark.parametrize(("ours", "theirs"), [("2-of-00003", "3-of-00003"), ("3-of-00003", "2-of-00003")])
def test_parts_under_each_others_names_are_refused(ours: str, theirs: str, tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", parts=3)
    (tmp_path / f"model-0000{ours}.gguf").rename(tmp_path / "aside")
    (tmp_path / f"model-0000{theirs}.gguf").rename(tmp_path / f"model-0000{ours}.gguf")
    (tmp_path / "aside").rename(tmp_path / f"model-0000{theirs}.gguf")
    with pytest.raises(BadInput) as caught:
        open_source(tmp_path / "model-00001-of-00003.gguf")
    assert [problem.found for problem in caught.value.problems] == ["2 and 3", "1 and 3"]


def test_a_part_that_is_named_as_a_whole_model_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", parts=3)
    (tmp_path / "model-00001-of-00003.gguf").rename(tmp_path / "whole.gguf")
    with pytest.raises(BadInput, match="NAME-00001-of-0000N"):
        open_source(tmp_path / "whole.gguf")


def test_two_models_in_a_directory_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf")
    write(tmp_path / "b.gguf")
    with pytest.raises(BadInput, match=r"a\.gguf, b\.gguf"):
        open_source(tmp_path)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_scaling_of_llama_3_is_recovered_from_its_factors(factor: float, tmp_path: Path) -> None:
    scaling = {**LLAMA3, "factor": factor}
    write(tmp_path / "model.gguf", config=LLAMA31, extra={"rope_freqs.weight": factors(scaling, 500000.0, 64)})
    assert configured(open_source(tmp_path / "model.gguf")).rotary_scaling == scaling


@pytest.mark.parametrize(
    "changed",
    [{"original_max_position_embeddings": 4096}, {"high_freq_factor": 3.0}, {"low_freq_factor": 2.0}],
    ids=["positions", "high", "low"],
)
def test_factors_of_another_scaling_are_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    write(
        tmp_path / "model.gguf",
        config=LLAMA31,
        extra={"rope_freqs.weight": factors({**LLAMA3, **changed}, 500000.0, 64)},
    )
    with pytest.raises(BadInput, match="rope_freqs"):
        open_source(tmp_path / "model.gguf")


def test_linear_scaling_is_recovered(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", metadata={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    assert configured(open_source(tmp_path / "model.gguf")).rotary_scaling == {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize("metadata", [{"rope.scaling.type": "yarn"}, {"rope.scaling.type": "linear"}], ids=["yarn", "no factor"])
def test_a_scaling_that_cannot_be_said_is_refused(metadata: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", metadata=metadata)
    with pytest.raises(BadInput, match=r"rope\.scaling"):
        open_source(tmp_path / "model.gguf")
