"""Experts in float8 with one scale a matrix: on every share of every rank, against codes and scales that are put together here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from pipeline import BadInput, convert
from pipeline.reporting.verification import verify
from tests.support import checkpoints
from tests.support import quantized_checkpoints as source
from tests.support.directories import contents
from tests.support.quantized_checkpoints import MIXTRAL, Arrays, Format
from tests.support.rank_files import read

FLOAT8 = ml_dtypes.float8_e4m3fn
QWEN: dict[str, Any] = {
    **{key: value for key, value in MIXTRAL.items() if key != "num_local_experts"},
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "moe_intermediate_size": MIXTRAL["intermediate_size"],
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
NAMES = {
    "mixtral": (MIXTRAL, "block_sparse_moe.experts", ("w1", "w3", "w2")),
    "qwen3_moe": (QWEN, "mlp.experts", ("gate_proj", "up_proj", "down_proj")),
}
KINDS = {"modelopt": source.modelopt_float8(cache=False), "compressed-tensors": source.compressed_float8(dynamic=False)}
SHARES: dict[str, dict[str, int]] = {
    "tp1": {"tp_size": 1},
    "tp2": {"tp_size": 2},
    "ep2": {"tp_size": 2, "moe_ep_size": 2},
    "tp4 ep2": {"tp_size": 4, "moe_ep_size": 2},
    "pp2": {"tp_size": 2, "pp_size": 2},
}


def qwen_values() -> Arrays:
    """Mixtral's tensors under Qwen3's names, with its norms of queries and keys."""
    names = dict(zip(NAMES["mixtral"][2], NAMES["qwen3_moe"][2], strict=True))
    result: Arrays = {}
    for name, values in source.values(MIXTRAL).items():
        renamed = name.replace("block_sparse_moe", "mlp")
        for theirs, ours in names.items():
            renamed = renamed.replace(f".{theirs}.", f".{ours}.")
        result[renamed] = values
    for layer in range(2):
        for part in "qk":
            result[f"model.layers.{layer}.self_attn.{part}_norm.weight"] = np.ones(64, np.float16)
    return result


def varied(kind: Format) -> Format:
    """The format with another scale of activations for each module."""
    random = np.random.default_rng(4)

    def quantize(module: str, weight: np.ndarray) -> source.Packed:
        packed = kind.quantizer(module, weight)
        scale = packed.parameters["input_scale"]
        other = np.full_like(scale, random.uniform(0.01, 0.5))
        return source.Packed({**packed.parameters, "input_scale": other}, packed.weight)

    return Format(quantize, kind.settings, kind.algorithm, kind.files)


def model_of(directory: Path, family: str, kind: Format) -> Arrays:
    """A checkpoint whose router is not quantized, as its users have it; returns its tensors as they are stored."""
    config, kind = NAMES[family][0], varied(kind)
    tensors = source.values(MIXTRAL) if family == "mixtral" else qwen_values()
    stored, _ = source.quantized(tensors, kind, config["num_hidden_layers"])
    checkpoints.save(directory, source.described(config, kind), stored)
    for name, content in kind.files.items():
        (directory / name).write_text(json.dumps(content))
    return stored


def brought(codes: np.ndarray, scale: np.float32, common: np.float32) -> np.ndarray:
    """The bytes of float8 codes at a larger scale, rounded by torch."""
    wide = torch.from_numpy(codes.astype(np.float32)) * float(scale) / float(common)
    return wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_experts_by_rank(kind: str, family: str, share: str, tmp_path: Path) -> None:
    more, (_, place, names) = SHARES[share], NAMES[family]
    stored = model_of(tmp_path / "model", family, KINDS[kind])
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler="threads", **more)
    tp, ep, pp = more["tp_size"], more.get("moe_ep_size", 1), more.get("pp_size", 1)

    def one(name: str) -> np.float32:
        return np.float32(stored[name].astype(np.float32).reshape(-1)[0])

    for rank in range(tp * pp):
        ours = read(tmp_path / f"out/rank{rank}.safetensors")
        stage, own = divmod(rank, tp)
        for local in range(2 // pp):
            prefix = f"model.layers.{stage * (2 // pp) + local}.{place}"
            experts = np.arange(4).reshape(ep, -1)[own % ep]
            inputs: dict[str, list[np.float32]] = {"fc": [], "proj": []}
            for number, expert in enumerate(experts):
                gate, up, down = (f"{prefix}.{expert}.{name}" for name in names)
                common = max(one(f"{gate}.weight_scale"), one(f"{up}.weight_scale"))
                part, parts = own // ep, tp // ep
                factors = [
                    np.split(brought(stored[f"{name}.weight"], one(f"{name}.weight_scale"), common), parts)[part]
                    for name in (up, gate)
                ]
                layer = f"transformer.layers.{local}.mlp."
                np.testing.assert_array_equal(ours[f"{layer}fc.weight"][number].view(np.uint8), np.concatenate(factors))
                assert ours[f"{layer}fc.weights_scaling_factor"][number].tolist() == [common]
                back = np.split(stored[f"{down}.weight"].view(np.uint8), parts, axis=1)[part]
                np.testing.assert_array_equal(ours[f"{layer}proj.weight"][number].view(np.uint8), back)
                assert ours[f"{layer}proj.weights_scaling_factor"][number].tolist() == [one(f"{down}.weight_scale")]
                inputs["fc"] += [one(f"{name}.input_scale") for name in (gate, up)]
                inputs["proj"].append(one(f"{down}.input_scale"))
            for name, scales in inputs.items():
                assert ours[f"{layer}{name}.activation_scaling_factor"].tolist() == [max(scales)]
                assert ours[f"{layer}{name}.weights_scaling_factor"].shape == (len(experts), 1)
    result = verify(tmp_path / "out", tmp_path / "model")
    result.check()
    assert result.round_trip is not None


def test_equal_scales_change_no_byte(tmp_path: Path) -> None:
    """Two matrices of one scale are the source's own."""
    stored = model_of(tmp_path / "model", "mixtral", KINDS["modelopt"])
    for name in [name for name in stored if name.endswith("w1.weight_scale")]:
        stored[name.replace("w1", "w3")] = stored[name]
    settings = source.described(MIXTRAL, KINDS["modelopt"])
    checkpoints.save(tmp_path / "model", settings, stored)
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler="threads")
    ours = read(tmp_path / "out/rank0.safetensors")
    for expert in range(4):
        up, gate = (stored[f"model.layers.0.block_sparse_moe.experts.{expert}.{name}.weight"] for name in ("w3", "w1"))
        held = ours["transformer.layers.0.mlp.fc.weight"][expert]
        assert held.tobytes() == up.tobytes() + gate.tobytes()


