"""What the tests of `headrace build` share: a checkpoint of two ranks, and a builder on PATH."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests import stand_ins
from tests.support import checkpoints
from tests.support.commands import convert


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that nobody writes to."""
    folder = tmp_path_factory.mktemp("converted")
    checkpoints.write(folder / "model", checkpoints.LLAMA)
    assert convert(folder / "model", folder / "ranks", "--tp_size", 2).code == 0
    return folder / "ranks"


@pytest.fixture
def checkpoint(converted: Path, tmp_path: Path) -> Path:
    """The same as a test's own."""
    shutil.copytree(converted, tmp_path / "ranks")
    return tmp_path / "ranks"


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return tmp_path / "engine"


@pytest.fixture
def on_path(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PATH with the stand-in trtllm-build."""
    folder = tmp_path_factory.mktemp("bin")
    stand_ins.install(folder)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder
