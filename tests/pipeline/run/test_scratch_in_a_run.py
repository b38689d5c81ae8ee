"""Scratch while a run goes on: chunks are bounded, freed, made again where they are gone, and never read for what they are not."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipeline import Interrupted, WriteFailed, convert, plan
from pipeline.planning.memory import scratch_window
from pipeline.run.execute import execute
from pipeline.sinks.journal import Journal
from pipeline.sinks.scratch import JOURNAL
from pipeline.watching.listener import Silent
from stages.write import Written
from tests.support import checkpoints
from tests.support.directories import contents
from tests.support.examples import by_night

SMALL = 20_000  # bytes of a group, so that there are many


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA | {"num_hidden_layers": 4})
    monkeypatch.setattr("pipeline.planning.make_plan.block_bytes", lambda _: SMALL)
    return tmp_path / "model"


@pytest.fixture
def plain(model: Path, tmp_path: Path) -> dict[str, bytes]:
    convert(model_dir=model, output_dir=tmp_path / "plain", tp_size=2, scheduler="threads")
    return contents(tmp_path / "plain")


def options(model: Path, tmp_path: Path, **more: Any) -> dict[str, Any]:
    usual = {
        "model_dir": model,
        "output_dir": tmp_path / "out",
        "tp_size": 2,
        "scheduler": "synchronous",
        "scratch_after": "unpack",
    }
    return usual | more


def chunk_files(root: Path) -> list[Path]:
    return [path for path in root.rglob("c/*") if path.is_file()] + [path for path in root.rglob("c/*/*") if path.is_file()]


class Interrupting(Silent):
    """Stops a run when so many groups have been done; notes the bytes of chunks that there are at any time."""

    def __init__(self, root: Path, after: int = 10**9) -> None:
        self.root, self.after, self.most_bytes, self.done = root, after, 0, 0

    def advanced(self, written: Written) -> None:  # noqa: ARG002
        self.done += 1
        self.most_bytes = max(self.most_bytes, sum(path.stat().st_size for path in chunk_files(self.root)))
        if self.done >= self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("scheduler", ["synchronous", "threads", "local"])
def test_scratch_is_bounded_and_gone_after_success(
    scheduler: str, model: Path, plain: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.sinks.scratch.POOL_FILES", 0)
    made = plan(**options(model, tmp_path, scheduler=scheduler, workers=1))
    listener = Interrupting(tmp_path)
    execute(made, listener)
    assert contents(tmp_path / "out") == plain
    total = made.scratch[0].size_bytes
    largest = max(array.chunk_bytes for array in made.scratch[0].arrays.values())
    assert made.scratch[0].local_bytes < total
    if scheduler == "synchronous":  # elsewhere this listener, which looks at every file, is slower than the tasks
        assert 0 < listener.most_bytes <= (scratch_window(1) + 2) * max(SMALL, largest) < total / 2
    assert not list(tmp_path.rglob("*.zarr"))


@pytest.mark.parametrize("after", ["unpack", "read,rename,unpack,shard"])
@pytest.mark.parametrize("stop", [1, 5, 9, 14])
def test_a_run_is_taken_up_with_what_scratch_still_holds(
    after: str, stop: int, model: Path, plain: dict[str, bytes], tmp_path: Path
) -> None:
    asked = options(model, tmp_path, scratch_after=after)
    with pytest.raises(Interrupted):
        execute(plan(**asked), Interrupting(tmp_path, stop))
    result = convert(**asked)
    assert result.resumed_tasks > 0
    assert contents(tmp_path / "out") == plain


@pytest.mark.parametrize("stop", by_night(range(1, 60, 2), range(1, 60, 10)))
def test_a_chunk_that_several_groups_write_is_there_when_all_have(
    stop: int, model: Path, plain: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cut after shard, stopped between the groups of one rank tensor: what is missing of its chunks is no zeros."""
    monkeypatch.setattr("pipeline.run.schedulers.run_synchronous", scratch_first)
    monkeypatch.setattr("pipeline.planning.make_plan.block_bytes", lambda _: 3_000)
    asked = options(model, tmp_path, scratch_after="shard")
    with contextlib.suppress(Interrupted):
        execute(plan(**asked), Interrupting(tmp_path, stop))
    convert(**asked)
    assert contents(tmp_path / "out") == plain


