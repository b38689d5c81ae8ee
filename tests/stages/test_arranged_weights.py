"""The order of integer weights, held against the GPUs that nvidia-smi names and the builder's release."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.model.kernels import generations, order
from stages.build import BuilderCall, build
from stages.build.arranged_weights import ArrangedWeights
from stages.build.builders import Builder, BuilderProbe, gpu_generations
from tests.support.builds import names, nvidia_smi


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (["9.0"], (90,)),
        (["8.0", "9.0", "8.0"], (80, 90)),
        (["10.3", " 12.0 "], (103, 120)),
        (["[N/A]"], ()),
        (["NVIDIA-SMI has failed because it couldn't communicate with the driver"], ()),
        ([], ()),
    ],
    ids=str,
)
def test_generations_are_read_of_what_nvidia_smi_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], found: tuple[int, ...]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    nvidia_smi(tmp_path, *lines)
    assert gpu_generations() == found
    nvidia_smi(tmp_path, *lines, code=9)
    assert gpu_generations() == ()


def test_without_nvidia_smi_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert gpu_generations() == ()


@pytest.mark.parametrize("sm", generations())
def test_a_generation_fits_where_its_orders_are_the_same(sm: int) -> None:
    weights = ArrangedWeights(Path("ranks"), "W4A16", sm)
    for other in generations():
        same = [order(other, stacked) for stacked in (False, True)] == [order(sm, stacked) for stacked in (False, True)]
        problems = weights.problems(BuilderProbe(generations=(other,)))
        assert bool(problems) != same
        assert same or f"Convert with --sm {other}, or build on one of these" in str(problems[0])
        # One GPU that fits may be the one that is used.
        assert weights.problems(BuilderProbe(generations=(other, sm))) == []
    assert weights.problems(BuilderProbe()) == []
    assert "expected one of" in str(weights.problems(BuilderProbe(generations=(70,)))[0])


@pytest.mark.parametrize(
    ("version", "fits"),
    [("1.2.1", True), ("1.2.0rc6", True), ("1.2", True), ("1.1.0", False), ("1.20.0", False), ("0.17.0", False), ("", True)],
)
def test_a_release_matters_where_the_order_differs_between_releases(version: str, fits: bool) -> None:
    for sm in generations():
        problems = ArrangedWeights(Path("ranks"), "W8A16", sm).problems(BuilderProbe(version=version, generations=(sm,)))
        assert (problems == []) == (fits or sm not in (90, 100, 103)), (sm, problems)
        assert all(f"found version {version}; expected 1.2" in str(problem) for problem in problems)


def test_the_machine_that_builds_is_asked_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another worker with a GPU may have been asked before."""
    nvidia_smi(tmp_path, "9.0")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "token").touch()
    probed = BuilderProbe(("true",), "command", "1.2.1", host="another", generations=(80,))
    weights = ArrangedWeights(tmp_path / "ranks", "W4A16_GPTQ", 80)
    call = BuilderCall("engine", Builder(), (), tmp_path, tmp_path / "log", tmp_path / "token", probed=probed, arranged=weights)
    outcome = build(call)
    assert (outcome.code, names(tmp_path)) == (1, {"token", "nvidia-smi"})
    assert f"the GPU of {socket.gethostname()}: found generation 90" in outcome.unfit
    assert build(replace(call, arranged=ArrangedWeights(tmp_path / "ranks", "W4A16_GPTQ", 90))).unfit == ""
