"""Files of a source on another machine: one on a disk that both share, a copy with times of its own, or something else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.tensor.source_file import SourceFile
from stages.read import changing, open_source
from stages.read.changing import SPOT_BYTES, changes, spots, unlike
from tests.support import checkpoints


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(changing, "_copies", {})
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA, shards=3)
    return tmp_path / "model"


@pytest.fixture
def files(model: Path) -> tuple[SourceFile, ...]:
    return tuple(open_source(model).files)


def copied(model: Path) -> None:
    """Put copies in the places of all files, with other times and inodes."""
    for path in sorted(model.iterdir()):
        new = path.with_name(f"{path.name}.new")
        shutil.copyfile(path, new)
        os.utime(new, ns=(10**18, 10**18))
        new.replace(path)


def test_the_same_files_are_looked_at_as_ever(files: tuple[SourceFile, ...]) -> None:
    assert unlike(files, spots(files)) == []
    assert changing._copies == {}
    os.utime(files[-1].path)
    assert changes(files) == [f"{files[-1].path} (written to since)"]


def test_copies_may_have_other_times_and_then_stay_as_they_are(model: Path, files: tuple[SourceFile, ...]) -> None:
    theirs = spots(files)
    copied(model)
    assert len(changes(files)) == len(files), "before they are known as copies"
    assert unlike(files, theirs) == []
    assert changes(files) == []
    os.utime(files[-1].path)
    assert changes(files) == [f"{files[-1].path} (written to since)"]
    # Asked again, it is a copy as before.
    assert unlike(files, theirs) == []
    assert changes(files) == []


def other_weights(path: Path) -> None:
    """As a fine-tune has them: another number here and there, and the same header."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    for at in range(start, len(data), SPOT_BYTES // 4):
        data[at] ^= 1
    path.write_bytes(data)


def other_header(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:12] + bytes([data[12] ^ 1]) + data[13:])


def longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


OTHERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights": (other_weights, "other weights under the same header"),
    "header": (other_header, "another header"),
    "longer": (longer, "bytes, not "),
    "removed": (Path.unlink, "No such file"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_no_copy_is_named(other: str, model: Path, files: tuple[SourceFile, ...]) -> None:
    theirs, (act, said) = spots(files), OTHERS[other]
    copied(model)
    act(files[-1].path)
    (found,) = unlike(files, theirs)
    assert found.startswith(f"{files[-1].path}: ")
    assert said in found


def test_many_files_have_few_spots_each_and_small_ones_are_looked_at_whole(tmp_path: Path) -> None:
    assert changing._count([]) == changing.MOST_SPOTS
    some = [SourceFile(tmp_path / "a", 3, 0, "")] * 10_000
    assert changing._count(some) == changing.LEAST_SPOTS
    assert spots(some[:2]) == ["", ""], "of a model in memory"
    for size in (0, 1, SPOT_BYTES, 10 * SPOT_BYTES):
        (tmp_path / "b").write_bytes(bytes(size))
        assert changing._spots(tmp_path / "b", size, 4)
