"""Power cuts: what a run calls whole has been on the disk, whoever wrote it, and what was not is made again.

The disk of these tests forgets what was not flushed (tests/support/power.py).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline import BadInput, Interrupted, WriteFailed, convert, plan, verify
from pipeline.planning.plans import Plan
from pipeline.run.execute import execute
from pipeline.sinks.journal import Committer
from pipeline.sinks.output_sums import as_written
from pipeline.watching.listener import Silent
from tests.support import checkpoints
from tests.support.directories import contents
from tests.support.power import Disk, Stop


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA | {"num_hidden_layers": 4})
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    monkeypatch.setattr("pipeline.planning.make_plan.block_bytes", lambda _: 20_000)
    return tmp_path / "model"


@pytest.fixture
def plain(model: Path, tmp_path: Path) -> dict[str, bytes]:
    convert(model_dir=model, output_dir=tmp_path / "plain", tp_size=2, scheduler="threads", copy_tokenizer=True)
    return contents(tmp_path / "plain")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


def options(model: Path, place: Path, **more: Any) -> dict[str, Any]:
    usual = {"model_dir": model, "output_dir": place / "new" / "out", "tp_size": 2, "scheduler": "synchronous"}
    return usual | {"copy_tokenizer": True} | more


def interrupted(asked: dict[str, Any], after: int) -> None:
    with pytest.raises(Interrupted):
        execute(plan(**asked), Stop(after))


@pytest.mark.parametrize("scheduler", ["synchronous", "threads", "local"])
def test_an_output_that_a_run_with_sync_calls_whole_is_on_the_disk(
    scheduler: str, model: Path, plain: dict[str, bytes], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its contents, the copied tokenizer, the names of all files, and that of the directories that the run made."""
    disk = Disk(place, monkeypatch)
    asked = options(model, place, sync=True, scheduler=scheduler)
    convert(**asked)
    disk.cut(monkeypatch, "another boot")
    whole(asked, plain)


def whole(asked: dict[str, Any], plain: dict[str, bytes]) -> None:
    """All is there; the journal and the note may be, too, as their removal was not flushed, and go with the next run."""
    directory = asked["output_dir"]
    left = {"headrace.json.partial", "headrace.json.lock"}
    assert {name: data for name, data in contents(directory).items() if name not in left} == plain
    assert convert(**asked).up_to_date
    assert contents(directory) == plain
    verify(directory).check()


