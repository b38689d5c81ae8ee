"""InternLM2 and Exaone have no class in transformers: LLaMA models under their names must become LLaMA's very files, and compute
what LLaMA computes, although their config.json says less.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline import convert
from stages.read.ranks import open_checkpoint
from stages.verify.forward.decoder import Decoder
from tests.end_to_end.test_family_forward import SIZES, TARGETS, TOLERANCE, Case, build, difference
from tests.support import checkpoints
from tests.support.directories import contents
from tests.support.own_names import exaone, internlm2

Arrays = dict[str, np.ndarray]
Family = Callable[[dict[str, Any], Arrays], tuple[dict[str, Any], Arrays]]

LLAMA = {
    **{key: value for key, value in SIZES.items() if not key.endswith("token_id")},
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
BORROWED = {
    "plain": {},
    "biases": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True},
    "tied_biases": {"tie_word_embeddings": True, "attention_bias": True, "num_hidden_layers": 3},
    "heads": {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 101, "torch_dtype": "float32"},
    "scaled": {"rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "float16"},
}


@pytest.mark.parametrize("target", ["tp1", "tp4", "pp2", "tp2pp2", "rows"])
@pytest.mark.parametrize("options", BORROWED.values(), ids=BORROWED)
@pytest.mark.parametrize("family", [internlm2, exaone])
def test_a_llama_model_under_other_names_becomes_the_same_files(
    family: Family,
    options: dict[str, Any],
    target: str,
    tmp_path: Path,
) -> None:
    config = {**LLAMA, **options}
    if family is exaone and config.pop("attention_bias", False):
        config["num_key_value_heads"] = 1  # Exaone has no biases
    tensors = checkpoints.values(config)
    checkpoints.save(tmp_path / "llama", config, tensors)
    checkpoints.save(tmp_path / "other", *family(config, tensors))
    files = []
    for name in ("llama", "other"):
        output = tmp_path / f"{name}_ranks"
        convert(model_dir=tmp_path / name, output_dir=output, dtype="auto", scheduler="synchronous", **TARGETS[target])
        files.append(contents(output))
    ours, theirs = (json.loads(each.pop("config.json")) for each in reversed(files))
    assert files[0] == files[1]
    assert len(files[0]) == ours["mapping"]["world_size"]
    differ = {"architecture"} | ({"quantization"} if family is internlm2 else set())
    assert {key for key, value in ours.items() if theirs[key] != value} == differ
    assert (list(ours) == list(theirs)) is (family is exaone)


# NVIDIA's own converter says of InternLM2 only this of the ranks.
SHORT = ("world_size", "tp_size", "pp_size")


@pytest.mark.parametrize("target", ["tp1", "tp4", "tp2pp2"])
@pytest.mark.parametrize("family", [internlm2, exaone])
def test_it_computes_what_llama_computes(family: Family, target: str, tmp_path: Path) -> None:
    model = build(Case(LlamaConfig, LlamaForCausalLM, {"attention_bias": family is internlm2, "num_hidden_layers": 3}))
    model.save_pretrained(tmp_path / "llama")
    config = json.loads((tmp_path / "llama/config.json").read_text())
    old = {"rope_theta": config.pop("rope_parameters")["rope_theta"], "torch_dtype": config.pop("dtype")}
    given = family({**config, **old}, load_file(tmp_path / "llama/model.safetensors"))
    checkpoints.save(tmp_path / "other", *given)
    output = tmp_path / "ranks"
    convert(model_dir=tmp_path / "other", output_dir=output, dtype="float32", scheduler="synchronous", **TARGETS[target])
    tokens = torch.randint(SIZES["vocab_size"], (20,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        theirs = model(tokens[None]).logits[0]
    decoder = Decoder(open_checkpoint(output))
    assert difference(decoder.logits(tokens), theirs) < TOLERANCE
    assert decoder.unused() == []
    written = json.loads((output / "config.json").read_text())
    assert (len(written) == 20) is (family is internlm2)
    written["mapping"] = {key: written["mapping"][key] for key in SHORT}
    (output / "config.json").write_text(json.dumps(written))
    assert difference(Decoder(open_checkpoint(output)).logits(tokens), theirs) < TOLERANCE
