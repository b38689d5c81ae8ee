"""NVIDIA's own rank files compute what their source computes, and where its converter is known to be wrong, they do not.

The files of tests/data were written by no code of headrace's, so that the decoder reads the format as their writer meant it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.errors import VerificationFailed
from pipeline.tensor.checkpoint import Checkpoint
from stages.read.ranks import open_checkpoint
from stages.verify.forward.decoder import Decoder
from stages.verify.forward.transformers_model import set_head_epsilon
from tests.end_to_end.test_family_forward import TOLERANCE, difference
from tests.goldens.differences import as_1_2_reads
from tests.support.places import DATA

# One rounding of the source's numbers to 16 bits; of Gemma's norms, whose 1 has been added.
ROUNDED = {"mha_tp1": 2e-3, "gemma_": 2e-3, "gemma2_tp": 1e-2, "gemma3_": 2e-2}
# Biases of the MLP are lost; the shares of Qwen3's experts do not sum to one.
WRONG = ("bias_gqa_tp4", "qwen3_moe_tp1", "qwen3_moe_tp2", "qwen3_moe_ep2", "qwen3_moe_pp2")
LOST_LAYER, WRITTEN_TWICE = "mha_tp2pp2", "exaone_pp2"
NOT_IN_TRANSFORMERS = ("internlm2", "exaone", "meta_")
CASES = {
    case["case"]: (group, case["model"])
    for group in ("dense", "families")
    for case in json.loads((DATA / group / "cases.json").read_text())
}
KNOWN = [name for name in CASES if not name.startswith(NOT_IN_TRANSFORMERS) and name != LOST_LAYER]


def tokens(vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (12,), generator=torch.Generator().manual_seed(0))


def told_windows(name: str) -> Checkpoint:
    """NVIDIA's files with the windows and the rope that their converter leaves to nobody or writes as no class of 1.2 reads it."""
    group, _ = CASES[name]
    checkpoint = open_checkpoint(DATA / group / "expected" / name)
    config = as_1_2_reads(checkpoint.config, f"{group}/{name}")
    return replace(checkpoint, config=config)


def computed(name: str) -> Tensor:
    checkpoint = told_windows(name)
    decoder = Decoder(checkpoint)
    result = decoder.logits(tokens(checkpoint.config["vocab_size"]))
    assert decoder.unused() == []
    return result


@cache
def theirs(directory: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    set_head_epsilon(model, 1e-5)  # TensorRT-LLM's
    with torch.no_grad():
        result: Tensor = model(tokens(model.config.vocab_size)[None]).logits[0]
    return result


@pytest.mark.parametrize("name", KNOWN)
def test_it_computes_what_its_source_computes(name: str) -> None:
    group, model = CASES[name]
    apart = difference(computed(name), theirs(DATA / group / "models" / model))
    if name in WRONG:
        assert apart > 1e-2
    else:
        assert apart < next((bound for start, bound in ROUNDED.items() if name.startswith(start)), TOLERANCE)


@pytest.mark.parametrize("name", [name for name in WRONG if name.startswith("qwen3_moe")])
def test_shares_that_sum_to_one_are_all_that_was_forgotten(name: str) -> None:
    checkpoint = told_windows(name)
    config = {**checkpoint.config, "moe": {**checkpoint.config["moe"], "normalization_mode": 1}}
    ours = Decoder(replace(checkpoint, config=config)).logits(tokens(config["vocab_size"]))
    assert difference(ours, theirs(DATA / "families/models" / CASES[name][1])) < TOLERANCE


def test_a_layer_that_uneven_stages_lost_is_named() -> None:
    with pytest.raises(VerificationFailed, match=r"rank0\.safetensors: transformer\.layers\.1\..*found nothing"):
        computed(LOST_LAYER)


@pytest.mark.parametrize("names", [("internlm2_", "internlm2_tp1"), ("exaone_", "exaone_tp1"), ("meta_gqa", "meta_gqa_1_tp2")])
def test_ranks_of_one_model_agree(names: tuple[str, str]) -> None:
    """Those that transformers has no class for."""
    start, first = names
    others = [name for name in CASES if name.startswith(start) and name != first]
    assert len(others) >= 2
    whole = computed(first)
    for name in others:
        apart = difference(computed(name), whole)
        assert apart > 1e-2 if name == WRITTEN_TWICE else apart < TOLERANCE, name