def test_a_damaged_scale_of_an_expert_is_found(tmp_path: Path) -> None:
    model_of(tmp_path / "model", "mixtral", KINDS["modelopt"])
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler="threads")
    path = tmp_path / "out/rank0.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    row = json.loads(data[8 : 8 + length])["transformer.layers.0.mlp.fc.weights_scaling_factor"]
    at = 8 + length + row["data_offsets"][0] + 4  # the second expert's
    data[at : at + 4] = (np.frombuffer(data[at : at + 4], np.float32) * 1.5).tobytes()
    path.write_bytes(data)
    result = verify(tmp_path / "out", tmp_path / "model")
    assert any("mlp.fc.weight" in finding.problem.subject for finding in result.findings)


@pytest.mark.parametrize("after", ["read", "unpack", "shard"])
def test_cuts_change_no_byte(after: str, tmp_path: Path) -> None:
    model_of(tmp_path / "model", "mixtral", KINDS["compressed-tensors"])
    options = {"model_dir": tmp_path / "model", "scheduler": "threads", "tp_size": 2, "moe_ep_size": 2}
    convert(output_dir=tmp_path / "plain", **options)
    convert(output_dir=tmp_path / "cut", scratch_after=after, **options)
    assert contents(tmp_path / "cut") == contents(tmp_path / "plain")


def test_dynamic_activations_of_experts_are_refused_with_what_would_do(tmp_path: Path) -> None:
    source.write(tmp_path / "model", MIXTRAL, source.compressed_float8(dynamic=True))
    with pytest.raises(BadInput, match="4 experts a layer, as FP8_PER_CHANNEL_PER_TOKEN") as refused:
        convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out")
    assert "--dequantize" in refused.value.problems[0].remedy