def test_without_sync_a_power_cut_takes_it_and_it_is_made_again(
    model: Path, plain: dict[str, bytes], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(place, monkeypatch)
    asked = options(model, place)
    convert(**asked)
    disk.cut(monkeypatch, "another boot")
    assert not (place / "new").exists(), "this disk forgets"
    convert(**asked)
    assert contents(asked["output_dir"]) == plain


@pytest.mark.parametrize("stop", [1, 4, 8, 11])
def test_a_resumed_run_with_sync_flushes_what_another_process_wrote(
    stop: int, model: Path, plain: dict[str, bytes], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run, without --sync, is stopped in the same boot; the second writes the rest and calls all of it whole."""
    disk = Disk(place, monkeypatch)
    interrupted(options(model, place), stop)
    asked = options(model, place, sync=True)
    assert convert(**asked).resumed_tasks >= stop
    disk.cut(monkeypatch, "another boot")
    whole(asked, plain)


def test_asking_for_sync_of_what_is_whole_brings_it_to_the_disk(
    model: Path, plain: dict[str, bytes], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(place, monkeypatch)
    convert(**options(model, place))
    asked = options(model, place, sync=True)
    assert convert(**asked).up_to_date
    disk.cut(monkeypatch, "another boot")
    whole(asked, plain)


@pytest.mark.parametrize("stops", [(3, 1), (5, 2), (8, 1), (2, 6)])
def test_a_line_that_says_synced_speaks_for_what_an_earlier_process_wrote(
    stops: tuple[int, int], model: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs in one boot, the second of which flushes, then a power cut: what the first left to the system is there, too."""
    asked = options(model, place, pp_size=2, tp_size=1, copy_tokenizer=False)
    convert(**asked | {"output_dir": place.with_name("split")})
    disk = Disk(place, monkeypatch)
    interrupted(asked, stops[0])
    with monkeypatch.context() as patch:
        patch.setattr(Committer, "__exit__", flush_at_exit)
        interrupted(asked, stops[1])
    disk.cut(monkeypatch, "another boot")
    assert convert(**asked).resumed_tasks == sum(stops)
    assert contents(asked["output_dir"]) == contents(place.with_name("split"))


def flush_at_exit(self: Committer, *_: object) -> None:
    """As if ten seconds had passed just before the run ended."""
    self._stop.set()
    self._thread.join()
    self.commit()
    self.sync()


@pytest.mark.parametrize("after", ["read", "unpack", "read,unpack", "shard", "read,shard"])
@pytest.mark.parametrize("stop", [0, 6])
def test_a_kept_cut_that_is_called_complete_is_on_the_disk(
    after: str, stop: int, model: Path, plain: dict[str, bytes], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what an interrupted run wrote of it; then another job reads it, and no stage before the cut runs again."""
    disk = Disk(place, monkeypatch)
    asked = options(model, place, scratch_after=after, keep_scratch=True, scratch=place / "scratch")
    if stop:
        interrupted(asked, stop)
    convert(**asked)
    cuts = plan(**asked).scratch
    assert all(cut.complete for cut in cuts)
    disk.cut(monkeypatch, "another boot")
    assert all(cut.complete for cut in cuts)
    again = options(model, place, scratch_after=after, scratch=place / "scratch", output_dir=place / "second")
    result = convert(**again)
    assert result.bytes_read == 0
    assert result.scratch_bytes_written == 0
    assert contents(place / "second") == plain


@pytest.mark.parametrize("synced", [False, True])
@pytest.mark.parametrize("stop", [2, 6, 12, 18])
def test_a_kept_cut_that_was_under_way_is_not_reused_for_what_was_lost(
    stop: int, synced: bool, model: Path, plain: dict[str, bytes], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(place, monkeypatch)
    asked = options(model, place, scratch_after="unpack", keep_scratch=True, scratch=place / "scratch")
    with monkeypatch.context() as patch:
        if synced:
            patch.setattr(Committer, "__exit__", flush_at_exit)
        interrupted(asked, stop)
    disk.cut(monkeypatch, "another boot")
    assert not any(cut.complete for cut in plan(**asked).scratch)
    convert(**asked)
    assert contents(asked["output_dir"]) == plain
    (cut,) = plan(**asked).scratch
    assert cut.complete
    second = options(model, place, scratch_after="unpack", scratch=place / "scratch", output_dir=place / "second")
    assert convert(**second).bytes_read == 0
    assert contents(place / "second") == plain


@pytest.mark.parametrize("damage", ["zeros", "gone"])
def test_a_job_that_does_not_keep_a_cut_leaves_the_kept_one_whole(
    damage: str, model: Path, plain: dict[str, bytes], place: Path
) -> None:
    """A chunk of it is gone or wrong: it is made again, and the cut serves the next job as before."""
    kept = {"scratch_after": "unpack", "scratch": place / "scratch"}
    convert(**options(model, place, keep_scratch=True, **kept))
    chunk = max((place / "scratch").rglob("c/*/*"), key=lambda path: path.stat().st_size)
    if damage == "gone":
        chunk.unlink()
    else:
        chunk.write_bytes(bytes(chunk.stat().st_size))
        with pytest.raises(WriteFailed, match="not those that were written"):
            convert(**options(model, place, output_dir=place / "second", **kept))
        assert not (place / "second" / "config.json").exists()
    convert(**options(model, place, output_dir=place / "second", **kept))
    assert contents(place / "second") == plain
    assert plan(**options(model, place, **kept)).scratch[0].complete
    assert convert(**options(model, place, output_dir=place / "third", **kept)).bytes_read == 0


@pytest.mark.parametrize("what", ["zarr.json", "group"])
def test_metadata_that_a_power_cut_left_empty_is_written_again(
    what: str, model: Path, plain: dict[str, bytes], place: Path
) -> None:
    asked = options(model, place, scratch_after="unpack", keep_scratch=True, scratch=place / "scratch")
    interrupted(asked, 6)
    (group,) = (place / "scratch").iterdir()
    for path in [group / "zarr.json"] if what == "group" else sorted(group.glob("*/zarr.json")):
        path.write_bytes(b"")
    convert(**asked)
    assert contents(asked["output_dir"]) == plain
    assert plan(**asked).scratch[0].complete
    assert all(path.read_bytes() for path in group.rglob("zarr.json"))
    assert not (group / "headrace.journal").exists()


def test_a_journal_that_outlived_its_cut_goes(model: Path, place: Path) -> None:
    """Killed between the word that a cut is complete and the end of its journal."""
    asked = options(model, place, scratch_after="unpack", keep_scratch=True, scratch=place / "scratch")
    convert(**asked)
    (group,) = (place / "scratch").iterdir()
    (group / "headrace.journal").write_text("")
    convert(**asked | {"output_dir": place / "second"})
    assert not (group / "headrace.journal").exists()
    assert plan(**asked).scratch[0].complete


def test_a_journal_that_outlived_its_output_goes_while_another_is_made(model: Path, plain: dict[str, bytes], place: Path) -> None:
    """Killed between config.json and the end of the journal, with another target still to do."""
    targets = [{"output_dir": place / "a", "tp_size": 2}, {"output_dir": place / "b", "tp_size": 4}]
    asked = {"model_dir": model, "target": targets, "scheduler": "threads", "copy_tokenizer": True}
    convert(**asked)
    (place / "a" / "headrace.json.partial").write_text("")
    (place / "b" / "config.json").unlink()
    assert not convert(**asked).up_to_date
    assert contents(place / "a") == plain
    assert {path.name for path in (place / "b").iterdir()} >= {"config.json", "headrace.json"}
    assert not (place / "b" / "headrace.json.partial").exists()


@pytest.mark.parametrize("name", ["rank1.safetensors", "tokenizer.json", ""])
def test_an_output_left_to_the_system_is_looked_at_after_another_boot(
    name: str, model: Path, plain: dict[str, bytes], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut may keep all names and sizes, and zeros in a file: that is made anew. What is whole is read once."""
    asked = options(model, place)
    convert(**asked)
    out, looked = asked["output_dir"], []
    assert json.loads((out / "headrace.json").read_text())["boot"]
    if name:
        with (out / name).open("r+b") as file:
            file.seek(-2, os.SEEK_END)
            file.write(bytes(2))
    monkeypatch.setattr("pipeline.sinks.output.as_written", lambda *more: (looked.append(more), as_written(*more))[1])
    assert convert(**asked).up_to_date, "in the boot in which it was written the system has all of it"
    assert not looked
    monkeypatch.setattr("pipeline.sinks.journal.boot_id", lambda: "another boot")
    started = Noted()
    result = execute(plan(**asked), started)
    assert result.up_to_date is not bool(name)
    assert [f"{out} is not as it was written" in note for note in started.notes] == [True] * bool(name)
    assert contents(out) == plain
    assert len(looked) == 1
    if not name:
        assert json.loads((out / "headrace.json").read_text())["boot"] == "", "it is on the disk"
    monkeypatch.setattr("pipeline.sinks.journal.boot_id", lambda: "a third")
    assert convert(**asked).up_to_date
    assert len(looked) == 1 + bool(name)


class Noted(Silent):
    """Keeps what a run notes of outputs."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def started(self, plan: Plan, *_: object) -> None:
        self.notes += [note for note in plan.notes if "as it was written" in note]


def test_copies_whose_record_a_power_cut_took_are_no_strangers(model: Path, plain: dict[str, bytes], place: Path) -> None:
    """tokenizer.json beside an empty headrace.json, which said that headrace had copied it."""
    asked = options(model, place)
    convert(**asked)
    (asked["output_dir"] / "headrace.json").write_bytes(b"")
    with pytest.raises(BadInput, match="files that headrace did not write"):
        convert(**asked | {"copy_tokenizer": False})
    convert(**asked)
    assert contents(asked["output_dir"]) == plain
