"""NVIDIA's own outputs of SmoothQuant and an INT8 cache, byte for byte, from the ranges that its calibration had measured."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tests.goldens.differences import check_config
from tests.support.commands import headrace
from tests.support.examples import by_night
from tests.support.places import DATA

FOLDER = DATA / "smoothquant"
CASES = {case["case"]: case for case in json.loads((FOLDER / "cases.json").read_text())}
CUTS = ("--scheduler", "threads", "--scratch_after", "read,rename,unpack,shard")

each_case = pytest.mark.parametrize("case", CASES)


def check(case: str, output: Path, *more: str) -> None:
    flag, model, *arguments = shlex.split(CASES[case]["arguments"])
    expected = FOLDER / "expected" / case
    ranges = ("--act_range", expected / "act_range.safetensors")
    ran = headrace("convert", flag, FOLDER / model, *arguments, *ranges, "--output_dir", output, "--quiet", *more)
    assert ran.code == 0, ran.err
    names = {path.name for path in expected.iterdir()} - {"act_range.safetensors"}
    assert {path.name for path in output.iterdir()} == names | {"headrace.json"}
    for path in expected.glob("rank*.safetensors"):
        assert (output / path.name).read_bytes() == path.read_bytes(), path.name
    check_config(f"smoothquant/{case}", output)


@each_case
def test_output_equals_the_reference(case: str, tmp_path: Path) -> None:
    check(case, tmp_path / "out", "--scheduler", "threads")


@pytest.mark.parametrize("more", [("--scheduler", "local"), CUTS], ids=["local", "cuts"])
@pytest.mark.parametrize("case", by_night(CASES, list(CASES)[::4]))
def test_other_schedulers_and_cuts_change_no_byte(case: str, more: tuple[str, ...], tmp_path: Path) -> None:
    check(case, tmp_path / "out", *more)


@each_case
def test_the_kernels_of_numpy_write_the_same(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_KERNELS", "numpy")
    check(case, tmp_path / "out", "--scheduler", "threads")
