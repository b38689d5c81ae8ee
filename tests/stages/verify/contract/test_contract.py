"""contract: what each rank must hold, told from config.json alone: by hand, by law, and as headrace's own conversions have it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import convert
from stages.read.ranks import open_checkpoint
from stages.verify.contract import ExpectedTensor, contract
from stages.verify.contract.integrity import check_tensor, checksums, headers
from tests.end_to_end.test_family_forward import CASES, TARGETS, WANTED, build
from tests.support import checkpoints
from tests.support.own_names import exaone, internlm2

LLAMA: dict[str, Any] = {
    "architecture": "LlamaForCausalLM",
    "dtype": "bfloat16",
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_size": 24,
    "hidden_act": "silu",
    "norm_epsilon": 1e-5,
    "rotary_base": 10000.0,
    "position_embedding_type": "rope_gpt_neox",
    "max_position_embeddings": 128,
    "attn_bias": False,
    "mlp_bias": False,
    "quantization": {"quant_algo": None},
}
MIXTURE = {**LLAMA, "architecture": "MixtralForCausalLM", "hidden_act": "swiglu", "moe": {"num_experts": 8, "top_k": 2}}
QWEN_MOE = {
    **MIXTURE,
    "architecture": "Qwen2MoeForCausalLM",
    "qwen_type": "qwen2_moe",
    "attn_bias": True,
    "moe_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 80,
}
PHI_MOE = {**MIXTURE, "architecture": "PhiMoEForCausalLM", "head_size": 8, "rotary_pct": 1.0}
GEMMA_3 = {**LLAMA, "architecture": "Gemma3ForCausalLM", "hidden_act": "gelu", "query_pre_attn_scalar": 24}


def mapped(config: dict[str, Any], tp: int = 1, pp: int = 1, **more: int) -> dict[str, Any]:
    """The configuration for so many ranks."""
    return {**config, "mapping": {"world_size": tp * pp, "tp_size": tp, "pp_size": pp, **more}}


def asked(config: Mapping[str, Any]) -> list[dict[str, str]]:
    """What each rank must hold, as "type [shape]" by name; the configuration has no problem."""
    ranks, problems = contract(config)
    assert problems == []
    return [{name: str(each) for name, each in rank.items() if each.required} for rank in ranks]


def layer(rank: Mapping[str, str], number: int = 0) -> dict[str, str]:
    prefix = f"transformer.layers.{number}."
    return {name.removeprefix(prefix): each for name, each in rank.items() if name.startswith(prefix)}


# --- written out by hand from the checkpoint format


def test_a_dense_model_on_more_ranks_than_kv_heads() -> None:
    first, *_, last = asked(mapped(LLAMA, tp=4, pp=2))
    assert first["transformer.vocab_embedding.weight"] == "bfloat16 [99, 64]"
    assert layer(first) == {
        "input_layernorm.weight": "bfloat16 [64]",
        "post_layernorm.weight": "bfloat16 [64]",
        "attention.qkv.weight": "bfloat16 [96, 64]",  # two heads of queries, one of keys, one of values
        "attention.dense.weight": "bfloat16 [64, 48]",
        "mlp.fc.weight": "bfloat16 [24, 64]",
        "mlp.gate.weight": "bfloat16 [24, 64]",
        "mlp.proj.weight": "bfloat16 [64, 24]",
    }
    outside = {name: each for name, each in last.items() if ".layers." not in name}
    assert outside == {"transformer.ln_f.weight": "bfloat16 [64]", "lm_head.weight": "bfloat16 [25, 64]"}  # 99 rows, padded
    assert "lm_head.weight" not in first
    # Five layers on two stages, counted from 0 on each.
    assert [len({name.split(".")[2] for name in rank if ".layers." in name}) for rank in (first, last)] == [3, 2]
    assert layer(first, 2) == layer(first) == layer(last, 1)
    assert layer(first, 3) == layer(last, 2) == {}


def test_biases() -> None:
    (rank,) = asked(mapped({**LLAMA, "attn_bias": True, "mlp_bias": True}))
    biases = {name: each for name, each in layer(rank).items() if name.endswith("bias")}
    assert biases == {
        "attention.qkv.bias": "bfloat16 [288]",
        "attention.dense.bias": "bfloat16 [64]",
        "mlp.fc.bias": "bfloat16 [96]",
        "mlp.gate.bias": "bfloat16 [96]",
        "mlp.proj.bias": "bfloat16 [64]",
    }
    qwen = {**LLAMA, "architecture": "Qwen2ForCausalLM", "qwen_type": "qwen2", "attn_bias": True}
    for config in (qwen, {key: value for key, value in qwen.items() if key != "attn_bias"}):
        assert [name for name in layer(asked(mapped(config))[0]) if name.endswith("bias")] == ["attention.qkv.bias"]


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"use_parallel_embedding": True}, [50, 64]),
        ({"use_parallel_embedding": True, "embedding_sharding_dim": 1}, [99, 32]),
        ({"use_parallel_embedding": False, "embedding_sharding_dim": 1}, [99, 64]),
    ],
)
def test_the_embedding_on_either_axis(options: dict[str, Any], shape: list[int]) -> None:
    for rank in asked(mapped({**LLAMA, **options}, tp=2)):
        assert rank["transformer.vocab_embedding.weight"] == f"bfloat16 {shape}"
    assert asked(mapped({**LLAMA, **options}))[0]["transformer.vocab_embedding.weight"] == "bfloat16 [99, 64]"


def test_experts_are_split_by_their_own_sizes() -> None:
    first, *_ = asked(mapped(QWEN_MOE, tp=4, moe_tp_size=2, moe_ep_size=2))
    assert {name: each for name, each in layer(first).items() if name.startswith("mlp.")} == {
        "mlp.fc.weight": "bfloat16 [4, 48, 64]",
        "mlp.proj.weight": "bfloat16 [4, 64, 24]",
        "mlp.router.weight": "float32 [8, 64]",
        "mlp.shared_expert.fc.weight": "bfloat16 [40, 64]",
        "mlp.shared_expert.proj.weight": "bfloat16 [64, 20]",
        "mlp.shared_expert_gate.weight": "bfloat16 [1, 64]",
    }
    assert layer(asked(mapped(MIXTURE, tp=2))[0])["mlp.fc.weight"] == "bfloat16 [8, 96, 64]"
    # Without a gated activation the class has one half alone.
    assert layer(asked(mapped({**MIXTURE, "hidden_act": "silu"}, tp=2))[0])["mlp.fc.weight"] == "bfloat16 [8, 48, 64]"


def test_what_phi_has_of_its_own() -> None:
    (rank,) = asked(mapped(PHI_MOE))
    assert {name for name in rank if name.endswith("bias")} >= {"lm_head.bias", "transformer.ln_f.bias"}
    assert {name for name in layer(rank) if name.endswith("bias")} == {
        "input_layernorm.bias",
        "post_layernorm.bias",
        "attention.qkv.bias",
        "attention.dense.bias",
    }
    phi = {**LLAMA, "architecture": "Phi3ForCausalLM", "hidden_act": "swiglu", "head_size": 8, "rotary_pct": 0.5}
    (rank, _) = asked(mapped(phi, tp=2))
    assert {name: each for name, each in layer(rank).items() if name.startswith("mlp.")} == {
        "mlp.fc.weight": "bfloat16 [96, 64]",
        "mlp.proj.weight": "bfloat16 [64, 48]",
    }


def test_what_gemma_has_of_its_own() -> None:
    (rank, _) = asked(mapped(GEMMA_3, tp=2))
    assert {name for name in layer(rank) if "layernorm" in name} == {
        "input_layernorm.weight",
        "post_layernorm.weight",
        "pre_feedforward_layernorm.weight",
        "post_feedforward_layernorm.weight",
        "attention.q_layernorm.weight",
        "attention.k_layernorm.weight",
    }
    assert layer(rank)["attention.q_layernorm.weight"] == "bfloat16 [24]"
    assert rank["transformer.vocab_embedding.weight"] == "bfloat16 [50, 64]", "split, whatever the options say"


def test_rotary_buffers_are_allowed_and_not_asked_for() -> None:
    ranks, _ = contract(mapped(LLAMA, pp=2))
    for rank in ranks:
        buffers = {name: str(each) for name, each in rank.items() if not each.required}
        assert buffers == {
            "rotary_inv_freq": "float32 [12] or float32 [1, 12]",
            "embed_positions": "float32 [1, 128, 24]",
            "embed_positions_for_gpt_attention": "float32 [1, 3072]",
        }


# --- by law


def elements(each: ExpectedTensor) -> int:
    return math.prod(each.forms[0].shape)


REPLICATED = ("layernorm", "ln_f", "router", "shared_expert_gate", "dense.bias", "proj.bias")


@given(st.sampled_from([LLAMA, MIXTURE, QWEN_MOE, PHI_MOE, GEMMA_3]), st.data())
def test_ranks_share_out_each_layer_whole(config: dict[str, Any], data: st.DataObject) -> None:
    """Every layer is on one stage, each split tensor is as large on all ranks together as on one, and what is copied is whole."""
    stages = 1 if config is PHI_MOE else 5  # Phi's class has no stages
    tp, pp = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.integers(1, stages))
    ep = data.draw(st.sampled_from([n for n in (1, 2, 4) if tp % n == 0])) if "moe" in config else 1
    config = {**config, "num_key_value_heads": 4, "vocab_size": 96, "intermediate_size": 32 * tp, "use_parallel_embedding": True}
    (whole,), problems = contract(mapped(config))
    ranks, more = contract(mapped(config, tp, pp, moe_tp_size=tp // ep, moe_ep_size=ep))
    assert (problems, more, len(ranks)) == ([], [], tp * pp)
    found: dict[str, int] = {}
    for stage in range(pp):
        held = ranks[stage * tp : stage * tp + tp]
        first = sum(sum(name.endswith(".input_layernorm.weight") for name in ranks[before * tp]) for before in range(stage))
        for name, each in held[0].items():
            if not each.required:
                continue
            parts = name.split(".")
            if parts[1] == "layers":
                parts[2] = str(int(parts[2]) + first)
            copies = any(kind in name for kind in REPLICATED)
            assert [rank[name] for rank in held] == [each] * tp
            assert ".".join(parts) not in found
            found[".".join(parts)] = elements(each) * (1 if copies else tp)
    assert found == {name: elements(each) for name, each in whole.items() if each.required}


# --- as headrace writes them


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The families' models, each made when it is first asked for."""

    class Models(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = tmp_path_factory.mktemp(name) / "model"
            build(CASES[name]).save_pretrained(self[name])
            return self[name]

    return Models()


def unharmed(directory: Path) -> None:
    """Nothing is wrong with a conversion, and every tensor has a checksum."""
    checkpoint = open_checkpoint(directory)
    assert [str(problem) for problem in headers(checkpoint)] == []
    sums = list(checksums(checkpoint))
    assert {(rank, name) for rank, name, _ in sums} == {(n, name) for n, rank in enumerate(checkpoint.ranks) for name in rank}
    assert [check_tensor(checkpoint, rank, name) for rank, name, _ in sums] == [None] * len(sums)


@pytest.mark.parametrize(("name", "target"), [(name, target) for name, targets in WANTED.items() for target in targets])
def test_conversions_of_every_family(name: str, target: str, models: Mapping[str, Path], tmp_path: Path) -> None:
    buffers = target == "tp1"
    options = {"dtype": "bfloat16", "scheduler": "synchronous", "write_rope_buffers": buffers, **TARGETS[target]}
    convert(model_dir=models[name], output_dir=tmp_path / "ranks", **options)
    unharmed(tmp_path / "ranks")
    assert ("embed_positions" in open_checkpoint(tmp_path / "ranks").ranks[-1]) is buffers


@pytest.mark.parametrize("target", ["tp1", "tp4", "tp2pp2", "rows"])
@pytest.mark.parametrize("family", [internlm2, exaone])
def test_conversions_of_families_without_a_class(family: Any, target: str, tmp_path: Path) -> None:
    config = {**checkpoints.LLAMA, "attention_bias": family is internlm2, "vocab_size": 97}
    checkpoints.save(tmp_path / "model", *family(config, checkpoints.values(config)))
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "ranks", scheduler="synchronous", **TARGETS[target])
    assert json.loads((tmp_path / "ranks/config.json").read_text())["architecture"] in ("InternLM2ForCausalLM", "ExaoneForCausalLM")
    unharmed(tmp_path / "ranks")
