"""Quantized ranks compute what transformers computes with the float weights that their codes and scales stand for."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline import convert
from stages.read.ranks import open_checkpoint
from stages.verify.forward.decoder import Decoder
from tests.end_to_end.test_family_forward import TOLERANCE, difference
from tests.support import checkpoints
from tests.support import quantized_checkpoints as source
from tests.support.examples import by_night
from tests.support.quantized_checkpoints import FP8, FP16, LLAMA, MIXTRAL

Arrays = dict[str, np.ndarray]
Sources = Callable[[str, str], tuple[Path, Tensor]]
TOKENS = torch.randint(LLAMA["vocab_size"], (20,), generator=torch.Generator().manual_seed(8))
BITS_16 = 1e-3  # of the greatest logit: zero points times scales are stored with 16 bits, rounded once

FORMATS = source.formats()
EXACT = (
    "gptq",
    "gptq v2 zeros in v1",
    "gptq bf16 scales",
    "gptq zero biases",
    "gptq groups of 128",
    "gptq 8 bits",
    "compressed w4a16",
    "compressed w8a16",
    "compressed fp8 dynamic",
    "modelopt awq",
    "fbgemm",
)
ROUNDED = ("gptq asymmetric", "gptq v2", "gptq 8 bits asymmetric", "awq", "compressed w4a16 asymmetric")
ONE_SCALE = ("compressed fp8", "modelopt fp8")
MODELS = {"llama": LLAMA, "mixtral": MIXTRAL}
# TensorRT-LLM has no other kernels for experts.
OF_EXPERTS = (
    "gptq",
    "gptq asymmetric",
    "gptq bf16 scales",
    "awq",
    "compressed w4a16",
    "compressed w4a16 asymmetric",
)
TARGETS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tp_size": 2},
    "tp4": {"tp_size": 4},  # two ranks share a kv head
    "pp2": {"pp_size": 2},
    "hopper": {"tp_size": 2, "sm": 90},
    "blackwell": {"tp_size": 2, "sm": 100},
    "ep2": {"tp_size": 2, "moe_tp_size": 1, "moe_ep_size": 2},
}


def transformers_logits(directory: Path, config: dict[str, Any], weights: Arrays) -> Tensor:
    source.write_float(directory, config, weights)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        result: Tensor = model(TOKENS[None]).logits[0]
    return result


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Makes a quantized checkpoint: of a format and a model, its directory and what transformers computes of what it stands for."""

    @functools.lru_cache(maxsize=4)  # the tests of a source follow one another
    def source_of(name: str, model: str) -> tuple[Path, Tensor]:
        folder, config = tmp_path_factory.mktemp("source"), model_of(name, model)
        weights = source.write(folder / "model", config, FORMATS[name])
        return folder / "model", transformers_logits(folder / "float", config, weights)

    return source_of


def computed(output: Path, few_rows: bool = True, **options: Any) -> Tensor:
    """What the ranks compute; reading few rows at a time must not matter, which is tried where `few_rows`."""
    convert(output_dir=output, scheduler="synchronous", **options)
    checkpoint = open_checkpoint(output)
    decoder = Decoder(checkpoint)
    result = decoder.logits(TOKENS)
    assert decoder.unused() == []
    if few_rows:
        assert difference(Decoder(checkpoint, block_bytes=4 * 128 * 27).logits(TOKENS), result) < TOLERANCE
    return result


def model_of(name: str, model: str) -> dict[str, Any]:
    """fbgemm leaves the first and last layers as they are."""
    return {**MODELS[model], "num_hidden_layers": 3} if name == "fbgemm" else MODELS[model]


@pytest.mark.parametrize("target", by_night(["tp1", "tp2", "hopper", "blackwell"], ["tp2", "hopper"]))
@pytest.mark.parametrize(
    ("model", "name"), [*(("llama", name) for name in (*EXACT, *ROUNDED)), *(("mixtral", name) for name in OF_EXPERTS)]
)
def test_codes_of_a_source(name: str, model: str, target: str, sources: Sources, tmp_path: Path) -> None:
    directory, theirs = sources(name, model)
    few_rows = target != "tp1"  # whose codes are arranged as those of tp2
    ours = computed(tmp_path / "ranks", few_rows, model_dir=directory, **FORMATS[name].flags, **TARGETS[target])
    assert difference(ours, theirs) < (TOLERANCE if name in EXACT else BITS_16)


@pytest.mark.parametrize(
    ("name", "model", "target"),
    [
        *(("gptq", "llama", target) for target in ("tp4", "pp2")),
        *(("compressed fp8 dynamic", "llama", target) for target in ("tp4", "pp2")),
        *(("gptq", "mixtral", target) for target in ("tp4", "ep2", "pp2")),
        ("modelopt awq", "llama", "tp4"),
    ],
)
def test_codes_of_a_source_on_other_ranks(name: str, model: str, target: str, sources: Sources, tmp_path: Path) -> None:
    directory, theirs = sources(name, model)
    assert difference(computed(tmp_path / "ranks", model_dir=directory, **TARGETS[target]), theirs) < TOLERANCE


