"""Scales of an FP8 cache under every name in use: written where an FP8 cache is asked for, and else left out with a word."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import BadInput, convert, plan
from pipeline.reporting.verification import verify
from tests.support import checkpoints
from tests.support import quantized_checkpoints as source
from tests.support.directories import contents
from tests.support.examples import by_night
from tests.support.quantized_checkpoints import BF16, LLAMA, Arrays, Format
from tests.support.rank_files import read

# The scales of a layer by name, less the attention module's own; keys have 0.5 and values 0.25, and the layer's number more.
NAMES = {
    "llm-compressor": {"k_scale": 0.5, "v_scale": 0.25},
    "llm-compressor, older": {"k_proj.output_scale": 0.5, "v_proj.output_scale": 0.25},
    "autofp8": {"kv_scale": 0.5},
    "modelopt": {"k_proj.k_scale": 0.5, "v_proj.v_scale": 0.25},
    "values are larger": {"k_scale": 0.125, "v_scale": 0.5},
}
# Made anew each time: some draw random numbers.
KINDS: dict[str, Callable[[], Format | None]] = {
    "float8": lambda: source.compressed_float8(dynamic=False),
    "by row": lambda: source.compressed_float8(dynamic=True),
    "int8": source.compressed_int8,
    "gptq": source.gptq,
    "modelopt awq": source.modelopt_awq,
    "numbers": lambda: None,
}


def scales(names: dict[str, float], shape: tuple[int, ...] = (1,), dtype: Any = BF16) -> Arrays:
    return {
        f"model.layers.{layer}.self_attn.{name}": np.full(shape, value + layer, dtype)
        for layer in range(2)
        for name, value in names.items()
    }


def model_of(directory: Path, kind: Format | None, more: Arrays, **settings: Any) -> Path:
    tensors = source.values(LLAMA)
    stored = source.quantized(tensors, kind, 2)[0] if kind else tensors
    kind = kind and replace(kind, settings={**kind.settings, **settings} if kind.settings else {})
    checkpoints.save(directory, source.described(LLAMA, kind) if kind else LLAMA, {**stored, **more})
    for name, content in (kind.files if kind else {}).items():
        (directory / name).write_text(json.dumps(content))
    return directory


def cache_of(output: Path, tp: int, pp: int = 1) -> list[list[float]]:
    """The scale of each layer of each rank."""
    ranks = [read(output / f"rank{rank}.safetensors") for rank in range(tp * pp)]
    name = "transformer.layers.{}.attention.kv_cache_scaling_factor"
    return [[float(held[name.format(layer)][0]) for layer in range(2 // pp)] for held in ranks]


# By day every name with one kind, and every kind with one name.
DAY = [(name, kind) for number, name in enumerate(NAMES) for kind in list(KINDS)[number : number + 1]] + [("autofp8", "numbers")]


@pytest.mark.parametrize(("name", "kind"), by_night(itertools.product(NAMES, KINDS), DAY))
def test_every_name_with_every_kind_of_module(name: str, kind: str, tmp_path: Path) -> None:
    model = model_of(tmp_path / "model", KINDS[kind](), scales(NAMES[name]))
    options = {"model_dir": model, "tp_size": 2, "scheduler": "synchronous"}
    convert(output_dir=tmp_path / "with", fp8_kv_cache=True, **options)
    assert cache_of(tmp_path / "with", 2) == [[0.5, 1.5]] * 2
    verify(tmp_path / "with", model).check()
    convert(output_dir=tmp_path / "without", **options)
    without = json.loads((tmp_path / "without/headrace.json").read_text())["left_out"]
    assert scales(NAMES[name]).keys() <= without.keys()
    assert all("--fp8_kv_cache" in without[each] for each in scales(NAMES[name]))
    # The rest is what a source without such scales gives.
    bare = model_of(tmp_path / "bare", KINDS[kind](), {})
    convert(output_dir=tmp_path / "plain", **{**options, "model_dir": bare})
    assert contents(tmp_path / "without") == contents(tmp_path / "plain")


@pytest.mark.parametrize("name", by_night(NAMES, ["llm-compressor", "autofp8", "modelopt"]))
def test_stages_and_dequantized_numbers_keep_them(name: str, tmp_path: Path) -> None:
    model = model_of(tmp_path / "model", KINDS["float8"](), scales(NAMES[name], (), np.float32))
    options = {"fp8_kv_cache": True, "scheduler": "synchronous"}
    convert(model_dir=model, output_dir=tmp_path / "stages", tp_size=2, pp_size=2, **options)
    assert cache_of(tmp_path / "stages", 2, 2) == [[0.5], [0.5], [1.5], [1.5]]
    convert(model_dir=model, output_dir=tmp_path / "numbers", dequantize=True, **options)
    assert cache_of(tmp_path / "numbers", 1) == [[0.5, 1.5]]
    for after in ("read", "rename", "unpack", "shard"):
        convert(model_dir=model, output_dir=tmp_path / after, tp_size=2, pp_size=2, scratch_after=after, **options)
        assert contents(tmp_path / after) == contents(tmp_path / "stages")


def test_a_fused_projection_has_both(tmp_path: Path) -> None:
    config = {**LLAMA, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
    tensors: Arrays = dict(source.values(LLAMA))
    for layer in range(2):
        for whole, parts in (("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                             ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"))):  # fmt: skip
            rows = [tensors.pop(f"model.layers.{layer}.{part}.weight") for part in parts]
            tensors[f"model.layers.{layer}.{whole}.weight"] = np.concatenate(rows)
    more = scales({"qkv_proj.k_scale": 0.25, "qkv_proj.v_scale": 0.5})
    checkpoints.save(tmp_path / "model", config, {**tensors, **more})
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", fp8_kv_cache=True, tp_size=2, scheduler="synchronous")
    assert cache_of(tmp_path / "out", 2) == [[0.5, 1.5]] * 2
    verify(tmp_path / "out", tmp_path / "model").check()


def test_scales_of_a_cache_of_integers_are_not_those_of_fp8(tmp_path: Path) -> None:
    scheme = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": True}
    more = scales(NAMES["llm-compressor"]) | scales({"k_zero_point": 0, "v_zero_point": 0}, dtype=np.int8)
    model = model_of(tmp_path / "model", KINDS["int8"](), more, kv_cache_scheme=scheme)
    convert(model_dir=model, output_dir=tmp_path / "out", fp8_kv_cache=True, scheduler="synchronous")
    assert cache_of(tmp_path / "out", 1) == [[1.0, 1.0]]
    left = json.loads((tmp_path / "out/headrace.json").read_text())["left_out"]
    assert "integers" in left["model.layers.0.self_attn.k_scale"]
    assert "zero points" in left["model.layers.1.self_attn.v_zero_point"]
    verify(tmp_path / "out", model).check()


def test_scales_of_queries_are_left_out(tmp_path: Path) -> None:
    more = scales({"q_scale": 0.5, "q_proj.q_scale": 0.5, "prob_output_scale": 0.5})
    model = model_of(tmp_path / "model", KINDS["float8"](), more)
    left = plan(model_dir=model, output_dir=tmp_path / "out").left_out
    assert {name: left[name] for name in more} == dict.fromkeys(more, "queries and attention weights are not quantized")


@pytest.mark.parametrize(
    ("more", "subject"),
    [
        ({"k_scale": 0.5}, "model.layers.0.self_attn.v_scale"),
        ({"v_scale": 0.5}, "model.layers.0.self_attn.k_scale"),
    ],
)
def test_one_of_two_is_refused(more: dict[str, float], subject: str, tmp_path: Path) -> None:
    model = model_of(tmp_path / "model", KINDS["float8"](), scales(more))
    with pytest.raises(BadInput) as refused:
        plan(model_dir=model, output_dir=tmp_path / "out", fp8_kv_cache=True)
    assert {subject, subject.replace("layers.0", "layers.1")} == {problem.subject for problem in refused.value.problems}


@pytest.mark.parametrize("names", ["llm-compressor", "modelopt"])
def test_a_scale_for_each_head_matters_to_a_cache_alone(names: str, tmp_path: Path) -> None:
    more = scales(NAMES[names], (2, 1, 1))
    model = model_of(tmp_path / "model", KINDS["float8"](), more)
    with pytest.raises(BadInput, match=r"expected one scale\. Leave out --fp8_kv_cache") as refused:
        plan(model_dir=model, output_dir=tmp_path / "out", fp8_kv_cache=True)
    assert {problem.subject for problem in refused.value.problems} <= more.keys()
    bare = model_of(tmp_path / "bare", KINDS["float8"](), {})
    for name, source_ in (("with", model), ("without", bare)):
        convert(model_dir=source_, output_dir=tmp_path / name, scheduler="synchronous")
    assert more.keys() <= json.loads((tmp_path / "with/headrace.json").read_text())["left_out"].keys()
    assert contents(tmp_path / "with") == contents(tmp_path / "without")
    verify(tmp_path / "with", model).check()


def test_a_scale_for_each_head_of_integers_does_not_matter(tmp_path: Path) -> None:
    scheme = {"num_bits": 8, "type": "int"}
    model = model_of(tmp_path / "model", KINDS["int8"](), scales(NAMES["llm-compressor"], (2, 1, 1)), kv_cache_scheme=scheme)
    convert(model_dir=model, output_dir=tmp_path / "out", fp8_kv_cache=True, scheduler="synchronous")
    assert cache_of(tmp_path / "out", 1) == [[1.0, 1.0]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_scale_that_is_not_finite_is_refused(name: str, wrong: float, tmp_path: Path) -> None:
    more = scales(NAMES[name])
    model = model_of(tmp_path / "model", KINDS["float8"](), {**more, max(more): np.full((1,), wrong, BF16)})
    said = r"layers\.1\.attention\.kv_cache_scaling_factor: scales: found a scale that is not finite .*leave out --fp8_kv_cache"
    with pytest.raises(BadInput, match=said):
        convert(model_dir=model, output_dir=tmp_path / "out", fp8_kv_cache=True, scheduler="synchronous")
    assert not (tmp_path / "out").exists()
    convert(model_dir=model, output_dir=tmp_path / "out", scheduler="synchronous")


def test_a_layer_that_the_model_does_not_have(tmp_path: Path) -> None:
    more = {"model.layers.2.self_attn.k_scale": np.ones(1, BF16), "model.layers.2.self_attn.v_scale": np.ones(1, BF16)}
    model = model_of(tmp_path / "model", KINDS["float8"](), more)
    with pytest.raises(BadInput, match="belongs nowhere"):
        plan(model_dir=model, output_dir=tmp_path / "out")


def test_a_wrong_scale_is_found(tmp_path: Path) -> None:
    model = model_of(tmp_path / "model", KINDS["float8"](), scales(NAMES["llm-compressor"]))
    convert(model_dir=model, output_dir=tmp_path / "out", fp8_kv_cache=True, scheduler="synchronous")
    other = model_of(tmp_path / "other", KINDS["float8"](), scales({"k_scale": 0.75, "v_scale": 0.25}))
    subjects = [finding.problem.subject for finding in verify(tmp_path / "out", other).findings]
    assert any(subject.endswith("kv_cache_scaling_factor") for subject in subjects)