def scratch_first(graph: Any) -> Iterator[Any]:
    """Run a graph a stage at a time, as a cluster may: all of scratch is written before any of it is read."""
    values: dict[Any, Any] = {}
    stages = ("read", "rename", "unpack", "cast", "quantize", "scratch", "write", "finish")
    for key in sorted(graph.tasks, key=lambda key: (stages.index(key[0]), str(key[1]))):
        values[key] = graph.tasks[key](values)
        if key in graph.results:
            yield values[key]


@pytest.mark.parametrize("after", ["unpack", "shard", "unpack,shard"])
@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_files_of_freed_chunks_leave_nothing_in_padding(
    after: str, scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.planning.make_plan.block_bytes", lambda _: SMALL)
    monkeypatch.setattr("pipeline.sinks.scratch.POOLED_BYTES", 1)
    source = tmp_path / "odd"
    checkpoints.write(source, checkpoints.LLAMA | {"vocab_size": 131, "num_hidden_layers": 4})
    asked = {"model_dir": source, "tp_size": 4, "use_parallel_embedding": True, "scheduler": scheduler}
    convert(**asked, output_dir=tmp_path / "plain")
    convert(**asked, output_dir=tmp_path / "cut", scratch_after=after)
    assert contents(tmp_path / "cut") == contents(tmp_path / "plain")


@pytest.mark.parametrize("damage", ["gone", "shorter", "all gone"])
def test_chunks_that_are_gone_are_made_again(damage: str, model: Path, plain: dict[str, bytes], tmp_path: Path) -> None:
    asked = options(model, tmp_path, scratch_after="read,unpack")
    with pytest.raises(Interrupted):
        execute(plan(**asked), Interrupting(tmp_path, 6))
    files = chunk_files(tmp_path)
    assert files
    for path in files if damage == "all gone" else files[:1]:
        if damage == "shorter":
            path.write_bytes(path.read_bytes()[:-1])
        else:
            path.unlink()
    convert(**asked)
    assert contents(tmp_path / "out") == plain


@pytest.mark.parametrize("kept", [False, True])
def test_a_damaged_chunk_is_an_error_and_then_made_again(kept: bool, model: Path, plain: dict[str, bytes], tmp_path: Path) -> None:
    asked = options(model, tmp_path, keep_scratch=kept)
    if kept:  # a cut of another job, whole
        convert(**{**asked, "output_dir": tmp_path / "first"})
        asked["output_dir"] = tmp_path / "out"
    else:
        with pytest.raises(Interrupted):
            execute(plan(**asked), Interrupting(tmp_path, 5))
    path = max(chunk_files(tmp_path), key=lambda file: file.stat().st_size)
    data = bytearray(path.read_bytes())
    data[: len(data) // 2] = bytes(len(data) // 2)
    path.write_bytes(bytes(data))
    with pytest.raises(WriteFailed, match=r"not those that were written.*" + path.name):
        convert(**asked)
    assert not (tmp_path / "out" / "config.json").exists()
    convert(**asked)
    assert contents(tmp_path / "out") == plain


@pytest.mark.parametrize("after", ["none", "unpack", "read,shard"])
@pytest.mark.parametrize("stop", [2, 7, 11, 15])
def test_a_power_cut_takes_what_was_not_on_the_disk(
    after: str, stop: int, model: Path, plain: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks were freed and nothing was brought to disk: after another boot all files hold zeros, and all is done again."""
    asked = options(model, tmp_path, scratch_after=after)
    with pytest.raises(Interrupted):
        execute(plan(**asked), Interrupting(tmp_path, stop))
    for path in chunk_files(tmp_path):
        path.write_bytes(bytes(path.stat().st_size))
    for path in (tmp_path / "out").glob("*.safetensors.partial"):
        data = path.read_bytes()
        header = 8 + int.from_bytes(data[:8], "little")
        path.write_bytes(data[:header] + bytes(len(data) - header))
    monkeypatch.setattr("pipeline.sinks.journal.boot_id", lambda: "the boot after")
    convert(**asked)
    assert contents(tmp_path / "out") == plain


def test_one_of_two_outputs_is_deleted(model: Path, plain: dict[str, bytes], tmp_path: Path) -> None:
    targets = [{"output_dir": tmp_path / "out", "tp_size": 2}, {"output_dir": tmp_path / "four", "tp_size": 4}]
    asked = {"model_dir": model, "target": targets, "scheduler": "threads", "scratch_after": "unpack"}
    convert(**asked)
    four = contents(tmp_path / "four")
    shutil.rmtree(tmp_path / "out")
    convert(**asked)
    assert contents(tmp_path / "out") == plain
    assert contents(tmp_path / "four") == four


def test_an_output_is_made_whole_again_where_finishing_was_cut_short(
    model: Path, plain: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the names of rank files and config.json, or between config.json and the end of the journal."""
    asked = options(model, tmp_path, scratch_after="none")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.sinks.output._replace", stop)
        with pytest.raises(Interrupted):
            convert(**asked)
    assert (tmp_path / "out" / "rank0.safetensors").exists()
    assert not (tmp_path / "out" / "config.json").exists()
    convert(**asked)
    assert contents(tmp_path / "out") == plain
    (tmp_path / "out" / "headrace.json.partial").write_text("")
    assert convert(**asked).up_to_date
    assert contents(tmp_path / "out") == plain


@pytest.mark.parametrize("scratch", ["directory", "bucket"])
def test_a_whole_output_that_is_asked_for_again_leaves_the_scratch_of_a_run_under_way(
    model: Path, plain: dict[str, bytes], tmp_path: Path, scratch: str
) -> None:
    """Both go through one cut, whose bytes are the same for any number of ranks."""
    more = {"scratch": f"memory://{tmp_path.name}"} if scratch == "bucket" else {}
    whole = options(model, tmp_path, output_dir=tmp_path / "whole", tp_size=1, **more)
    convert(**whole)
    made = plan(**options(model, tmp_path, **more))
    assert made.scratch[0].place == plan(**whole).scratch[0].place
    files, path = fsspec.core.url_to_fs(made.scratch[0].place)
    found: list[bool] = []

    class Asking(Silent):
        def advanced(self, written: Written) -> None:  # noqa: ARG002
            before = files.find(path)
            assert convert(**whole).up_to_date
            found.append(bool(before) and files.find(path) == before)

    execute(made, Asking())
    assert len(found) > 4
    assert all(found)
    assert contents(tmp_path / "out") == plain
    assert not files.find(path), "its own run takes it away"


def left_behind(model: Path, tmp_path: Path, **more: Any) -> str:
    """The place of the cut that an unfinished conversion leaves."""
    cut = options(model, tmp_path, scratch_after="shard", **more)
    with pytest.raises(Interrupted):
        execute(plan(**cut), Interrupting(tmp_path, after=9))
    return plan(**cut).scratch[0].place


@pytest.mark.parametrize("after", ["none", "shard"])
@pytest.mark.parametrize("scratch", ["directory", "bucket"])
def test_the_cut_of_an_unfinished_conversion_goes_with_it(model: Path, tmp_path: Path, scratch: str, after: str) -> None:
    place = left_behind(model, tmp_path, scratch=f"memory://{tmp_path.name}" if scratch == "bucket" else tmp_path / "scratch")
    files, path = fsspec.core.url_to_fs(place)
    assert files.find(path)
    again = options(model, tmp_path, tp_size=1, scratch_after=after, overwrite=True)
    convert(**again)
    assert not files.find(path)
    convert(**again | {"output_dir": tmp_path / "plain", "scratch_after": "none"})
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


@pytest.mark.parametrize("why", ["held", "kept", "not ours"])
def test_a_cut_that_another_may_need_stays(model: Path, tmp_path: Path, why: str) -> None:
    place = Path(left_behind(model, tmp_path, keep_scratch=why == "kept"))
    if why == "not ours":
        (place / "zarr.json").write_text(json.dumps({"attributes": {"headrace": "another's"}}))
    held = Journal(place / JOURNAL) if why == "held" else contextlib.nullcontext()
    before = sorted(place.rglob("*"))
    convert(**options(model, tmp_path, tp_size=1, scratch_after="none", overwrite=True))
    assert sorted(place.rglob("*")) == before
    if isinstance(held, Journal):
        held.close()
