"""AWQ of numbers without scales, with those of another model or of other groups, or of a model that it is not for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support import act_ranges, checkpoints
from tests.support import quantized_checkpoints as source
from tests.support.commands import convert, headrace, one, refused
from tests.support.quantized_checkpoints import LLAMA, MIXTRAL, Arrays

AWQ = ("--quantization", "int4_awq", "--group_size", 64)
K, DOWN = "model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"


def model_of(tmp_path: Path, config: dict[str, Any] = LLAMA) -> Path:
    checkpoints.save(tmp_path / "model", config, source.values(config))
    return tmp_path / "model"


def scales_of(tmp_path: Path, edit: Callable[[Arrays], Any] = lambda _: None, size: int | None = 64) -> Path:
    found = act_ranges.scales(source.values(LLAMA))
    edit(found)
    save_file(found, tmp_path / "scales.safetensors", metadata={"awq_group_size": str(size)} if size else None)
    return tmp_path / "scales.safetensors"


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], Any]:
    return lambda found: found.update({f"{name}|awq": change(found[f"{name}|awq"])})


def first(value: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda old: np.concatenate([[value], old[1:]]).astype(np.float32)


WRONG: dict[str, tuple[Callable[[Arrays], Any], str]] = {
    "missing": (lambda found: found.pop(f"{DOWN}|awq"), f"{DOWN}|awq: found no such tensor; expected float32 [512]"),
    "shape": (changed(DOWN, lambda old: old[:256]), f"{DOWN}|awq: found float32 [256]; expected float32 [512]"),
    "type": (changed(DOWN, lambda old: old.astype(np.float16)), f"{DOWN}|awq: found float16 [512]"),
    "nan": (changed(DOWN, first(np.nan)), f"{DOWN}|awq: found a value that is not finite"),
    "zero": (changed(DOWN, first(0)), f"{DOWN}|awq: found a value that is not above 0"),
    "sign": (changed(DOWN, first(-1)), f"{DOWN}|awq: found a value that is not above 0"),
    "large": (changed(DOWN, first(2e4)), f"{DOWN}|awq: found a value outside 1/16384 to 16384"),
    "small": (changed(DOWN, first(5e-5)), f"{DOWN}|awq: found a value outside 1/16384 to 16384"),
    "apart": (changed(K, lambda old: old * np.float32(2)), "|awq: found other values than model.layers.0.self_attn."),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_scales_that_are_none(wrong: str, tmp_path: Path) -> None:
    edit, said = WRONG[wrong]
    assert said in one(refused(model_of(tmp_path), *AWQ, "--act_range", scales_of(tmp_path, edit)))


def test_without_a_file(tmp_path: Path) -> None:
    found = one(refused(model_of(tmp_path), *AWQ))
    assert found.startswith("--weight_only_precision int4_awq: found no --act_range")
    assert "headrace calibrate --awq_group_size 64" in found


def test_a_file_without_a_search(tmp_path: Path) -> None:
    ranges = act_ranges.write(tmp_path / "ranges", source.values(LLAMA))
    found = one(refused(model_of(tmp_path), *AWQ, "--act_range", ranges))
    assert "|awq: found no such tensor, and the like in 13 more tensors" in found
    assert "headrace calibrate --awq_group_size" in found


def test_scales_for_groups_of_another_size(tmp_path: Path) -> None:
    model, scales = model_of(tmp_path), scales_of(tmp_path)
    found = one(refused(model, "--quantization", "int4_awq", "--act_range", scales))
    assert "scales for groups of 64; expected groups of 128" in found
    assert "Give --group_size 64" in found
    assert convert(model, tmp_path / "out", *AWQ, "--act_range", scales).code == 0


def test_a_file_that_does_not_say_of_which_groups(tmp_path: Path) -> None:
    assert convert(model_of(tmp_path), tmp_path / "out", *AWQ, "--act_range", scales_of(tmp_path, size=None)).code == 0


def test_groups_that_no_kernel_has(tmp_path: Path) -> None:
    problems = refused(model_of(tmp_path), *AWQ[:2], "--group_size", 32, "--act_range", scales_of(tmp_path, size=32))
    assert any("--group_size 32" in each for each in problems)


def test_a_mixture(tmp_path: Path) -> None:
    checkpoints.save(tmp_path / "model", MIXTRAL, source.values(MIXTRAL))
    scales = act_ranges.write_scales(tmp_path / "scales", source.values(MIXTRAL))
    problems = refused(tmp_path / "model", *AWQ, "--act_range", scales)
    assert any(each.startswith("quantization: found 4 experts a layer, as W4A16_AWQ") for each in problems), problems


def test_a_calibration_of_a_mixture(tmp_path: Path) -> None:
    checkpoints.save(tmp_path / "model", MIXTRAL, source.values(MIXTRAL))
    save_file({"input_ids": np.arange(8)[None]}, tmp_path / "tokens")
    words = ("--output", tmp_path / "ranges", "--calibration_tokens", tmp_path / "tokens", "--awq_group_size", 64)
    ran = headrace("calibrate", tmp_path / "model", *words)
    assert ran.code == 2, ran
    assert "--awq_group_size 64: found 4 experts a layer" in ran.err
    assert not (tmp_path / "ranges").exists()


def test_in_features_that_are_no_whole_groups(tmp_path: Path) -> None:
    config = {**LLAMA, "hidden_size": 192, "head_dim": 64}
    model = model_of(tmp_path, config)
    save_file({"input_ids": np.arange(8)[None]}, tmp_path / "tokens")
    words = ("--output", tmp_path / "ranges", "--calibration_tokens", tmp_path / "tokens")
    ran = headrace("calibrate", model, *words, "--awq_group_size", 128)
    assert ran.code == 2, ran
    assert "of 192 in-features; expected a multiple of 128. Give --awq_group_size 64" in " ".join(ran.err.split())
    assert headrace("calibrate", model, *words, "--awq_group_size", 64, "--dry_run").code == 0


def test_one_calibration_is_for_groups_of_one_size(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    save_file({"input_ids": np.arange(8)[None]}, tmp_path / "tokens")
    (tmp_path / "job.toml").write_text(
        'model_dir = "model"\ncalibration_tokens = "tokens"\n'
        '[[target]]\noutput_dir = "a"\nquantization = "int4_awq"\ngroup_size = 64\n'
        '[[target]]\noutput_dir = "b"\nquantization = "int4_awq"\n'
    )
    ran = headrace("convert", tmp_path / "job.toml")
    assert ran.code == 2, ran
    assert "AWQ in groups of 64 and of 128" in ran.err
    assert model.is_dir()
    assert not (tmp_path / "a").exists()
