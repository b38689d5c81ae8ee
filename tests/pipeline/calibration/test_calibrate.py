"""`headrace calibrate`: the reference's own ranges, transformers' of other families, resumed, up to date, and refused."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.models import make
from pipeline import BadInput
from pipeline.calibration.plan import Calibration
from pipeline.run.calibrations import RangesFile, calibrate, plan_ranges
from stages.calibrate.layers import LayeredModel
from tests.support import checkpoints
from tests.support import quantized_checkpoints as source
from tests.support.calibrations import ran, random_tokens
from tests.support.commands import headrace, tree
from tests.support.places import DATA
from tests.support.quantized_checkpoints import Arrays

GOLDENS = DATA / "smoothquant"
MODELS = {"q_bf16": "q_bf16-sq_pc_pt-tp2pp1", "q_fp16": "q_fp16-sq_pc_pt-tp2pp1"}
# Of the largest of a tensor: sums of float16 products in another order, over two layers; a step of float16 is 1e-3 at most.
ROUNDING = 3e-3


def planned(model: Path, tokens: Path, output: Path, dtype: str = "auto", *, overwrite: bool = False) -> RangesFile:
    asked = Calibration(tokens, None, output.parent / ".headrace-scratch", output.name, dtype)
    return plan_ranges(model, output, asked, 2 << 30, None, overwrite)


def golden(model: str, output: Path) -> RangesFile:
    folder = GOLDENS / "models" / model
    return planned(folder, folder / "calibration_tokens.safetensors", output, dtype="float16")


def apart(found: Arrays, expected: Arrays) -> float:
    """The largest difference of two files' values, as a share of each tensor's largest."""
    return max(float(np.abs(found[name] - expected[name]).max() / np.abs(expected[name]).max()) for name in found)


@pytest.mark.parametrize("model", MODELS)
def test_ranges_are_those_of_the_reference(model: str, tmp_path: Path) -> None:
    calibrate(golden(model, tmp_path / "ranges"))
    found, expected = load_file(tmp_path / "ranges"), load_file(GOLDENS / "expected" / MODELS[model] / "act_range.safetensors")
    assert found.keys() == {name for name in expected if not name.startswith("lm_head")}
    assert all(found[name].shape == expected[name].shape and found[name].dtype == np.float32 for name in found)
    assert apart(found, expected) < ROUNDING


@pytest.mark.parametrize("model", MODELS)
def test_codes_are_those_of_the_reference_but_for_ties(model: str, tmp_path: Path) -> None:
    calibrate(golden(model, tmp_path / "ranges"))
    flags = ("--smoothquant", 0.5, "--per_channel", "--per_token", "--dtype", "float16", "--tp_size", 2)
    more = ("--output_dir", tmp_path / "out", "--act_range", tmp_path / "ranges", "--scheduler", "threads")
    ran = headrace("convert", "--model_dir", GOLDENS / "models" / model, *flags, *more)
    assert ran.code == 0, ran.err
    for rank in ("rank0.safetensors", "rank1.safetensors"):
        found, expected = (load_file(folder / rank) for folder in (tmp_path / "out", GOLDENS / "expected" / MODELS[model]))
        assert found.keys() == expected.keys()
        codes = {name for name, values in expected.items() if values.dtype == np.int8}
        steps = np.concatenate([np.abs(found[name].astype(int) - expected[name]).reshape(-1) for name in sorted(codes)])
        assert steps.max() <= 1
        assert np.count_nonzero(steps) <= len(steps) // 100


FAMILIES = ["qwen2_untied", "qwen3_untied", "gemma", "gemma2", "gemma3", "phi3", "qwen3_moe_tied"]


def whole_model(model: Path, tokens: np.ndarray) -> Arrays:
    """The ranges of transformers' own model in float32, by hooks on all of its linears, all samples at once."""
    found: dict[str, torch.Tensor] = {}
    running = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()

    def see(name: str, values: torch.Tensor) -> None:
        largest = values.detach().abs().reshape(-1, values.shape[-1]).amax(0)
        found[name] = torch.maximum(found.get(name, largest), largest)

    def telling(name: str) -> Any:
        def tell(_: torch.nn.Module, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> None:
            see(f"{name}|x", given[0])
            see(f"{name}|y", made)

        return tell

    for name, module in running.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            module.register_forward_hook(telling(name))
    with torch.no_grad():
        running(input_ids=torch.from_numpy(tokens))
    return {name: values.numpy() for name, values in found.items()}


@pytest.mark.parametrize("family", [name for name in FAMILIES if (DATA / "families" / "models" / name).is_dir()])
def test_other_families_are_as_transformers_runs_them_whole(family: str, tmp_path: Path) -> None:
    model = DATA / "families" / "models" / family
    tokens = np.random.default_rng(0).integers(0, 96, (3, 20))
    save_file({"input_ids": tokens}, tmp_path / "tokens")
    calibrate(planned(model, tmp_path / "tokens", tmp_path / "ranges", dtype="float32"))
    found, expected = load_file(tmp_path / "ranges"), whole_model(model, tokens)
    assert {name for name in found if not name.endswith("|w")} == expected.keys()
    assert apart({name: found[name] for name in expected}, expected) < 1e-4


def test_a_quantized_source_is_run_as_its_numbers(tmp_path: Path) -> None:
    stands_for = source.write(tmp_path / "packed", source.LLAMA, source.gptq())
    source.write_float(tmp_path / "float", source.LLAMA, stands_for)
    save_file({"input_ids": np.arange(16).reshape(2, 8)}, tmp_path / "tokens")
    for name in ("packed", "float"):
        calibrate(planned(tmp_path / name, tmp_path / "tokens", tmp_path / f"{name}.ranges", dtype="float32"))
    assert apart(load_file(tmp_path / "packed.ranges"), load_file(tmp_path / "float.ranges")) < 1e-5


class Stopped(BaseException):
    """Ends a run as a kill would, without its consent."""


@pytest.mark.parametrize("sample", [0, 3])
def test_a_run_that_is_stopped_goes_on_with_the_layer_that_it_was_at(
    sample: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrate(golden("q_bf16", tmp_path / "whole"))
    run, seen = LayeredModel.run, list[int]()

    def stopping(self: LayeredModel, number: int, hidden: np.ndarray) -> np.ndarray:
        seen.append(number)
        if seen.count(1) == sample + 1:
            raise Stopped
        return run(self, number, hidden)

    plan = golden("q_bf16", tmp_path / "ranges")
    with monkeypatch.context() as patched:
        patched.setattr(LayeredModel, "run", stopping)
        with pytest.raises(Stopped):
            calibrate(plan)
    assert not (tmp_path / "ranges").exists()
    result = calibrate(golden("q_bf16", tmp_path / "ranges"))
    assert result.resumed_layers == 1
    assert (tmp_path / "ranges").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not (tmp_path / ".headrace-scratch").exists(), "scratch is removed"


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    assert not calibrate(golden("q_bf16", tmp_path / "ranges")).up_to_date
    before = tree(tmp_path)
    assert calibrate(golden("q_bf16", tmp_path / "ranges")).up_to_date
    assert tree(tmp_path) == before
    folder = GOLDENS / "models" / "q_bf16"
    other = (folder, folder / "calibration_tokens.safetensors", tmp_path / "ranges", "float32")
    with pytest.raises(BadInput, match=r"found the ranges of another calibration; .* or give --overwrite"):
        planned(*other)
    assert tree(tmp_path) == before
    assert not calibrate(planned(*other, overwrite=True)).up_to_date
    assert (tmp_path / "ranges").read_bytes() != before["ranges"][2]


@pytest.mark.parametrize("what", ["weights", "tokens", "a link to the weights", "another file"])
def test_a_file_of_something_else_stays(what: str, tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", source.LLAMA)
    save_file({"input_ids": np.arange(8)[None]}, tmp_path / "tokens")
    (tmp_path / "link").symlink_to(tmp_path / "model/model.safetensors")
    (tmp_path / "other").write_text("not of safetensors")
    name, said = {
        "weights": ("model/model.safetensors", "a file that the calibration reads"),
        "tokens": ("tokens", "a file that the calibration reads"),
        "a link to the weights": ("link", "a file that the calibration reads"),
        "another file": ("other", "a file that headrace calibrate did not write"),
    }[what]
    before = tree(tmp_path)
    for more in ((), ("--overwrite",), ("--dry_run",)):
        words = ("--output", tmp_path / name, "--calibration_tokens", tmp_path / "tokens", *more)
        ran = headrace("calibrate", tmp_path / "model", *words)
        assert ran.code == 2, ran
        assert f"--output {tmp_path / name}: found {said}" in ran.err
        assert tree(tmp_path) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_interrupted_says_how_to_go_on(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = GOLDENS / "models" / "q_bf16"
    words = ("--output", tmp_path / "ranges", "--calibration_tokens", folder / "calibration_tokens.safetensors")
    run = LayeredModel.run

    def interrupted(self: LayeredModel, layer: int, hidden: np.ndarray) -> np.ndarray:
        if layer == 1:
            assert signal.getsignal(number) is signal.default_int_handler
            signal.raise_signal(number)
        return run(self, layer, hidden)

    with monkeypatch.context() as patched:
        patched.setattr(LayeredModel, "run", interrupted)
        ran = headrace("calibrate", folder, *words)
    assert ran.code == 3, ran
    last = f"headrace: interrupted; {tmp_path / 'ranges'} is not written, 1 of 2 layers done: run the same command again to go on"
    assert ran.err.splitlines()[-1] == last
    done = json.loads(headrace("calibrate", folder, *words, "--json").out)
    assert done["resumed_layers"] == 1


def test_the_command_says_what_it_takes_and_what_it_did(tmp_path: Path) -> None:
    folder = GOLDENS / "models" / "q_bf16"
    words = (
        "calibrate",
        folder,
        "--output",
        tmp_path / "ranges",
        "--calibration_tokens",
        folder / "calibration_tokens.safetensors",
    )
    planned_ = json.loads(headrace(*words, "--dry_run", "--json").out)
    assert not (tmp_path / "ranges").exists()
    assert (planned_["layers"], planned_["samples"], planned_["tokens"], planned_["dtype"]) == (2, 8, 64, "bfloat16")
    ran = headrace(*words)
    assert ran.code == 0, ran
    assert "memory at most" in ran.out
    assert "ranges of 14 modules" in ran.out
    assert "layer 2 of 2" in ran.err


REFUSED = {
    "no tokens": ({"input_ids": np.zeros((0, 4), np.int64)}, "input_ids int64 [0, 4]"),
    "one sample without an axis": ({"input_ids": np.arange(4)}, "input_ids int64 [4]"),
    "numbers": ({"input_ids": np.ones((1, 4), np.float32)}, "input_ids float32 [1, 4]"),
    "another name": ({"ids": np.ones((1, 4), np.int64)}, "no input_ids"),
    "outside the vocabulary": ({"input_ids": np.array([[1, 64]])}, "tokens from 1 to 64"),
    "too long": ({"input_ids": np.ones((1, 129), np.int64)}, "samples of 129 tokens"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_tokens_that_are_none_of_the_models(what: str, tmp_path: Path) -> None:
    arrays, found = REFUSED[what]
    save_file(arrays, tmp_path / "tokens")
    words = ("--output", tmp_path / "ranges", "--calibration_tokens", tmp_path / "tokens")
    ran = headrace("calibrate", GOLDENS / "models" / "q_bf16", *words)
    assert ran.code == 2, ran
    assert found in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


def test_options_about_what_is_not_asked_for_are_refused_together(tmp_path: Path) -> None:
    folder = GOLDENS / "models" / "q_bf16"
    words = ("--output", tmp_path / "ranges", "--calibration_tokens", folder / "calibration_tokens.safetensors", "--dry_run")
    more = ("--awq_tokens", 9, "--calib_size", 3, "--calib_max_seq_length", 4, "--revision", "v1")
    ran = headrace("calibrate", folder, *words, *more)
    assert ran.code == 2, ran
    for said in (
        "awq_tokens 9: found nothing",
        "calib_size 3: found",
        "calib_max_seq_length 4: found",
        "revision v1: found the local path",
    ):
        assert f"  - --{said}" in ran.err
    fitting = ("--awq_tokens", 9, "--awq_group_size", 64)
    assert headrace("calibrate", folder, *words, *fitting).code == 0


def test_memory_that_a_layer_does_not_fit_in(tmp_path: Path) -> None:
    folder = GOLDENS / "models" / "q_bf16"
    words = ("--output", tmp_path / "ranges", "--calibration_tokens", folder / "calibration_tokens.safetensors")
    ran = headrace("calibrate", folder, *words, "--memory_limit", "300MiB")
    assert ran.code == 2
    assert "--memory_limit: found 300 MiB, for a layer of 0 MiB and samples of 64 tokens" in ran.err
    assert not list(tmp_path.iterdir())


def test_activations_that_the_type_cannot_hold(tmp_path: Path) -> None:
    tensors = source.values(source.LLAMA)
    tensors["model.layers.0.mlp.up_proj.weight"] = np.full_like(tensors["model.layers.0.mlp.up_proj.weight"], 3e4)
    checkpoints.save(tmp_path / "model", source.LLAMA, tensors)
    save_file({"input_ids": np.arange(8)[None]}, tmp_path / "tokens")
    tokens = ("--calibration_tokens", tmp_path / "tokens")
    for words in (
        ("calibrate", tmp_path / "model", "--output", tmp_path / "ranges", "--dtype", "float16"),
        (
            "convert",
            "--model_dir",
            tmp_path / "model",
            "--output_dir",
            tmp_path / "out",
            "--dtype",
            "float16",
            "--smoothquant",
            0.5,
        ),
    ):
        ran = headrace(*words, *tokens)
        assert ran.code == 2, ran
        assert "layers.0.mlp" in ran.err
        assert "Give --calibration_dtype bfloat16 or float32" in ran.err
        assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".headrace-scratch") == ["model", "tokens"]
        assert headrace(*words, *tokens, "--calibration_dtype", "float32").code == 0
        for path in (tmp_path / "ranges", tmp_path / "out"):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@pytest.mark.nightly
def test_a_killed_run_goes_on_and_its_memory_is_as_the_plan_says(tmp_path: Path) -> None:
    """Two layers of 8B's shape, in a process of its own that is killed behind the first."""
    make(tmp_path / "model", "8B", layers=2, sparse=True)
    random_tokens(tmp_path / "tokens", 1000, (2, 256))
    ran(tmp_path, "ranges", killed_after=1)
    done = ran(tmp_path, "ranges")
    assert done["resumed"] == 1
    assert done["layer"] < done["peak"] <= done["projected"]
