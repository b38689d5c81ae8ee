"""integrity: the reference's files pass, and one tensor too few, too many, or of another shape or type is reported by its name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from pipeline.errors import Problem
from pipeline.tensor.checkpoint import Checkpoint
from pipeline.tensor.placement import Region
from pipeline.tensor.tensors import Block
from stages.read.ranks import open_checkpoint
from stages.verify.contract.integrity import headers
from tests.goldens.differences import as_1_2_reads
from tests.support.places import DATA

CASES = {f"{path.parents[1].name}/{path.name}": path for path in sorted(DATA.glob("*/expected/*"))}
LOST = "dense/mha_tp2pp2"  # the reference lost a layer of this one
WHOLE = [name for name in CASES if name != LOST]


@dataclass(frozen=True)
class Header:
    """A tensor of which there is only the header."""

    shape: tuple[int, ...]
    dtype: np.dtype
    path: str = ""

    def block(self, region: Region) -> Block:  # noqa: ARG002
        raise AssertionError("headers are checked without reading")

    def viewed(self, shape: tuple[int, ...], dtype: np.dtype) -> Header:
        return Header(shape, dtype)


def opened(name: str) -> Checkpoint:
    """A case's headers."""
    checkpoint = open_checkpoint(CASES[name])
    ranks = tuple({key: Header(each.shape, each.dtype) for key, each in rank.items()} for rank in checkpoint.ranks)
    return replace(checkpoint, ranks=ranks, config=as_1_2_reads(checkpoint.config, name))


def changed(checkpoint: Checkpoint, rank: int, tensors: Mapping[str, Header]) -> Checkpoint:
    return replace(checkpoint, ranks=(*checkpoint.ranks[:rank], tensors, *checkpoint.ranks[rank + 1 :]))


def found(checkpoint: Checkpoint) -> list[Problem]:
    return list(headers(checkpoint))


@pytest.mark.parametrize("name", WHOLE)
def test_the_references_files_pass(name: str) -> None:
    assert found(opened(name)) == []


def test_a_lost_layer_is_reported_tensor_by_tensor() -> None:
    """Three layers on two stages: the reference wrote one a stage."""
    problems = found(opened(LOST))
    assert {problem.found for problem in problems} == {"no such tensor"}
    assert {re.sub(r"\.[a-z_.]+weight$", "", problem.subject) for problem in problems} == {
        "rank0.safetensors: transformer.layers.1",
        "rank1.safetensors: transformer.layers.1",
    }
    assert len(problems) == 2 * 7


# Each: what becomes of one tensor, or nothing where it would stay what it is.
def dropped(tensor: Header) -> Iterator[Header | None]:  # noqa: ARG001
    yield None


def transposed(tensor: Header) -> Iterator[Header | None]:
    if tensor.shape != tensor.shape[::-1]:
        yield replace(tensor, shape=tensor.shape[::-1])


def retyped(tensor: Header) -> Iterator[Header | None]:
    for dtype in (np.dtype(np.float64), np.dtype(np.int8), np.dtype(np.float16)):
        if dtype != tensor.dtype:
            yield replace(tensor, dtype=dtype)


def resized(tensor: Header) -> Iterator[Header | None]:
    for axis, length in enumerate(tensor.shape):
        for other in (0, length - 1, length + 1, 2 * length):
            if other != length:
                yield replace(tensor, shape=(*tensor.shape[:axis], other, *tensor.shape[axis + 1 :]))
    yield replace(tensor, shape=(1, *tensor.shape))
    yield replace(tensor, shape=())


MUTATED = [
    "dense/bias_gqa_tp4",
    "dense/mixtral_tp2ep2",
    "dense/oddvocab_tied_tp2pe1",
    "families/gemma3_tp2",
    "families/phimoe_ep2",
    "families/qwen2_moe_tp4ep2_f16",
    "families/qwen3_pp2",
    *(name for name in CASES if name.startswith("quantized/")),
]


@pytest.mark.parametrize("change", [dropped, transposed, retyped, resized])
@pytest.mark.parametrize("name", MUTATED)
def test_a_changed_tensor_is_reported_by_its_name(name: str, change: Callable[[Header], Iterator[Header | None]]) -> None:
    checkpoint = opened(name)
    count = 0
    for rank in {0, len(checkpoint.ranks) - 1}:
        for tensor, header in checkpoint.ranks[rank].items():
            others = {key: each for key, each in checkpoint.ranks[rank].items() if key != tensor}
            for other in change(header):
                problems = found(changed(checkpoint, rank, others if other is None else {**others, tensor: other}))
                assert [problem.subject for problem in problems] == [f"rank{rank}.safetensors: {tensor}"], other
                assert problems[0].expected.startswith(f"{header.dtype.name} {list(header.shape)}")
                assert problems[0].found == ("no such tensor" if other is None else f"{other.dtype.name} {list(other.shape)}")
                count += 1
    assert count > 0


