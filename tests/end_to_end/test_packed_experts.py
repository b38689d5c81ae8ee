"""Packed mixtures of experts, in every split of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import convert
from tests.support import checkpoints
from tests.support import quantized_checkpoints as source
from tests.support.directories import contents
from tests.support.quantized_checkpoints import LLAMA, MIXTRAL, Arrays
from tests.support.rank_files import read
from tests.support.rank_matrices import (
    AGAIN,
    BLOCK,
    FORMATS,
    GROUPED,
    check_integers,
    cut,
    hard,
    matrix,
    quantization,
    signal_to_noise,
)

SHARES = {
    "tp1": {"tp_size": 1},
    "tp2": {"tp_size": 2},
    "ep2": {"tp_size": 2, "moe_ep_size": 2},
    "tp4": {"tp_size": 4, "moe_ep_size": 2},
}


def expert_shares(config: dict[str, Any], more: dict[str, int], rank: int) -> Iterator[tuple[int, int, int]]:
    """The experts of a rank, and which of how many parts of each it has: (expert, part, parts)."""
    experts, ep = config["num_local_experts"], more.get("moe_ep_size", 1)
    parts = more["tp_size"] // ep
    for expert in range(rank % ep * experts // ep, (rank % ep + 1) * experts // ep):
        yield expert, rank // ep, parts


def expert_matrices(
    weights: Arrays, prefix: str, names: tuple[str, str, str], part: int, parts: int
) -> tuple[np.ndarray, np.ndarray]:
    """An expert's two matrices on a rank: the factor above the activated half, and the projection back."""
    gate, up, down = (weights[f"{prefix}.{name}.weight"] for name in names)
    return np.concatenate([np.split(up, parts)[part], np.split(gate, parts)[part]]), np.split(down, parts, axis=1)[part]


@pytest.mark.parametrize("sm", [80, 90, 100])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_mixtral_weight_only(precision: str, share: str, sm: int, tmp_path: Path) -> None:
    weights, more, bits = hard(source.values(MIXTRAL)), SHARES[share], int(precision[3:])
    checkpoints.save(tmp_path / "model", MIXTRAL, weights)
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler="threads", sm=sm, **AGAIN[precision][0], **more)
    for rank in range(more["tp_size"]):
        ours = read(tmp_path / f"out/rank{rank}.safetensors")
        for module, wanted in cut(weights, MIXTRAL, rank, more["tp_size"]).items():
            check_integers(ours, module, wanted, bits, sm)
        for layer in range(2):
            names = f"transformer.layers.{layer}.mlp.fc", f"transformer.layers.{layer}.mlp.proj"
            assert ours[f"transformer.layers.{layer}.mlp.router.weight"].dtype == np.float32
            for place, (expert, part, parts) in enumerate(expert_shares(MIXTRAL, more, rank)):
                prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
                for name, wanted in zip(names, expert_matrices(weights, prefix, ("w1", "w3", "w2"), part, parts), strict=True):
                    held = {f"m.{key}": ours[f"{name}.{key}"][place] for key in ("weight", "per_channel_scale")}
                    # Stacks are arranged as for Ampere, whatever the generation.
                    check_integers(held, "m", wanted, bits, 80)
            assert len(ours[f"{names[0]}.weight"]) == MIXTRAL["num_local_experts"] // more.get("moe_ep_size", 1)


@pytest.mark.parametrize("sm", [80, 90, 100])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", ["gptq asymmetric", "awq"])
def test_mixtral_with_packed_experts(name: str, share: str, sm: int, tmp_path: Path) -> None:
    more = SHARES[share]
    weights = source.write(tmp_path / "model", MIXTRAL, FORMATS[name])
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler="threads", sm=sm, **more)
    assert quantization(tmp_path / "out") == {**BLOCK, "quant_algo": "W4A16_GPTQ", **GROUPED}
    for rank in range(more["tp_size"]):
        ours = read(tmp_path / f"out/rank{rank}.safetensors")
        for layer in range(2):
            fc, proj = (matrix(ours, f"transformer.layers.{layer}.mlp.{each}") for each in ("fc", "proj"))
            shares = list(expert_shares(MIXTRAL, more, rank))
            assert len(fc) == len(proj) == len(shares)
            for place, (expert, part, parts) in enumerate(shares):
                prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
                wanted = expert_matrices(weights, prefix, ("w1", "w3", "w2"), part, parts)
                assert all(signal_to_noise(each[place], want) > 50 for each, want in zip((fc, proj), wanted, strict=True))


