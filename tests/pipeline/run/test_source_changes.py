"""A source that is written to or replaced while it is read is an error and never an output; one that seems to arrive is noted."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import BadInput, Interrupted, WriteFailed, convert, load_from_hf_checkpoint, plan
from pipeline.errors import SourceChanged
from pipeline.run.execute import execute
from pipeline.watching.listener import Silent
from stages.read import open_source
from stages.read.changing import changes
from stages.write import Written
from tests.pipeline.planning.bad_input.gguf_files import write as write_gguf
from tests.support import checkpoints
from tests.support.commands import headrace
from tests.support.directories import contents

LLAMA = checkpoints.LLAMA | {"num_hidden_layers": 4}
FILE = "model-00002-of-00003.safetensors"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    checkpoints.write(tmp_path / "model", LLAMA, shards=3)
    monkeypatch.setattr("pipeline.planning.make_plan.block_bytes", lambda _: 20_000)
    return tmp_path / "model"


def other_bytes(path: Path) -> bytes:
    """The file with other values at its end."""
    data = path.read_bytes()
    return data[:-64] + bytes(64)


def in_place(path: Path) -> None:
    data = other_bytes(path)
    with path.open("r+b") as file:
        file.write(data)


def replaced(path: Path) -> None:
    """As rsync and huggingface_hub do: a new file takes the name, here with the times of the old one."""
    state, data = path.stat(), other_bytes(path)
    new = path.with_name("new")
    new.write_bytes(data)
    os.utime(new, ns=(state.st_atime_ns, state.st_mtime_ns))
    new.replace(path)


def header_in_place(path: Path) -> None:
    """Another name of a tensor, and the same size and times."""
    state, data = path.stat(), path.read_bytes()
    with path.open("r+b") as file:
        file.write(data[:12] + bytes([data[12] ^ 1]) + data[13:])
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "in place": (in_place, "written to since"),
    "replaced": (replaced, "another file of that name"),
    "header": (header_in_place, "another header"),
    "longer": (longer, "bytes, and had"),
    "removed": (Path.unlink, "No such file"),
}


class Meanwhile(Silent):
    """Does something to the source when half of the groups are done."""

    def __init__(self, act: Callable[[], Any], after: int = 4) -> None:
        self.act, self.after, self.done = act, after, 0

    def advanced(self, written: Written) -> None:  # noqa: ARG002
        self.done += 1
        if self.done == self.after:
            self.act()


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changes_is_an_error_and_the_next_run_starts_over(change: str, model: Path, tmp_path: Path) -> None:
    act, said = CHANGES[change]
    asked = {"model_dir": model, "output_dir": tmp_path / "out", "scheduler": "synchronous"}
    last = plan(**asked).tasks  # all has been read by then, as a removed file or a changed header could not be
    with pytest.raises(SourceChanged, match=FILE) as error:
        execute(plan(**asked), Meanwhile(lambda: act(model / FILE), last if change in ("removed", "header") else 4))
    assert said in str(error.value)
    assert "start over" in str(error.value)
    assert error.value.exit_code == 3
    assert not (tmp_path / "out").exists()
    if change in ("in place", "replaced"):
        assert convert(**asked).resumed_tasks == 0
        convert(**asked | {"output_dir": tmp_path / "fresh"})
        assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("scheduler", ["threads", "local"])
def test_on_other_schedulers(scheduler: str, model: Path, tmp_path: Path) -> None:
    targets = [{"output_dir": tmp_path / "a", "tp_size": 2}, {"output_dir": tmp_path / "b", "tp_size": 4}]
    asked = {"model_dir": model, "target": targets, "scheduler": scheduler, "workers": 1}
    with pytest.raises(WriteFailed, match=FILE):
        execute(plan(**asked), Meanwhile(lambda: replaced(model / FILE), 1))
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("after", ["read", "unpack", "shard"])
def test_a_kept_cut_of_it_is_not_called_complete(after: str, model: Path, tmp_path: Path) -> None:
    scratch = {"scratch_after": after, "scratch": tmp_path / "scratch", "keep_scratch": True}
    asked = {"model_dir": model, "output_dir": tmp_path / "out", "scheduler": "synchronous", **scratch}
    with pytest.raises(SourceChanged):
        execute(plan(**asked), Meanwhile(lambda: replaced(model / FILE), 3))
    assert not (tmp_path / "scratch").exists()
    convert(**asked)
    convert(model_dir=model, output_dir=tmp_path / "fresh", scheduler="synchronous")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_the_command_ends_with_exit_code_3(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = "pipeline.planning.dask_graph.changes"
    monkeypatch.setattr(ended, lambda files: (in_place(model / FILE), changes(files))[1])
    ran = headrace("convert", "--model_dir", model, "--output_dir", tmp_path / "out", "--scheduler", "threads")
    assert ran.code == 3
    assert f"{model / FILE} (written to since)" in ran.err
    assert "Traceback" not in ran.err


def test_one_that_changed_between_two_runs_is_refused(model: Path, tmp_path: Path) -> None:
    asked = {"model_dir": model, "output_dir": tmp_path / "out", "scheduler": "synchronous"}

    def stop() -> None:
        in_place(model / FILE)
        raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        execute(plan(**asked), Meanwhile(stop))
    with pytest.raises(BadInput, match="an unfinished conversion of another source"):
        convert(**asked)
    convert(**asked, overwrite=True)
    convert(**asked | {"output_dir": tmp_path / "fresh"})
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_what_changes_no_byte_is_no_error(model: Path, tmp_path: Path) -> None:
    """Another mode and another link."""

    def act() -> None:
        (model / FILE).chmod(0o600)
        os.link(model / FILE, tmp_path / "link")

    made = plan(model_dir=model, output_dir=tmp_path / "out", scheduler="synchronous")
    execute(made, Meanwhile(act))
    assert (tmp_path / "out" / "config.json").exists()


def test_another_inode_alone_is_no_change(model: Path) -> None:
    """Some network file systems give a file a new one each time; its own times tell whether it is another file."""
    (file,) = [file for file in open_source(model).files if file.path.name == FILE]
    assert file.seen
    moved = replace(file.seen, inode=file.seen.inode + 1)
    assert changes([replace(file, seen=moved)]) == []
    assert changes([replace(file, seen=replace(moved, changed_ns=moved.changed_ns - 1))]) == [
        f"{file.path} (another file of that name)"
    ]


def test_a_run_that_reads_scratch_alone_needs_no_source(model: Path, tmp_path: Path) -> None:
    scratch = {"scratch_after": "unpack", "scratch": tmp_path / "scratch"}
    asked = {"model_dir": model, "scheduler": "synchronous", **scratch}
    convert(**asked, output_dir=tmp_path / "out", keep_scratch=True)
    made = plan(**asked, output_dir=tmp_path / "second", tp_size=2)
    (model / FILE).rename(tmp_path / "away")
    assert execute(made).bytes_read == 0


@pytest.mark.parametrize("change", ["in place", "replaced", "longer"])
def test_a_loader_gives_no_tensor_of_a_source_that_has_changed(change: str, model: Path) -> None:
    """Between two of its tensors, also where it is another file's."""
    weights = load_from_hf_checkpoint(model, tp_size=2, tp_rank=1)
    before = {name: weights[name] for name in weights}
    (model / FILE).chmod(0o600)
    assert all(weights[name].equal(before[name]) for name in weights), "another mode changes no byte"
    CHANGES[change][0](model / FILE)
    for name in weights:
        with pytest.raises(SourceChanged, match=FILE) as error:
            weights[name]
        assert "load it anew" in str(error.value)
    if change != "longer":  # which is no safetensors file any more
        again = load_from_hf_checkpoint(model, tp_size=2, tp_rank=1)
        assert any(not again[name].equal(before[name]) for name in again)


