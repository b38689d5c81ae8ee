"""A packed source as numbers is the model that it stands for, and may be quantized in another way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline import convert, plan
from tests.support import quantized_checkpoints as source
from tests.support.quantized_checkpoints import LLAMA
from tests.support.rank_files import read
from tests.support.rank_matrices import AGAIN, BLOCK, BY_ALGORITHM, FORMATS, check_stands_for, quantization


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", FORMATS)
def test_dequantized_is_the_model_that_the_checkpoint_stands_for(name: str, dtype: str, tmp_path: Path) -> None:
    check_stands_for(name, tmp_path, dtype=dtype, tp_size=2, dequantize=True)
    assert quantization(tmp_path / "ours") == BLOCK


@pytest.mark.parametrize("name", [name for name, kind in FORMATS.items() if not kind.algorithm])
def test_what_no_kernel_takes_is_dequantized_without_being_asked(name: str, tmp_path: Path) -> None:
    source.write(tmp_path / "model", LLAMA, FORMATS[name])
    options = {"model_dir": tmp_path / "model", "tp_size": 2, "scheduler": "threads"}
    made = "dequantized: TensorRT-LLM 1.2 has no algorithm that takes "
    assert len([note for note in plan(output_dir=tmp_path / "ours", **options).notes if note.startswith(made)]) == 1
    convert(output_dir=tmp_path / "ours", **options)
    convert(output_dir=tmp_path / "asked", dequantize=True, **options)
    notes = plan(output_dir=tmp_path / "asked", overwrite=True, dequantize=True, **options).notes
    assert not [note for note in notes if note.startswith("dequantized")]
    for rank in range(2):
        ours, asked = ((tmp_path / side / f"rank{rank}.safetensors").read_bytes() for side in ("ours", "asked"))
        assert ours == asked


def test_activations_and_embeddings_of_nvfp4(tmp_path: Path) -> None:
    source.write(tmp_path / "model", LLAMA, FORMATS["nvfp4 cache"])
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", tp_size=2, fp8_kv_cache=True, scheduler="threads")
    ours, layer = read(tmp_path / "out/rank1.safetensors"), "transformer.layers.1."
    held = {"attention.qkv": "self_attn.q_proj", "attention.dense": "self_attn.o_proj", "mlp.proj": "mlp.down_proj"}
    for module, theirs in held.items():
        names = [f"model.layers.1.{theirs.replace('q_proj', part)}" for part in ("q_proj", "k_proj", "v_proj")]
        largest = np.float32(0.001 * max(1 + len(name) % 5 for name in names))
        assert ours[f"{layer}{module}.activation_scaling_factor"].tolist() == [largest]
        assert {key: str(ours[f"{layer}{module}.{key}"].dtype) for key in ("weight", "weights_scaling_factor")} == {
            "weight": "uint8",
            "weights_scaling_factor": "float8_e4m3fn",
        }
    assert ours[f"{layer}attention.kv_cache_scaling_factor"].tolist() == [0.75]
    assert {str(ours[name].dtype) for name in ("transformer.vocab_embedding.weight", "lm_head.weight")} == {"float16"}
    assert quantization(tmp_path / "out")["kv_cache_quant_algo"] == "FP8"


def test_dequantized_in_stages_and_with_shared_kv_heads(tmp_path: Path) -> None:
    for number, (name, size) in enumerate([("gptq asymmetric", {"tp_size": 4}), ("awq", {"tp_size": 2, "pp_size": 2})]):
        check_stands_for(name, tmp_path / str(number), dequantize=True, **size)


def test_act_order_is_dequantized(tmp_path: Path) -> None:
    kinds = [source.gptq(index="order"), source.gptq(index="order", sym=False, bits=8), source.gptq(index="order", bits=3)]
    for number, kind in enumerate([*kinds, source.compressed(order=True, sym=False)]):
        check_stands_for(kind, tmp_path / str(number), tp_size=2, dequantize=True)


@pytest.mark.parametrize("to", AGAIN)
@pytest.mark.parametrize(
    "name",
    [
        "gptq",
        "gptq 8 bits asymmetric",
        "awq",
        "compressed w8a8",
        "modelopt fp8",
        "modelopt awq",
        "fbgemm",
        "fp8 block",
        "nvfp4",
        "mxfp4",
    ],
)
def test_dequantized_and_quantized_in_another_way(name: str, to: str, tmp_path: Path) -> None:
    flags, algorithm = AGAIN[to]
    check_stands_for(name, tmp_path, tp_size=2, dequantize=True, **flags)
    expected = {**BLOCK, "quant_algo": algorithm, **BY_ALGORITHM[algorithm], "use_meta_recipe": to == "fp8 meta"}
    assert quantization(tmp_path / "ours") == expected
