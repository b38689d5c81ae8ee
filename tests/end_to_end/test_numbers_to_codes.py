"""Numbers become codes by the published formulas, in groups or by row, for every generation of GPUs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import convert, verify
from tests.support import checkpoints
from tests.support import quantized_checkpoints as source
from tests.support.directories import contents
from tests.support.quantized_checkpoints import LLAMA, Arrays
from tests.support.rank_files import read
from tests.support.rank_matrices import (
    AGAIN,
    BLOCK,
    FORMATS,
    GROUPED,
    by_row,
    check_integers,
    cut,
    hard,
    matrix,
    of,
    quantization,
    signal_to_noise,
)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_weight_only(precision: str, dtype: str, tp: int, tmp_path: Path) -> None:
    config = {**LLAMA, "torch_dtype": dtype}
    weights = hard(source.values(config))
    checkpoints.save(tmp_path / "model", config, weights)
    flags, algorithm = AGAIN[precision]
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", tp_size=tp, scheduler="threads", **flags)
    assert quantization(tmp_path / "out") == {**BLOCK, "quant_algo": algorithm}
    for rank in range(tp):
        ours = read(tmp_path / f"out/rank{rank}.safetensors")
        for module, wanted in cut(weights, config, rank, tp).items():
            check_integers(ours, module, wanted.astype(np.float16 if dtype == "float32" else wanted.dtype), int(precision[3:]))


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float8_by_row(dtype: str, tp: int, tmp_path: Path) -> None:
    config = {**LLAMA, "torch_dtype": dtype, "num_hidden_layers": 3}
    weights = hard(source.values(config))
    checkpoints.save(tmp_path / "model", config, weights)
    for recipe in (False, True):
        output = tmp_path / str(recipe)
        flags = {"use_fp8_rowwise": True, "use_meta_fp8_rowwise_recipe": recipe}
        convert(model_dir=tmp_path / "model", output_dir=output, tp_size=tp, scheduler="threads", **flags)
        for rank in range(tp):
            ours = read(output / f"rank{rank}.safetensors")
            check_rows(ours, cut(weights, config, rank, tp), recipe)


def check_rows(ours: Arrays, wanted: dict[str, np.ndarray], recipe: bool) -> None:
    clamps = {name for name in ours if name.endswith("clamp_val")}
    expected = set()
    for module, weight in wanted.items():
        kept = recipe and (".attention." in module or ".layers.1." not in module)
        if kept:
            np.testing.assert_array_equal(ours[f"{module}.weight"], weight)
            continue
        codes, scales = by_row(weight)
        np.testing.assert_array_equal(ours[f"{module}.weight"].astype(np.float32), codes)
        np.testing.assert_array_equal(ours[f"{module}.per_channel_scale"], scales)
        layer, short = module.rsplit(".", 2)[0], module.rsplit(".", 2)[1]
        norm = {"attention": "input_layernorm", "mlp": "post_layernorm"}[short]
        expected |= {f"{layer}.{short}.clamp_val", f"{layer}.{norm}.clamp_val"}
    assert clamps == expected
    assert all(ours[name].tolist() == [-1200.0, 1200.0] and ours[name].dtype == np.float32 for name in clamps)


def test_the_bound_of_activations_is_the_source_s(tmp_path: Path) -> None:
    kind, config = source.fbgemm(bound=900.0), of("fbgemm")
    source.write(tmp_path / "model", config, kind)
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler="threads", **kind.flags)
    assert quantization(tmp_path / "out")["clamp_val"] == [-900.0, 900.0]
    assert read(tmp_path / "out/rank0.safetensors")["transformer.layers.1.mlp.clamp_val"].tolist() == [-900.0, 900.0]


@pytest.mark.parametrize("more", [{}, {"group_size": 64}, {"tp_size": 2}, {"dtype": "bfloat16", "sm": 90}], ids=str)
def test_act_order_is_quantized_again(more: dict[str, Any], tmp_path: Path) -> None:
    weights = source.write(tmp_path / "model", LLAMA, source.gptq(index="order", sym=False))
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", requantize=True, scheduler="threads", **more)
    assert quantization(tmp_path / "out") == {**BLOCK, "quant_algo": "W4A16_GPTQ", **GROUPED}
    tp = more.get("tp_size", 1)
    for rank in range(tp):
        ours = read(tmp_path / f"out/rank{rank}.safetensors")
        for module, wanted in cut(weights, LLAMA, rank, tp).items():
            assert signal_to_noise(matrix(ours, module, more.get("sm", 80)), wanted) > 17, module
            assert not np.any(ours[f"{module}.zero"].astype(np.float32))
    note, *of_gpus = json.loads((tmp_path / "out/headrace.json").read_text())["notes"]
    assert len(of_gpus) == ("sm" not in more)
    assert 17 < float(re.findall(r"([\d.]+) dB", note)[0]) < 30, note


def test_plain_gptq_is_quantized_again_with_other_groups(tmp_path: Path) -> None:
    weights = source.write(tmp_path / "model", LLAMA, source.gptq(group=128))
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", requantize=True, group_size=64, scheduler="threads")
    ours = read(tmp_path / "out/rank0.safetensors")
    for module, wanted in cut(weights, LLAMA, 0, 1).items():
        assert ours[f"{module}.weights_scaling_factor"].shape == (wanted.shape[1] // 64, wanted.shape[0])
        assert signal_to_noise(matrix(ours, module), wanted) > 17


@pytest.mark.parametrize("flags", [{}, AGAIN["int8"][0], AGAIN["int4"][0]], ids=["gptq", "int8", "int4"])
def test_generations(flags: dict[str, Any], tmp_path: Path) -> None:
    if flags:
        weights = source.values(LLAMA)
        checkpoints.save(tmp_path / "model", LLAMA, weights)
    else:
        weights = source.write(tmp_path / "model", LLAMA, FORMATS["gptq asymmetric"])
    written, ranks = {}, {}
    for sm in (75, 80, 86, 87, 89, 90, 100, 103, 120, 121):
        convert(model_dir=tmp_path / "model", output_dir=tmp_path / str(sm), sm=sm, tp_size=2, scheduler="threads", **flags)
        written[sm] = contents(tmp_path / str(sm))
        said = json.loads((tmp_path / str(sm) / "headrace.json").read_text())
        assert said["options"]["sm"] == sm
        verify(tmp_path / str(sm), tmp_path / "model").check()
        ranks[sm] = read(tmp_path / f"{sm}/rank1.safetensors")
    for sm, each in written.items():
        like = {90: 90, 100: 100, 103: 100}.get(sm, 80)
        assert each == written[like], sm
        assert each["config.json"] == written[80]["config.json"]
    for module in cut(weights, LLAMA, 1, 2):
        for sm in (90, 100):
            np.testing.assert_array_equal(matrix(ranks[sm], module, sm), matrix(ranks[80], module, 80))
        first, *others = (ranks[sm][f"{module}.weight"].tobytes() for sm in (80, 90, 100))
        assert len({first, *others}) == 3


def test_the_generation_does_not_matter_for_float8(tmp_path: Path) -> None:
    source.write(tmp_path / "model", LLAMA, FORMATS["compressed fp8"])
    for sm in (80, 90, 100, "any"):
        convert(model_dir=tmp_path / "model", output_dir=tmp_path / str(sm), sm=sm, scheduler="threads")
    assert contents(tmp_path / "80") == contents(tmp_path / "90") == contents(tmp_path / "100") == contents(tmp_path / "any")
