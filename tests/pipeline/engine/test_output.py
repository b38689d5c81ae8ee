"""An engine's directory: taken by one run, given its name at once, and never another run's to remove."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from pipeline.engine.output import EngineDirectory, read_provenance
from pipeline.errors import BadInput

INPUTS = {"checkpoint": {"id": "x"}, "options": {"max_batch_size": ["8"]}, "files": {}, "container": [], "version": "1.2.1"}


@pytest.fixture
def place(tmp_path: Path) -> EngineDirectory:
    return EngineDirectory(tmp_path / "engine", 2, INPUTS)


def write(place: EngineDirectory) -> None:
    for name in ("config.json", "rank0.engine", "rank1.engine"):
        (place.partial / name).write_text(name)


def built(place: EngineDirectory) -> EngineDirectory:
    with place.begun() as token:
        write(place)
        place.finish(token, {"seconds": 1})
    return place


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_is_whole_gets_its_name(place: EngineDirectory) -> None:
    with place.begun() as token:
        assert names(place.partial) == {token.name, "headrace.json.partial", "headrace.json.lock"}
        assert place.missing() == ["config.json", "rank0.engine", "rank1.engine"]
        write(place)
        assert place.missing() == []
        assert not place.complete
        assert place.finish(token, {"seconds": 1}) == len("config.jsonrank0.enginerank1.engine")
        assert place.complete
    assert names(place.directory.parent) == {"engine"}
    assert names(place.directory) == {"config.json", "rank0.engine", "rank1.engine", "headrace.json"}
    assert read_provenance(place.directory)["seconds"] == 1


def test_what_is_not_given_a_name_is_gone(place: EngineDirectory) -> None:
    with contextlib.suppress(ValueError), place.begun():
        write(place)
        raise ValueError
    assert names(place.directory.parent) == set()


def test_what_a_kill_leaves_of_one_that_failed_is_headraces_own(place: EngineDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal goes last: files without it would be somebody's, and every later run refused."""

    def killed(*_: object, **__: object) -> None:
        assert names(place.partial) <= {"headrace.json.partial", "headrace.json.lock"} or place.journal.exists()
        raise KeyboardInterrupt

    for step in ("pipeline.engine.output.clear", "pipeline.engine.output.shutil.rmtree"):
        with contextlib.suppress(KeyboardInterrupt), place.begun():
            write(place)
            monkeypatch.setattr(step, killed)
            raise ValueError
        monkeypatch.undo()
        assert place.obstacles(overwrite=False) == []
        assert built(place).complete
        for path in place.directory.iterdir():
            path.unlink()


def test_the_old_engine_stays_until_the_new_one_is_whole(place: EngineDirectory) -> None:
    built(place)
    other = EngineDirectory(place.directory, 2, {**INPUTS, "options": {}})
    with other.begun() as token:
        write(other)
        assert place.complete
        other.finish(token, {})
    assert (place.complete, other.complete) == (False, True)
    assert names(place.directory.parent) == {"engine"}


def test_one_run_at_a_time(place: EngineDirectory) -> None:
    with place.begun(), pytest.raises(BadInput, match="another job at work"), place.begun():
        raise AssertionError
    assert names(place.directory.parent) == set()


def test_a_run_that_has_finished_leaves_the_next_one_alone(place: EngineDirectory) -> None:
    """One of several engines is whole long before its job ends; meanwhile another job may replace it."""
    with place.begun() as token:
        write(place)
        place.finish(token, {})
        later = place.begun()
        token = later.__enter__()
        write(place)
    assert token.exists()
    assert place.missing() == []
    place.finish(token, {})
    later.__exit__(None, None, None)
    assert place.complete
    assert names(place.directory.parent) == {"engine"}


@pytest.mark.parametrize(
    ("change", "complete"),
    [
        ({}, True),
        ({"version": ""}, True),  # unknown: there is no builder to ask
        ({"version": "1.2.2"}, False),
        ({"options": {"max_batch_size": ["9"]}}, False),
        ({"checkpoint": {"id": "y"}}, False),
        ({"files": {"/x": [1, 1]}}, False),
        ({"container": ["docker"]}, False),
    ],
    ids=str,
)
def test_equal_inputs_build_nothing_again(place: EngineDirectory, change: dict[str, object], complete: bool) -> None:
    built(place)
    asked = EngineDirectory(place.directory, 2, {**INPUTS, **change})
    assert asked.complete == complete
    assert bool(asked.obstacles(False)) != complete
    assert asked.obstacles(True) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"inputs": 3}', '{"inputs": {}, "files": 3}'])
def test_provenance_that_is_none_is_no_engine(place: EngineDirectory, text: str) -> None:
    built(place)
    (place.directory / "headrace.json").write_text(text)
    assert not place.complete
    assert place.obstacles(False)