def test_mixtral_dequantized(tmp_path: Path) -> None:
    weights = source.write(tmp_path / "model", MIXTRAL, FORMATS["gptq asymmetric"])
    source.write_float(tmp_path / "float", MIXTRAL, weights)
    options = {"tp_size": 4, "moe_ep_size": 2, "scheduler": "threads"}
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "ours", dequantize=True, **options)
    convert(model_dir=tmp_path / "float", output_dir=tmp_path / "theirs", **options)
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")


SMALL = {**LLAMA, "hidden_size": 128, "intermediate_size": 256}


QWEN_MOE = {
    **SMALL,
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 192,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
}


def qwen_moe() -> Arrays:
    """Qwen2-MoE: LLaMA's attention with biases, experts of their own size, and one that every token goes through."""
    random = np.random.default_rng(4)
    tensors = {name: values for name, values in source.values(SMALL).items() if ".mlp." not in name}

    def matrix_of(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) * 0.05).astype(np.float16)

    for layer in range(2):
        mlp = f"model.layers.{layer}.mlp."
        sizes = {f"experts.{e}": 128 for e in range(4)} | {"shared_expert": 192}
        for name, inner in sizes.items():
            tensors |= {f"{mlp}{name}.{part}_proj.weight": matrix_of(inner, 128) for part in ("gate", "up")}
            tensors[f"{mlp}{name}.down_proj.weight"] = matrix_of(128, inner)
        tensors |= {f"{mlp}gate.weight": matrix_of(4, 128), f"{mlp}shared_expert_gate.weight": matrix_of(1, 128)}
        for part, size in (("q", 256), ("k", 128), ("v", 128)):
            tensors[f"model.layers.{layer}.self_attn.{part}_proj.bias"] = matrix_of(size)
    return tensors


@pytest.mark.parametrize("kind", ["int8", "int4", "gptq"])
def test_qwen2_moe(kind: str, tmp_path: Path) -> None:
    weights = hard(qwen_moe())
    flags: dict[str, Any] = {}
    if kind == "gptq":
        stored, weights = source.quantized(qwen_moe(), FORMATS["gptq asymmetric"], 2)
        checkpoints.save(tmp_path / "model", source.described(QWEN_MOE, FORMATS["gptq asymmetric"]), stored)
    else:
        checkpoints.save(tmp_path / "model", QWEN_MOE, weights)
        flags = AGAIN[kind][0]
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler="threads", **flags)
    ours = read(tmp_path / "out/rank0.safetensors")
    names = ("gate_proj", "up_proj", "down_proj")
    for layer in range(2):
        mlp, theirs = f"transformer.layers.{layer}.mlp", f"model.layers.{layer}.mlp"
        wanted = {}
        for expert in range(4):
            wanted["fc", expert], wanted["proj", expert] = expert_matrices(weights, f"{theirs}.experts.{expert}", names, 0, 1)
        for (name, expert), weight in wanted.items():
            held = {
                f"m.{key.rpartition('.')[2]}": values[expert] for key, values in ours.items() if key.startswith(f"{mlp}.{name}.")
            }
            check_kind(held, "m", weight, kind)
        shared = expert_matrices(weights, f"{theirs}.shared_expert", names, 0, 1)
        for name, weight in zip(("fc", "proj"), shared, strict=True):
            check_kind(ours, f"{mlp}.shared_expert.{name}", weight, kind)
        assert ours[f"{mlp}.shared_expert_gate.weight"].dtype == np.float16
        assert ours[f"{mlp}.router.weight"].dtype == np.float32


def check_kind(ours: Arrays, module: str, weight: np.ndarray, kind: str) -> None:
    if kind == "gptq":
        assert signal_to_noise(matrix(ours, module), weight) > 50
    else:
        check_integers(ours, module, weight, int(kind[3:]))
