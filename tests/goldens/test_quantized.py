"""NVIDIA's own quantized outputs, byte for byte: rank files as whole files, config.json's `quantization` block key by key."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from pipeline.tensor.placement import whole
from stages.read.safetensors import open_file
from tests.goldens.differences import check_config
from tests.support.commands import headrace
from tests.support.examples import by_night
from tests.support.places import DATA

QUANTIZED = DATA / "quantized"
CASES = {case["case"]: case for case in json.loads((QUANTIZED / "cases.json").read_text())}

# Of the first and last layer's MLP, which Meta's recipe does not quantize, the reference wrote the source's float8 codes as
# bfloat16 numbers and dropped their scales: weights some hundred times too large.
LOSES_SCALES = "fp8fbgemm_q_bf16-fp8_rowwise_meta-tp2pp1-auto-sm80"

BF16 = np.dtype(ml_dtypes.bfloat16)

BY_DAY = {case["arguments"].split()[1]: name for name, case in CASES.items() if name != LOSES_SCALES}  # a case of each model
each_case = pytest.mark.parametrize("case", [case for case in CASES if case != LOSES_SCALES])


def run(case: str, output: Path, *more: str) -> None:
    flag, model, *arguments = shlex.split(CASES[case]["arguments"])
    ran = headrace("convert", flag, QUANTIZED / model, *arguments, "--output_dir", output, "--quiet", *more)
    assert ran.code == 0, ran.err


def same_ranks(case: str, output: Path) -> None:
    expected = QUANTIZED / "expected" / case
    assert {path.name for path in output.iterdir()} == {path.name for path in expected.iterdir()} | {"headrace.json"}
    for path in expected.glob("*.safetensors"):
        assert (output / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("scheduler", ["threads", "local"])
@each_case
def test_output_equals_the_reference(case: str, scheduler: str, tmp_path: Path) -> None:
    run(case, tmp_path / "out", "--scheduler", scheduler)
    same_ranks(case, tmp_path / "out")
    check_config(f"quantized/{case}", tmp_path / "out")


@pytest.mark.nightly  # by day with the kernels in C, where these are built
@each_case
def test_the_kernels_of_numpy_write_the_same(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_KERNELS", "numpy")
    run(case, tmp_path / "out", "--scheduler", "threads")
    same_ranks(case, tmp_path / "out")


@pytest.mark.parametrize("case", by_night([case for case in CASES if case != LOSES_SCALES], [*BY_DAY.values()]))
def test_cuts_after_every_stage_change_no_byte(case: str, tmp_path: Path) -> None:
    run(case, tmp_path / "out", "--scheduler", "threads", "--scratch_after", "read,rename,unpack,shard")
    same_ranks(case, tmp_path / "out")


@pytest.mark.parametrize(
    "more",
    [
        ("--scheduler", "threads"),
        ("--scheduler", "local"),
        ("--scheduler", "threads", "--scratch_after", "read,rename,unpack,shard"),
    ],
    ids=["threads", "local", "cuts"],
)
def test_what_the_recipe_leaves_unquantized_keeps_its_scales(more: tuple[str, ...], tmp_path: Path) -> None:
    case, output = LOSES_SCALES, tmp_path / "out"
    run(case, output, *more)
    check_config(f"quantized/{case}", output)
    source = tensors(QUANTIZED / "models" / CASES[case]["model"] / "model.safetensors")
    last = json.loads((output / "config.json").read_text())["num_hidden_layers"] - 1
    parts = {"fc": ("gate_proj", 0), "gate": ("up_proj", 0), "proj": ("down_proj", 1)}
    lost = {f"transformer.layers.{n}.mlp.{ours}.weight": (n, *of) for n in (0, last) for ours, of in parts.items()}
    for rank in range(2):
        ours, theirs = (tensors(folder / f"rank{rank}.safetensors") for folder in (output, QUANTIZED / "expected" / case))
        assert list(ours) == list(theirs)
        assert lost.keys() <= ours.keys()
        for name, values in ours.items():
            assert (values.dtype, values.shape) == (theirs[name].dtype, theirs[name].shape), name
            if name not in lost:
                assert values.tobytes() == theirs[name].tobytes(), name
                continue
            layer, projection, axis = lost[name]
            codes, scales = (source[f"model.layers.{layer}.mlp.{projection}.{of}"] for of in ("weight", "weight_scale"))
            mine = np.split(codes.astype(np.float32), 2, axis=axis)[rank]
            assert theirs[name].tobytes() == mine.astype(BF16).tobytes(), "the reference's are the codes"
            factors = (np.split(scales, 2)[rank] if axis == 0 else scales).astype(np.float32).reshape(-1, 1)
            assert values.tobytes() == (mine * factors).astype(BF16).tobytes(), name


def tensors(path: Path) -> dict[str, np.ndarray]:
    """A safetensors file's tensors in the order of their names."""
    held = open_file(path)[1]
    return {name: np.array(held[name].block(whole(held[name].shape))) for name in sorted(held)}