@pytest.mark.parametrize("target", ["tp1", "tp2"])
@pytest.mark.parametrize("name", ONE_SCALE)
def test_one_scale_for_q_k_and_v(name: str, target: str, tmp_path: Path) -> None:
    """Those of smaller scales are rounded again, by the largest (docs/format/quantized-layouts.md, section 7)."""
    kind = FORMATS[name]
    weights = source.write(tmp_path / "model", LLAMA, kind)
    stored = load_file(tmp_path / "model/model.safetensors")
    for layer in range(LLAMA["num_hidden_layers"]):
        names = [f"model.layers.{layer}.self_attn.{part}_proj" for part in "qkv"]
        largest = np.float32(max(float(stored[f"{each}.weight_scale"]) for each in names))
        for each in names:
            codes = (weights[f"{each}.weight"] / largest).astype(FP8)
            weights[f"{each}.weight"] = codes.astype(np.float32) * largest
    theirs = transformers_logits(tmp_path / "float", LLAMA, weights)
    options = {"fp8_kv_cache": True} if name == "modelopt fp8" else {}
    ours = computed(tmp_path / "ranks", model_dir=tmp_path / "model", **options, **TARGETS[target])
    assert difference(ours, theirs) < TOLERANCE


# --- quantized from numbers: the ranks' own shares are


def integers(bits: int) -> Callable[[np.ndarray], np.ndarray]:
    """What integers of a share [out, in] stand for: half away from zero, by a scale that is then rounded.

    Facts: docs/format/quantized-layouts.md, section 4a.
    """

    def quantized(share: np.ndarray) -> np.ndarray:
        scale = np.abs(share).max(axis=1, keepdims=True) / np.float32(2 ** (bits - 1))
        codes = np.copysign(np.floor(np.abs(share / scale) + np.float32(0.5)), share)
        return np.clip(codes, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale.astype(FP16).astype(np.float32)

    return quantized


def float8(share: np.ndarray) -> np.ndarray:
    """What float8 codes of a share [out, in] stand for (docs/format/quantized-layouts.md, section 4b)."""
    clamped = np.clip(share, -1200, 1200)
    scale = np.maximum(np.abs(clamped).max(axis=1, keepdims=True) / np.float32(448), np.float32(1 / (448 * 512)))
    return np.clip(clamped / scale, -448, 448).astype(FP8).astype(np.float32) * scale


QUANTIZERS: dict[str, tuple[dict[str, Any], Callable[[np.ndarray], np.ndarray]]] = {
    "int8": ({"use_weight_only": True, "weight_only_precision": "int8"}, integers(8)),
    "int4": ({"use_weight_only": True, "weight_only_precision": "int4"}, integers(4)),
    "float8": ({"use_fp8_rowwise": True}, float8),
}
# What is split by columns: over all ranks, or over the parts of an expert.
BY_COLUMNS = ("o_proj", "down_proj", "w2")


def stands_for(weights: Arrays, quantized: Callable[[np.ndarray], np.ndarray], tp: int, moe_tp: int) -> Arrays:
    result = {}
    for name, values in weights.items():
        result[name] = values.astype(np.float32)
        if source.linear(name):
            module = name.split(".")[-2]
            parts = (moe_tp if module == "w2" else tp) if module in BY_COLUMNS else 1
            result[name] = np.concatenate([quantized(share) for share in np.split(result[name], parts, axis=1)], axis=1)
    return result


@pytest.mark.parametrize(
    ("name", "model", "target"),
    [
        *by_night(
            itertools.product(QUANTIZERS, ("llama",), ("tp1", "tp2", "tp4", "hopper", "blackwell")),
            list(itertools.product(QUANTIZERS, ("llama",), ("tp2", "blackwell"))),
        ),
        *by_night(
            itertools.product(("int8", "int4"), ("mixtral",), ("tp1", "tp2", "tp4", "hopper", "blackwell", "ep2")),
            list(itertools.product(("int8", "int4"), ("mixtral",), ("tp4", "hopper", "ep2"))),
        ),
    ],
)
def test_numbers_quantized_by_rank(name: str, model: str, target: str, tmp_path: Path) -> None:
    flags, quantized = QUANTIZERS[name]
    config, weights, sizes = MODELS[model], source.values(MODELS[model]), TARGETS[target]
    checkpoints.save(tmp_path / "model", config, weights)
    tp = sizes.get("tp_size", 1)
    by_rank, by_row = (
        transformers_logits(
            tmp_path / f"float{parts}", config, stands_for(weights, quantized, parts, sizes.get("moe_tp_size", parts))
        )
        for parts in (tp, 1)
    )
    ours = computed(tmp_path / "ranks", model_dir=tmp_path / "model", **flags, **sizes)
    assert difference(ours, by_rank) < TOLERANCE
    if tp > 1:
        assert difference(ours, by_row) > 10 * TOLERANCE, "each rank's share has scales of its own"
