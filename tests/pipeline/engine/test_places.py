"""What is in an engine's place, around it and beside it: refused before anything is built, and never removed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.engine.output import EngineDirectory
from pipeline.errors import EngineFailed
from tests.pipeline.engine.test_output import INPUTS, built, names, write


@pytest.fixture
def place(tmp_path: Path) -> EngineDirectory:
    return EngineDirectory(tmp_path / "engine", 2, INPUTS)


def said(place: EngineDirectory, overwrite: bool = False) -> str:
    """The one problem with a place, which looking at it does not change."""
    before = names(place.directory.parent)
    (problem,) = place.obstacles(overwrite)
    assert names(place.directory.parent) == before
    return str(problem)


def test_what_comes_into_the_directory_while_it_is_built_stays(place: EngineDirectory) -> None:
    with place.begun() as token:
        write(place)
        (place.directory / "ranks").mkdir(parents=True)
        (place.directory / "ranks" / "config.json").write_text("a checkpoint")
        with pytest.raises(EngineFailed, match=r"its place is taken since:\n.*no builder of engines writes \(ranks\)"):
            place.finish(token, {})
    assert names(place.directory.parent) == {"engine"}
    assert (place.directory / "ranks" / "config.json").read_text() == "a checkpoint"


def test_a_former_engine_that_a_killed_run_left_is_replaced(place: EngineDirectory) -> None:
    built(place).directory.rename(place.replaced)
    assert place.obstacles(overwrite=False) == []
    assert built(place).complete
    assert names(place.directory.parent) == {"engine"}


@pytest.mark.parametrize("other", ["engine.replaced", "engine.partial"])
@pytest.mark.parametrize("kind", ["a file", "files of somebody", "an engine of somebody", "a link to nothing"])
def test_places_beside_it_that_are_not_headrace_s(place: EngineDirectory, other: str, kind: str) -> None:
    beside = place.directory.with_name(other)
    if kind == "a file":
        beside.write_text("")
    elif kind == "a link to nothing":
        beside.symlink_to("nothing")
    else:
        beside.mkdir()
        (beside / ("rank0.engine" if kind.startswith("an engine") else "notes")).write_text("")
    expected = "files that headrace did not write" if kind.startswith(("files", "an engine")) else "a file"
    assert said(place).startswith(f"{beside}: found {expected}; expected room for the ")
    assert "choose another --output_dir" in said(place, overwrite=True)


def test_a_former_engine_with_files_of_somebody(place: EngineDirectory) -> None:
    built(place).directory.rename(place.replaced)
    (place.replaced / "tokenizer.json").write_text("")
    assert "files that headrace did not write" in said(place)


def test_a_directory_in_the_place_of_the_log(place: EngineDirectory) -> None:
    place.directory.with_name("engine.rank1.log").mkdir()
    assert "engine.rank1.log: found a directory; expected room for the builder's log" in said(place)


def test_files_beside_an_engine_that_is_up_to_date_are_in_nobody_s_way(place: EngineDirectory) -> None:
    built(place)
    (place.directory / "tokenizer.json").write_text("")
    place.partial.mkdir()
    (place.partial / "notes").write_text("")
    assert place.obstacles(overwrite=False) == []
    assert "files that headrace did not write" in said(place, overwrite=True)
    (place.partial / "notes").unlink()
    assert "no builder of engines writes (tokenizer.json)" in said(place, overwrite=True)


def test_a_link_is_followed_once_and_stays(place: EngineDirectory, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    place.directory.symlink_to("disk/engine")
    assert place.obstacles(overwrite=False) == []
    built(place)
    for _ in range(2):  # where nothing is there yet, and where an engine is
        assert place.complete
        assert names(tmp_path) == {"engine", "disk"}
        assert names(tmp_path / "disk") == {"engine"}
        assert place.directory.is_symlink()
        assert place.obstacles(overwrite=True) == []
        with place.begun() as token:
            assert names(tmp_path / "disk") == {"engine", "engine.partial"}
            write(place)
            place.finish(token, {})
    assert place.logs[0] == tmp_path / "disk" / "engine.log"


def test_a_link_to_itself(place: EngineDirectory) -> None:
    place.directory.symlink_to("engine")
    assert f"--output_dir {place.directory}: found a file; expected a directory" in said(place)


def test_a_mount_point() -> None:
    (problem,) = EngineDirectory(Path("/proc"), 1, INPUTS).obstacles(overwrite=True)
    expected = "found a mount point; expected a directory that can be renamed, as a new engine takes its name"
    assert str(problem) == f"--output_dir /proc: {expected}. Choose one in it, such as /proc/engine"


@pytest.mark.parametrize("there", [False, True])
def test_a_parent_that_cannot_be_written(place: EngineDirectory, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    """An engine is built beside its directory, which itself may be anybody's to write."""
    if there:
        place.directory.mkdir()
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != place.directory.parent)
    assert f"--output_dir {place.directory}: found {place.directory.parent}, which cannot be written" in said(place)


def test_a_directory_that_cannot_be_looked_at(place: EngineDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    place.directory.mkdir()

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    (problem,) = place.obstacles(overwrite=False)
    assert str(problem).startswith(f"--output_dir {place.directory}: found Permission denied ({place.directory}); expected")


def test_a_log_of_another_writer_is_put_aside(place: EngineDirectory) -> None:
    log = place.logs[0]
    for number, text in enumerate(["", "what nohup heard\n"], 1):
        log.write_text(text)
        with place.begun():
            assert not log.exists()
        assert log.with_name(f"engine.log.{number}").read_text() == text
    for text in ("$ trtllm-build --checkpoint_dir ranks\n", "# attempt 2 of 2\n"):
        log.write_text(text)
        with place.begun():
            pass
        assert names(log.parent) == {"engine.log.1", "engine.log.2"}
