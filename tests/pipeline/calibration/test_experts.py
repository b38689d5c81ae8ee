"""Experts: what each of them takes, held together or read one by one, and FP8 with scales of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline import BadInput, convert, plan
from pipeline.calibration.layer_task import Reopened
from pipeline.calibration.plan import Calibration, CalibrationPlan, plan_calibration
from pipeline.planning.calibrating import Calibrating, bounded
from pipeline.planning.memory import Budget
from stages.read import find_source
from tests.end_to_end.test_float8_experts import NAMES, qwen_values
from tests.support import checkpoints, rank_files
from tests.support import quantized_checkpoints as source
from tests.support.commands import headrace
from tests.support.quantized_checkpoints import Arrays

EXPERTS = 4
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)


def made(family: str, directory: Path) -> tuple[Path, Arrays]:
    """A mixture in float32, and its tensors."""
    tensors = source.values(source.MIXTRAL) if family == "mixtral" else qwen_values()
    tensors = {name: values.astype(np.float32) for name, values in tensors.items()}
    checkpoints.save(directory / "model", {**NAMES[family][0], "torch_dtype": "float32"}, tensors)
    tokens = np.random.default_rng(0).integers(0, 96, (2, 3))  # few, so that some experts see none
    save_file({"input_ids": tokens}, directory / "tokens")
    return directory / "model", tensors


def ranges(directory: Path, *more: object) -> Arrays:
    words = ("--output", directory / "ranges", "--calibration_tokens", directory / "tokens", "--dtype", "float32", *more)
    ran = headrace("calibrate", directory / "model", *words)
    assert ran.code == 0, ran
    return load_file(directory / "ranges")


def by_hand(family: str, model: Path, tensors: Arrays, tokens: np.ndarray) -> dict[str, np.ndarray | None]:
    """The largest inputs of each expert, by what transformers' whole model says goes to which: None of those that see nothing."""
    running = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    _, place, (gate, up, down) = NAMES[family]
    found: dict[str, np.ndarray | None] = {}

    def telling(layer: int) -> Any:
        def tell(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            hidden, chosen = given[0].detach().numpy(), given[1].numpy()
            for expert in range(EXPERTS):
                front = f"model.layers.{layer}.{place}.{expert}"
                taken = hidden[(chosen == expert).any(1)]
                gates, ups = taken @ tensors[f"{front}.{gate}.weight"].T, taken @ tensors[f"{front}.{up}.weight"].T
                inside = gates / (1 + np.exp(-gates)) * ups
                for name, values in ((gate, taken), (up, taken), (down, inside)):
                    found[f"{front}.{name}|x"] = np.abs(values).max(0) if len(values) else None

        return tell

    for layer, module in enumerate(running.get_decoder().layers):
        experts = next(each for name, each in module.named_modules() if name.endswith("experts"))
        experts.register_forward_pre_hook(telling(layer))
    with torch.no_grad():
        for sample in tokens:
            seen = dict(found)
            running(input_ids=torch.from_numpy(sample)[None])
            for name, values in seen.items():
                new = found[name]
                found[name] = values if new is None else new if values is None else np.maximum(values, new)
    return found


@pytest.mark.parametrize("family", NAMES)
def test_each_expert_is_told_what_it_takes(family: str, tmp_path: Path) -> None:
    model, tensors = made(family, tmp_path)
    expected = by_hand(family, model, tensors, load_file(tmp_path / "tokens")["input_ids"])
    found = ranges(tmp_path)
    assert {name for name in found if ".experts." in name} == expected.keys()
    unseen = [name for name, values in expected.items() if values is None]
    assert unseen, "some expert sees nothing"
    for name, values in expected.items():
        if values is None:  # the largest of the others
            front, rest = name.split(".experts.")
            others = [each for other, each in expected.items() if other.startswith(front) and other.endswith(rest[1:])]
            values = np.maximum.reduce([each for each in others if each is not None])
        assert found[name].shape == values.shape
        assert np.abs(found[name] - values).max() < 1e-4 * values.max()


@pytest.mark.parametrize("family", NAMES)
def test_experts_one_by_one_are_the_same(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(family, tmp_path)
    together = ranges(tmp_path)
    (tmp_path / "ranges").unlink()
    monkeypatch.setattr(CalibrationPlan, "fits", lambda *_: True)
    one_by_one = ranges(tmp_path)
    assert together.keys() == one_by_one.keys()
    assert all(np.array_equal(together[name], one_by_one[name]) for name in together)


def planned(directory: Path) -> CalibrationPlan:
    asked = Calibration(directory / "tokens", None, directory, "x", "float32")
    return plan_calibration(find_source(directory / "model", None, None, None, False), Reopened(directory / "model"), asked)


def test_a_limit_that_all_experts_do_not_fit_in_has_them_read_one_by_one(tmp_path: Path) -> None:
    made("mixtral", tmp_path)
    plan = planned(tmp_path)
    assert plan.most_bytes - plan.least_bytes == 4 * 3 * 3 * 256 * 512, "three experts of four, in float32"
    assert plan.fits(plan.peak_bytes(False)) is False
    assert plan.fits(plan.peak_bytes(False) - 1) is True
    assert plan.fits(plan.peak_bytes(True) - 1) is None

    def alone(beside: int) -> Budget:
        return Budget(1, 0, 1, 0, least_bytes=beside + 1000)

    room = 1000 + plan.peak_bytes(False) - (64 << 20)
    for limit, expected in ((room, False), (room - 1, True)):
        chosen, _ = bounded(Calibrating(plan, {}), limit, alone)
        assert chosen is not None
        assert chosen.one_by_one is expected
    with pytest.raises(BadInput, match="without its experts"):
        bounded(Calibrating(plan, {}), 1 << 20, alone)


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (2, 2)], ids=["one", "tp", "ep"])
def test_float8_of_a_mixture(family: str, sizes: tuple[int, int], tmp_path: Path) -> None:
    model, tensors = made(family, tmp_path)
    tp, ep = sizes
    options: dict[str, Any] = {"use_fp8": True, "dtype": "bfloat16", "tp_size": tp, "moe_ep_size": ep, "scheduler": "threads"}
    options |= {"calibration_tokens": tmp_path / "tokens", "calibration_dtype": "float32"}
    convert(model_dir=model, output_dir=tmp_path / "out", **options)
    measured, (_, place, (gate, up, down)) = ranges(tmp_path), NAMES[family]
    for number in range(tp):
        rank = rank_files.read(tmp_path / "out" / f"rank{number}.safetensors")
        own = np.array_split(np.arange(EXPERTS), ep)[number if ep > 1 else 0]
        for layer in range(2):
            front = f"model.layers.{layer}.{place}"
            for name, parts in (("fc", (up, gate)), ("proj", (down,))):
                tensor = f"transformer.layers.{layer}.mlp.{name}"
                inputs = max(measured[f"{front}.{expert}.{part}|x"].max() for expert in own for part in parts)
                assert rank[f"{tensor}.activation_scaling_factor"] == np.float32(inputs) / np.float32(448)
                for position, expert in enumerate(own):
                    weights = [tensors[f"{front}.{expert}.{part}.weight"].astype(ml_dtypes.bfloat16) for part in parts]
                    largest = max(np.abs(weight.astype(np.float32)).max() for weight in weights)
                    scale = np.float32(largest) / np.float32(448)
                    assert rank[f"{tensor}.weights_scaling_factor"].reshape(-1)[position] == scale
                    if tp == 1:
                        codes = np.concatenate([(weight.astype(np.float32) / scale).astype(FLOAT8) for weight in weights])
                        assert rank[f"{tensor}.weight"][position].tobytes() == codes.tobytes()
    ran = headrace("verify", tmp_path / "out", "--source", model)
    assert ran.code == 0, ran
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]["quant_algo"] == "FP8"


def test_stacks_that_a_source_keeps_together_are_refused_by_name(tmp_path: Path) -> None:
    model, tensors = made("mixtral", tmp_path)
    for layer in range(2):
        front = f"model.layers.{layer}"
        each = [
            [tensors.pop(f"{front}.block_sparse_moe.experts.{n}.{name}.weight") for n in range(4)] for name in ("w1", "w3", "w2")
        ]
        tensors[f"{front}.mlp.experts.gate_up_proj"] = np.stack([np.concatenate(both) for both in zip(*each[:2], strict=True)])
        tensors[f"{front}.mlp.experts.down_proj"] = np.stack(each[2])
        tensors[f"{front}.mlp.gate.weight"] = tensors.pop(f"{front}.block_sparse_moe.gate.weight")
    checkpoints.save(model, {**source.MIXTRAL, "torch_dtype": "float32"}, tensors)
    options: dict[str, Any] = {"model_dir": model, "output_dir": tmp_path / "out", "use_fp8": True, "dtype": "bfloat16"}
    with pytest.raises(BadInput, match="experts"):
        plan(**options, calibration_tokens=tmp_path / "tokens")