@pytest.mark.parametrize("name", MUTATED)
def test_a_tensor_too_many_is_reported_by_its_name(name: str) -> None:
    checkpoint = opened(name)
    for tensor, header in checkpoint.ranks[0].items():
        for other in (f"{tensor}.weight", tensor.replace("weight", "bias2"), tensor.replace("layers.0", "layers.99")):
            if other in checkpoint.ranks[0]:
                continue
            (problem,) = found(changed(checkpoint, 0, {**checkpoint.ranks[0], other: header}))
            assert problem.subject == f"rank0.safetensors: {other}"
            assert "does not ask for" in problem.found


def test_what_the_loader_computes_may_be_there_but_not_otherwise() -> None:
    checkpoint = opened("quantized/fp8modelopt_q_bf16-fp8-tp2pp1-auto-sm80-kv")
    float32 = np.dtype(np.float32)
    for name, shape in (
        ("rotary_inv_freq", (16,)),
        ("embed_positions", (1, 128, 32)),
        ("embed_positions_for_gpt_attention", (1, 4096)),
        ("transformer.layers.0.attention.kv_cache_rcp_scaling_factor", (1,)),
    ):
        fitting = {**checkpoint.ranks[1], name: Header(shape, float32)}
        assert found(changed(checkpoint, 1, fitting)) == []
        for wrong in (Header((*shape, 2), float32), Header(shape, np.dtype(np.float16))):
            (problem,) = found(changed(checkpoint, 1, {**fitting, name: wrong}))
            assert problem.subject == f"rank1.safetensors: {name}"


def test_weights_that_the_builder_quantizes_itself_are_taken_whole_and_without_scales() -> None:
    checkpoint = opened("quantized/q_bf16-int8-tp2pp1-auto-sm80")
    module, weight = "transformer.layers.0.mlp.proj", Header((128, 128), checkpoint.ranks[0]["lm_head.weight"].dtype)
    tensors = {**checkpoint.ranks[0], f"{module}.weight": weight}
    (problem,) = found(changed(checkpoint, 0, tensors))
    assert problem.subject == f"rank0.safetensors: {module}.weight", "its codes belong to the scales that are there"
    del tensors[f"{module}.per_channel_scale"]
    assert found(changed(checkpoint, 0, tensors)) == []
    problems = found(changed(checkpoint, 0, {**tensors, f"{module}.weight": replace(weight, shape=(128, 64))}))
    assert {problem.subject for problem in problems} == {
        f"rank0.safetensors: {module}.{name}" for name in ("weight", "per_channel_scale")
    }


# What a key of config.json brings about: the tensors that hang on it are named.
@pytest.mark.parametrize(
    ("name", "key", "value", "kind"),
    [
        ("dense/gqa_tp2", "head_size", 16, r"attention\.(qkv|dense)\.weight$"),
        ("dense/gqa_tp2", "vocab_size", 130, r"(vocab_embedding|lm_head)\.weight$"),
        ("dense/gqa_tp2", "num_key_value_heads", 4, r"attention\.qkv\.weight$"),
        ("dense/gqa_tp2", "attn_bias", True, r"attention\.(qkv|dense)\.bias$"),
        ("dense/gqa_tp2", "dtype", "bfloat16", r"weight$"),
        ("dense/gqa_tp2", "use_parallel_embedding", True, r"vocab_embedding\.weight$"),
        ("dense/gqa_tp2", "num_hidden_layers", 3, r"layers\.3\..*weight$"),
        ("dense/mixtral_tp2", "hidden_act", "silu", r"mlp\.fc\.weight$"),
        ("quantized/gptq_q_fp16-int4_gptq-tp1pp1-auto-sm80", "quantization.has_zero_point", False, r"zero$"),
        ("quantized/q_bf16-fp8_rowwise-tp2pp1-auto-sm80", "quantization.clamp_val", None, r"clamp_val$"),
        ("quantized/q_bf16-fp8_rowwise-tp2pp1-auto-sm80", "quantization.kv_cache_quant_algo", "FP8", r"kv_cache_scaling_factor$"),
    ],
)
def test_a_changed_config_is_seen_in_the_tensors(name: str, key: str, value: Any, kind: str) -> None:
    checkpoint = opened(name)
    config = json.loads(json.dumps(checkpoint.config))
    table, _, last = key.rpartition(".")
    (config[table] if table else config)[last] = value
    problems = found(replace(checkpoint, config=config))
    assert problems
    assert all(re.search(kind, problem.subject) for problem in problems), problems
    assert {problem.subject.split(".")[0] for problem in problems} == {f"rank{n}" for n in range(len(checkpoint.ranks))}
