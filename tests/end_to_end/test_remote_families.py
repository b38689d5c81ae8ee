"""Families that transformers has no class for: the ranks compute what the published modelling code does.

`verify --logits` takes them for a model that transformers has; that both say the same is what these tests show.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import BadInput, convert, plan
from pipeline.reporting.verification import verify
from stages.read.ranks import open_checkpoint
from stages.verify.forward.decoder import Decoder
from tests.support import quantized_checkpoints
from tests.support.remote_models import RemoteModel, remote_models

MODELS = remote_models()
# Every axis of every rank is a multiple of 64 at TP 2, so that kernels take it.
WIDE = remote_models(hidden_size=256, intermediate_size=256, num_hidden_layers=1)
TOLERANCE = 1e-5  # of the greatest logit: float32 sums in another order
TARGETS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp4": {"tp_size": 4},
    "tp2pp2": {"tp_size": 2, "pp_size": 2},  # three layers: one stage has more
    "rows": {"tp_size": 2, "use_parallel_embedding": True},
}
FORMS: dict[str, dict[str, Any]] = {
    "int8": {"use_weight_only": True},
    "int4": {"use_weight_only": True, "weight_only_precision": "int4"},
    "fp8 rowwise": {"use_fp8_rowwise": True},
}


def logits(output: Path, tokens: torch.Tensor) -> torch.Tensor:
    decoder = Decoder(open_checkpoint(output))
    result = decoder.logits(tokens)
    assert decoder.unused() == []
    return result


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def check(output: Path, source: Path, name: str) -> None:
    """Verify an output, with the logits where transformers has a model that computes the same."""
    result = verify(output, source, logits=name != "arctic", tokens=11)
    result.check()
    if result.logits is not None:
        assert result.logits["comparisons"][-1]["max_relative"] < TOLERANCE


def tokens_of(model: RemoteModel) -> torch.Tensor:
    return torch.randint(model.config["vocab_size"], (20,), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", MODELS)
def test_the_ranks_compute_what_the_modelling_code_computes(name: str, target: str, tmp_path: Path) -> None:
    model = MODELS[name]
    source, output = model.save(tmp_path / "model"), tmp_path / "ranks"
    convert(model_dir=source, output_dir=output, dtype="float32", scheduler="synchronous", **TARGETS[target])
    tokens = tokens_of(model)
    assert apart(logits(output, tokens), model.logits(tokens)) < TOLERANCE
    check(output, source, name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "baichuan" else pytest.mark.nightly) for name in WIDE])
def test_numbers_quantized_on_the_way(name: str, form: str, tmp_path: Path) -> None:
    source, output = WIDE[name].save(tmp_path / "model"), tmp_path / "ranks"
    options = {
        "model_dir": source,
        "output_dir": output,
        "dtype": "bfloat16",
        "tp_size": 2,
        "scheduler": "synchronous",
        **FORMS[form],
    }
    if (name, form) == ("arctic", "fp8 rowwise"):
        with pytest.raises(BadInput, match="a model without experts"):
            convert(**options)
        return
    convert(**options)
    check(output, source, name)


FORMATS = {
    "gptq": quantized_checkpoints.gptq(sym=False),
    "awq": quantized_checkpoints.awq(),
    "fp8": quantized_checkpoints.modelopt_float8(cache=False),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "qwen" else pytest.mark.nightly) for name in WIDE])
def test_codes_are_kept(name: str, form: str, tmp_path: Path) -> None:
    """Of fused tensors, too: Qwen's c_attn and Baichuan's W_pack."""
    source, output = tmp_path / "model", tmp_path / "ranks"
    arrays = {key: values.numpy().astype(np.float16) for key, values in WIDE[name].tensors.items()}
    quantized_checkpoints.write(source, {**WIDE[name].config, "torch_dtype": "float16"}, FORMATS[form], tensors=arrays)
    convert(model_dir=source, output_dir=output, tp_size=2, scheduler="synchronous")
    check(output, source, name)
    held = open_checkpoint(output).ranks[0]
    kept = {held[each].dtype.name for each in held if each.endswith(("qkv.weight", "dense.weight", "fc.weight", "proj.weight"))}
    assert kept == ({"float8_e4m3fn"} if form == "fp8" else {"float16"})  # int4 codes, which pass for float16


def notes(model: RemoteModel, place: Path, **config: Any) -> tuple[str, ...]:
    changed = RemoteModel({**model.config, **config}, model.tensors, model.compute, model.beside)
    return plan(model_dir=changed.save(place / "model"), output_dir=place / "out").notes


def test_what_is_exact_until_a_length_is_said(tmp_path: Path) -> None:
    said = notes(MODELS["qwen"], tmp_path / "a")
    assert [note.partition(":")[0] for note in said if "exact until there" in note] == ["use_dynamic_ntk", "use_logn_attn"]
    assert not any("exact" in note for note in notes(MODELS["qwen"], tmp_path / "b", use_dynamic_ntk=False, use_logn_attn=False))
    written = plan(model_dir=tmp_path / "a" / "model", output_dir=tmp_path / "out").summary()["targets"][0]["config"]
    assert (written["max_position_embeddings"], written["use_logn_attn"], written["rotary_scaling"]) == (64, False, None)


REFUSED = {
    "Baichuan 13B": ("baichuan", {"num_attention_heads": 40, "hidden_size": 5120}, "ALiBi"),
    "Baichuan 1, 13B": ("baichuan", {"vocab_size": 64000}, "ALiBi"),
    "Nemotron-NAS": ("decilm", {"block_configs": [{}, {}]}, "layers that are all alike"),
    "DeciLM's layers": ("decilm", {"num_key_value_heads_per_layer": [2, 1, 2]}, "as many key heads in every layer"),
    "Qwen with biases": ("qwen", {"no_bias": False}, "no_bias: found False"),
    "InternLM3 with biases": ("internlm3", {"qkv_bias": True}, "qkv_bias: found True"),
    "dense layers in Arctic": ("arctic", {"moe_layer_frequency": 2}, "moe_layer_frequency: found 2"),
    "experts in MiniCPM": ("minicpm", {"num_experts": 8}, "num_experts: found 8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_classes_do_not_compute_is_refused_by_what_says_it(name: str, tmp_path: Path) -> None:
    family, changed, reason = REFUSED[name]
    with pytest.raises(BadInput, match=reason) as error:
        notes(MODELS[family], tmp_path, **changed)
    (problem,) = error.value.problems
    assert problem.remedy or "num_experts" in changed


@pytest.mark.parametrize(("name", "reason"), [("mimo", "a head that predicts a further token"), ("qwen", "the encoder of images")])
def test_what_belongs_to_no_token_is_left_out_and_said(name: str, reason: str, tmp_path: Path) -> None:
    made = plan(model_dir=MODELS[name].save(tmp_path / "model"), output_dir=tmp_path / "out")
    assert made.left_out.keys() == MODELS[name].beside.keys()
    assert all(each.startswith(reason) for each in made.left_out.values())
