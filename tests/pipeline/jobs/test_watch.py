"""The watch trigger: a checkpoint is found when it is whole and quiet, once, wherever it is."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipeline.errors import BadInput
from pipeline.jobs import watch
from pipeline.jobs.schedule import Watch
from pipeline.jobs.watch import Watcher
from tests.support import checkpoints


class Looking:
    """A watcher with its memory and its clock."""

    def __init__(self, path: str, **options: Any) -> None:
        trigger = Watch(name="w", path=path, job={"output_dir": "{model}"}, settle_seconds=30, **options)
        self.known, self.now = dict[str, str](), 1000.0
        self.said = list[str]()
        self.watcher = Watcher(trigger, self.known.get, self.said.append, lambda: self.now)

    def after(self, seconds: float) -> list[str]:
        """The names of what is found then, and is known from then on."""
        self.now += seconds
        found = self.watcher.look()
        self.known |= {each.place: each.fingerprint for each in found}
        return [each.name for each in found]


@pytest.fixture
def looking(tmp_path: Path) -> Looking:
    (tmp_path / "in").mkdir()
    return Looking(str(tmp_path / "in"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "in/model"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("hostile", ["a pipe", "deep", "sparse"])
def test_what_is_no_file_of_json_is_no_checkpoint_and_holds_nobody_up(
    name: str, hostile: str, looking: Looking, place: Path
) -> None:
    checkpoints.write(place, checkpoints.LLAMA, shards=3)
    (place / name).unlink()
    if hostile == "a pipe":
        os.mkfifo(place / name)
    elif hostile == "deep":
        (place / name).write_text("[" * 100_000 + "]" * 100_000)
    else:
        with (place / name).open("wb") as file:
            file.truncate(8 << 30)
    checkpoints.write(place.with_name("sound"), checkpoints.LLAMA)
    assert looking.after(0) == []
    assert looking.after(30) == ["sound"]


def test_found_once_when_it_has_settled(looking: Looking, place: Path) -> None:
    assert looking.after(0) == []
    checkpoints.write(place, checkpoints.LLAMA, shards=3)
    assert looking.after(100) == [], "seen for the first time, however old it looks"
    assert looking.after(29) == []
    assert looking.after(1) == ["model"]
    assert looking.after(1) == looking.after(1000) == []
    assert Looking(str(place.parent)).after(0) == [], "another daemon has to see for itself that it is quiet"


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors.index.json", "model-00002-of-00003.safetensors"])
def test_not_before_everything_is_there(looking: Looking, place: Path, missing: str) -> None:
    checkpoints.write(place, checkpoints.LLAMA, shards=3)
    (place / missing).rename(place.parent / "aside")
    assert looking.after(0) == looking.after(100) == looking.after(100) == []
    (place.parent / "aside").rename(place / missing)
    assert looking.after(0) == []
    assert looking.after(30) == ["model"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", '{"architectures": ['),
        ("config.json", "[]"),
        ("model.safetensors.index.json", '{"weight_map": {'),
        ("model.safetensors.index.json", '{"weight_map": 3}'),
    ],
)
def test_not_while_its_json_is_half_written(looking: Looking, place: Path, name: str, text: str) -> None:
    checkpoints.write(place, checkpoints.LLAMA, shards=3)
    whole = (place / name).read_text()
    (place / name).write_text(text)
    assert looking.after(0) == looking.after(100) == []
    (place / name).write_text(whole)
    assert looking.after(0) == []
    assert looking.after(30) == ["model"]


def test_not_while_a_shard_grows_or_is_smaller_than_the_index_says(looking: Looking, place: Path) -> None:
    checkpoints.write(place, checkpoints.LLAMA, shards=2)
    shards = sorted(place.glob("*.safetensors"))
    index = json.loads((place / "model.safetensors.index.json").read_text())
    total = sum(path.stat().st_size for path in shards)
    (place / "model.safetensors.index.json").write_text(json.dumps({**index, "metadata": {"total_size": total - 2000}}))
    whole = shards[1].read_bytes()
    for part in (10, 100, len(whole) - 2500):
        shards[1].write_bytes(whole[:part])
        assert looking.after(20) == []
    assert looking.after(1000) == [], "quiet, but not whole"
    shards[1].write_bytes(whole)
    assert looking.after(20) == []
    assert looking.after(30) == ["model"]


def test_one_file_without_an_index_will_do_but_shards_will_not(looking: Looking, place: Path) -> None:
    checkpoints.write(place, checkpoints.LLAMA)
    checkpoints.write(place.with_name("shards"), checkpoints.LLAMA, shards=2)
    (place.with_name("shards") / "model.safetensors.index.json").unlink()
    place.with_name("empty").mkdir()
    (place.with_name("empty") / "config.json").write_text("{}")
    looking.after(0)
    assert looking.after(30) == ["model"]


def test_what_is_put_there_anew_is_found_anew(looking: Looking, place: Path) -> None:
    checkpoints.write(place, checkpoints.LLAMA)
    looking.after(0)
    assert looking.after(30) == ["model"]
    (place / "README.md").write_text("more about it")
    looking.after(10)
    assert looking.after(100) == [], "nothing of the weights has changed"
    os.utime(place / "model.safetensors", (1, 1))
    assert looking.after(0) == []
    assert looking.after(30) == ["model"]


def test_the_pattern_says_how_deep(tmp_path: Path) -> None:
    for name in ("org/one", "org/two", "three", ".hidden/four", "org/.five"):
        checkpoints.write(tmp_path / name, checkpoints.LLAMA)
    for pattern, names in (("*/*", ["one", "two"]), ("*", ["three"]), ("org/t*", ["two"]), (".hidden/*", ["four"])):
        looking = Looking(str(tmp_path), pattern=pattern)
        looking.after(0)
        assert looking.after(30) == names


def test_odd_names_and_links_are_found_too(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "[in]/a [b] *", checkpoints.LLAMA)
    checkpoints.write(tmp_path / "elsewhere", checkpoints.LLAMA)
    (tmp_path / "[in]/link").symlink_to(tmp_path / "elsewhere")
    looking = Looking(str(tmp_path / "[in]"))
    looking.after(0)
    assert looking.after(30) == ["a [b] *", "link"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_directory_that_cannot_be_read_is_passed_over_with_a_word(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "in/model", checkpoints.LLAMA)
    (tmp_path / "in/closed").mkdir(mode=0)
    looking = Looking(str(tmp_path / "in"))
    looking.after(0)
    assert looking.after(30) == ["model"]
    assert looking.said == [f"watch w: {tmp_path / 'in/closed'} is passed over: Permission denied"]


def test_one_place_that_fails_does_not_hide_the_others(looking: Looking, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.write(place, checkpoints.LLAMA)
    checkpoints.write(place.with_name("stale"), checkpoints.LLAMA)
    real = looking.watcher._files.ls

    def ls(path: str, **more: Any) -> Any:
        if path.endswith("stale"):
            raise OSError(116, "Stale file handle")
        return real(path, **more)

    monkeypatch.setattr(looking.watcher._files, "ls", ls)
    looking.after(0)
    assert looking.after(30) == ["model"]
    assert looking.said == [f"watch w: {place.with_name('stale')} is passed over: Stale file handle"], "once"
    monkeypatch.setattr(looking.watcher._files, "ls", lambda *_, **__: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"):
        looking.after(0)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_file_that_cannot_be_read_passes_its_checkpoint_over_until_it_can(
    name: str, looking: Looking, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.write(place, checkpoints.LLAMA, shards=2)
    checkpoints.write(place.with_name("sound"), checkpoints.LLAMA)
    closed, real = place / name, watch.read_json

    def read(path: Path) -> Any:
        if path == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(watch, "read_json", read)
    looking.after(0)
    assert looking.after(30) == ["sound"]
    assert looking.after(30) == []
    assert looking.said == [f"watch w: {closed} is passed over: Permission denied"], "once"
    monkeypatch.setattr(watch, "read_json", real)
    assert looking.after(30) == ["model"]


def test_a_directory_that_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    looking = Looking(str(tmp_path / "later"))
    assert looking.after(0) == []
    checkpoints.write(tmp_path / "later/model", checkpoints.LLAMA)
    looking.after(0)
    assert looking.after(30) == ["model"]


@pytest.fixture
def bucket() -> Iterator[str]:
    files = fsspec.filesystem("memory")
    name = f"/{uuid.uuid4().hex}"
    yield f"memory:/{name}"
    if files.exists(name):
        files.rm(name, recursive=True)


def upload(source: Path, url: str) -> None:
    files, path = fsspec.core.url_to_fs(url)
    for each in sorted(source.iterdir()):
        files.pipe_file(f"{path}/{each.name}", each.read_bytes())


def test_an_object_store_is_watched(tmp_path: Path, bucket: str) -> None:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA, shards=2)
    looking = Looking(bucket, pattern="*/*")
    assert looking.after(0) == []
    upload(tmp_path / "model", f"{bucket}/org/model")
    looking.after(0)
    looking.now += 30
    (arrival,) = looking.watcher.look()
    assert (arrival.name, arrival.place.split("//")[0]) == ("model", "memory:")


def test_what_nothing_here_can_read_is_refused() -> None:
    with pytest.raises(BadInput, match=r"watch w: path: found nothing://x"):
        Looking("nothing://x")
