"""A trained model: SmolLM2-135M-Instruct from GGUF, against the `gguf` package's own dequantization cut by plain NumPy."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline import convert
from tests.support.directories import values_bytes
from tests.support.places import SMOLLM2 as MODEL

HEADS, KV_HEADS, HEAD_SIZE, LAYERS = 9, 3, 64, 30


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    """Every tensor as float16, q and k with llama.cpp's interleaving undone row by row."""
    assert MODEL.exists(), "run the tests with `make test`, which fetches the model"
    tensors = {}
    for tensor in gguf.GGUFReader(MODEL).tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            rows = [
                head * HEAD_SIZE + 2 * i + half
                for head in range(len(values) // HEAD_SIZE)
                for half in (0, 1)
                for i in range(HEAD_SIZE // 2)
            ]
            values = values[rows]
        tensors[tensor.name] = values.astype(np.float16)
    return tensors


def rank_tensors(reference: dict[str, np.ndarray], tp_size: int, rank: int) -> dict[str, np.ndarray]:
    """What a rank must hold, cut by hand."""

    def rows(name: str) -> np.ndarray:
        return np.split(reference[name], tp_size)[rank]

    def columns(name: str) -> np.ndarray:
        return np.split(reference[name], tp_size, axis=1)[rank]

    expected = {
        "transformer.vocab_embedding.weight": reference["token_embd.weight"],
        "transformer.ln_f.weight": reference["output_norm.weight"],
        "lm_head.weight": rows("token_embd.weight"),
    }
    for n in range(LAYERS):
        block, layer = f"blk.{n}.", f"transformer.layers.{n}."
        qkv = [rows(f"{block}attn_{part}.weight") for part in "qkv"]
        expected |= {
            f"{layer}input_layernorm.weight": reference[f"{block}attn_norm.weight"],
            f"{layer}attention.qkv.weight": np.concatenate(qkv),
            f"{layer}attention.dense.weight": columns(f"{block}attn_output.weight"),
            f"{layer}post_layernorm.weight": reference[f"{block}ffn_norm.weight"],
            f"{layer}mlp.fc.weight": rows(f"{block}ffn_gate.weight"),
            f"{layer}mlp.gate.weight": rows(f"{block}ffn_up.weight"),
            f"{layer}mlp.proj.weight": columns(f"{block}ffn_down.weight"),
        }
    return expected


@pytest.mark.parametrize("tp_size", [1, 3])
def test_ranks_equal_an_independent_dequantization(tp_size: int, reference: dict[str, np.ndarray], tmp_path: Path) -> None:
    result = convert(model_dir=MODEL, output_dir=tmp_path / "out", tp_size=tp_size)
    assert result.bytes_written == values_bytes(tmp_path / "out")
    for rank in range(tp_size):
        ours, expected = load_file(tmp_path / f"out/rank{rank}.safetensors"), rank_tensors(reference, tp_size, rank)
        assert ours.keys() == expected.keys()
        for name, values in expected.items():
            assert ours[name].dtype == values.dtype
            assert np.array_equal(ours[name].view(np.uint16), values.view(np.uint16)), name


def test_configuration_comes_from_the_metadata(tmp_path: Path) -> None:
    convert(model_dir=MODEL, output_dir=tmp_path / "out", tp_size=3, scheduler="threads")
    config = json.loads((tmp_path / "out/config.json").read_text())
    expected = {
        "architecture": "LlamaForCausalLM",
        "dtype": "float16",
        "vocab_size": 49152,
        "hidden_size": 576,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_size": HEAD_SIZE,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "norm_epsilon": 1e-05,
        "rotary_base": 100000.0,
        "rotary_scaling": None,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
    assert {key: config[key] for key in expected} == expected