def test_a_loader_looks_at_a_source_that_changes_while_a_tensor_is_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, real = load_from_hf_checkpoint(model), os.open

    def replacing(path: Any, *more: Any, **options: Any) -> int:
        descriptor = real(path, *more, **options)
        if str(path).endswith(FILE):
            monkeypatch.setattr(os, "open", real)
            replaced(model / FILE)
        return descriptor

    monkeypatch.setattr(os, "open", replacing)
    for name in weights:
        try:
            weights[name]
        except SourceChanged:
            break
    else:
        raise AssertionError("no tensor was refused")


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("container", ["safetensors", "bin", "gguf"])
def test_every_container_is_looked_at(container: str, shards: int, tmp_path: Path) -> None:
    place = tmp_path / "model"
    if container == "gguf":
        place = write_gguf(tmp_path / "model.gguf")
    elif container == "bin":
        import torch

        source = checkpoints.write(place, LLAMA, shards=1)
        (place / "model.safetensors").unlink()
        torch.save({name: torch.from_numpy(values.copy()) for name, values in source.items()}, place / "pytorch_model.bin")
    else:
        checkpoints.write(place, LLAMA, shards=shards)
    files = open_source(place).files
    assert changes(files) == []
    for file in files:
        data = file.path.read_bytes()
        state = file.path.stat()
        file.path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        os.utime(file.path, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert changes(files) == [f"{file.path} (another header)"]
        file.path.write_bytes(data)
        os.utime(file.path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert changes(files) == []


def notes(model: Path) -> list[str]:
    made = plan(model_dir=model, output_dir=model.parent / "out")
    return [note for note in made.notes if "download" in note]


def aged(model: Path) -> None:
    for path in model.iterdir() if model.is_dir() else [model]:
        os.utime(path, (time.time() - 60,) * 2)


def test_a_file_that_was_just_written_is_noted(model: Path) -> None:
    (note,) = notes(model)
    assert note.startswith("4 files of the source (config.json, ...) were written to in the last 5 seconds")
    aged(model)
    assert notes(model) == []
    (model / FILE).touch()
    (note,) = notes(model)
    assert note.startswith(f"{FILE} was written to in the last 5 seconds")
    convert(model_dir=model, output_dir=model.parent / "out", scheduler="threads")
    assert "download" not in (model.parent / "out" / "headrace.json").read_text(), "it is of that day alone"


@pytest.mark.parametrize(
    "name", ["x.incomplete", "x.safetensors.part", "x.tmp", f"{FILE}.aria2", "y.crdownload", f".{FILE}.Ab12Cd"]
)
@pytest.mark.parametrize("folder", ["", ".cache/huggingface/download"])
def test_an_unfinished_download_beside_it_is_noted(name: str, folder: str, model: Path) -> None:
    aged(model)
    (model / folder).mkdir(parents=True, exist_ok=True)
    (model / folder / name).write_bytes(b"")
    (note,) = notes(model)
    assert note.startswith(f"{name} beside the source")


@pytest.mark.parametrize(("name", "noted"), [("model.gguf.part", True), ("model.gguf.aria2", True), ("other.gguf.part", False)])
def test_beside_a_single_file_only_its_own_download_is_noted(name: str, noted: bool, tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "model.gguf")
    aged(model)
    (tmp_path / name).write_bytes(b"")
    assert bool(notes(model)) is noted
