"""`headrace scratch`: cuts are found without a path, and go only when they are named, or all of them are meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import checkpoints
from tests.support.commands import convert, headrace, tree


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """The scratch of the default name, with a cut that was kept beside the output."""
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    assert convert(tmp_path / "model", tmp_path / "out", "--scratch_after", "read", "--keep_scratch").code == 0
    return tmp_path / ".headrace-scratch"


@pytest.mark.parametrize("place", [".", "out", "..", "elsewhere"])
def test_it_is_found_without_a_path(kept: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (kept.parent / "elsewhere").mkdir()
    monkeypatch.chdir(kept.parent / place)
    ran = headrace("scratch", "ls")
    assert ran.code == 0
    assert str(kept) in ran.out
    assert "1 cut, " in ran.out
    (cut,) = json.loads(headrace("scratch", "ls", "--json").out)
    assert Path(cut["path"]).parent == kept


def test_where_there_is_none_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    ran = headrace("scratch", "ls")
    assert ran.code == 0
    assert "name the directory" in ran.out


@pytest.mark.parametrize("command", ["ls", "rm"])
def test_a_directory_that_is_not_there(tmp_path: Path, command: str) -> None:
    ran = headrace("scratch", command, tmp_path / "nowhere")
    assert (ran.code, ran.out) == (2, "")
    assert "nowhere: found no such directory; expected a scratch directory" in ran.err
    assert "nothing was written" not in ran.err


@pytest.mark.parametrize(
    ("flags", "found"), [((), "no name (1 cut there, "), (("--all",), "no --yes (1 cut there, "), (("--yes",), "no name")]
)
def test_all_of_it_must_be_meant(kept: Path, flags: tuple[str, ...], found: str) -> None:
    before = tree(kept)
    ran = headrace("scratch", "rm", kept, *flags)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("headrace: 1 problem, nothing was removed:")
    assert found in ran.err
    assert tree(kept) == before


def test_all_of_it_goes_when_it_is_meant(kept: Path) -> None:
    ran = headrace("scratch", "rm", kept, "--all", "--yes")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"removed {kept}")
    assert not list(kept.glob("*.zarr"))


def test_a_name_beside_all_is_a_contradiction(kept: Path) -> None:
    (cut,) = kept.glob("*.zarr")
    assert headrace("scratch", "rm", kept, cut.name, "--all", "--yes").code == 2
    assert cut.is_dir()
    assert headrace("scratch", "rm", kept, cut.name).code == 0
    assert not cut.exists()
