"""Descriptors: planned before anything is written, few enough to work with, and raised by the command line alone."""

from __future__ import annotations

import os
import resource
import subprocess
from pathlib import Path
from unittest import mock

import pytest

import headrace as api
from pipeline.errors import BadInput
from pipeline.planning.descriptors import OPEN_FILES, RESERVED, open_files
from stages.write.deliveries import Delivery
from stages.write.open_files import OpenFiles
from tests.support import checkpoints
from tests.support.commands import COMMAND
from tests.support.places import ROOT

WIDE = {**checkpoints.LLAMA, "hidden_size": 128, "num_attention_heads": 32, "num_key_value_heads": 32}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "model", WIDE)
    return tmp_path / "model"


def limited(soft: int, hard: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the command with these limits of open files."""
    shell = ["bash", "-c", f'ulimit -Sn {soft}; ulimit -Hn {hard}; exec "$@"', "x", *COMMAND, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(shell, capture_output=True, text=True, check=False, env=environment)


def options(model: Path, out: Path) -> list[str]:
    return ["--model_dir", str(model), "--output_dir", str(out), "--tp_size", "32", "--workers", "8", "--scheduler", "threads"]


@pytest.mark.parametrize(("soft", "hard"), [(64, 4096), (128, 128)], ids=["raised", "few at a time"])
def test_many_ranks_under_a_low_limit(model: Path, tmp_path: Path, soft: int, hard: int) -> None:
    """The soft limit is raised; where it cannot be, tasks keep fewer files open: 8 tasks of 32 ranks with 128 descriptors."""
    ran = limited(soft, hard, ["convert", *options(model, tmp_path / "out")])
    assert ran.returncode == 0, ran
    assert api.verify(tmp_path / "out", model).ok


@pytest.mark.parametrize("command", ["plan", "convert"])
def test_a_limit_that_cannot_do_is_refused_before_anything_is_written(model: Path, tmp_path: Path, command: str) -> None:
    ran = limited(110, 110, [command, *options(model, tmp_path / "out")])
    assert ran.returncode == 2, ran
    needed = RESERVED + 1 + 8 * 3
    assert f"RLIMIT_NOFILE: found 110 files that this process may open; expected {needed} for 8 workers" in " ".join(
        ran.stderr.split()
    )
    assert not (tmp_path / "out").exists()
    assert limited(needed, needed, [command, *options(model, tmp_path / "out")]).returncode == 0


def test_as_a_guest_the_limit_is_left_alone(model: Path, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    api.convert(model_dir=model, output_dir=tmp_path / "out", scheduler="threads")
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before
    with mock.patch("resource.getrlimit", return_value=(100, 100)), pytest.raises(BadInput, match="RLIMIT_NOFILE"):
        api.plan(model_dir=model, output_dir=tmp_path / "other", workers=8)


def test_the_share_of_a_task() -> None:
    with mock.patch("resource.getrlimit", return_value=(1024, 4096)):
        assert open_files(8, 7) == (1024 - RESERVED - 7) // 8 - 2
        assert open_files(1, 1) == OPEN_FILES
        assert open_files(500, 1) < 1
    with mock.patch("resource.getrlimit", return_value=(resource.RLIM_INFINITY, resource.RLIM_INFINITY)):
        assert open_files(500, 1) == OPEN_FILES


def descriptors() -> int:
    """How many this process has open, with the one that this takes."""
    return len([*Path("/proc/self/fd").iterdir()])


def test_no_more_files_are_open_than_were_counted(tmp_path: Path) -> None:
    """They are opened again in turn, and all are flushed at the end."""
    deliveries = [Delivery(str(tmp_path / f"{n}"), 0, ((0, 1),), n, file_bytes=8 if n % 2 else 0) for n in range(10)]
    for each in deliveries[::2]:
        Path(each.path).touch()
    before, flushed = descriptors(), []
    with OpenFiles(most=3) as files:
        for turn in range(3):
            for each in deliveries:
                os.pwrite(files.descriptor(each), bytes([each.rank]), turn)
                assert descriptors() <= before + 3
        with mock.patch("os.fdatasync", lambda descriptor: flushed.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))):
            files.synchronize()
    assert descriptors() == before
    assert sorted(flushed) == sorted(each.path for each in deliveries)
    assert all(Path(each.path).read_bytes()[:3] == bytes([each.rank]) * 3 for each in deliveries)
