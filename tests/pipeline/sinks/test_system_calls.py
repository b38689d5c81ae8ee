"""File systems that lack a call, and errors of the system: what there is a way round for succeeds, all else names its file."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import headrace as api
from pipeline.errors import HeadraceError, WriteFailed
from pipeline.sinks.output_checks import check_space, free_bytes
from pipeline.tensor import filesystem
from pipeline.tensor.filesystem import FALLBACKS
from tests.support import checkpoints, gguf_files, meta_files
from tests.support.commands import Ran, headrace

# Errors that no call can be done without: the file is named, and what to do is said.
CALLS = ["pwrite", "pread of the source", "open of the source", "fdatasync", "flock", "statvfs", "fallocate"]
HARD = ["EIO", "EDQUOT", "ESTALE", "EROFS", "EMFILE", "ENFILE", "ENOSPC"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    return tmp_path / "model"


def convert(model: Path, output: Path, *more: object) -> Ran:
    return headrace("convert", "--model_dir", model, "--output_dir", output, "--scheduler", "synchronous", *more)


def files(directory: Path) -> dict[str, bytes]:
    """The files of an output whose bytes do not depend on the time."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "headrace.json"}


@contextlib.contextmanager
def refusing_call(owner: Any, name: str, number: int, *, under: Path | None = None) -> Iterator[list[str]]:
    """Have a call fail with this error, of descriptors and paths below `under` alone; yields the calls that failed."""
    real, failed = getattr(owner, name), []

    def fail(first: Any, *rest: Any, **keywords: Any) -> Any:
        place = os.fspath(first) if isinstance(first, str | Path) else str(Path(f"/proc/self/fd/{_number(first)}").readlink())
        if under is None or place.startswith(str(under)):
            failed.append(place)
            # As the system says it: of a descriptor it knows no name.
            raise OSError(number, os.strerror(number), *([place] if isinstance(first, str | Path) else []))
        return real(first, *rest, **keywords)

    with mock.patch.object(owner, name, fail):
        yield failed


def _number(descriptor: Any) -> int:
    return descriptor if isinstance(descriptor, int) else int(descriptor.fileno())


@pytest.mark.parametrize("number", sorted(FALLBACKS["mmap"]), ids=errno.errorcode.get)
def test_without_maps_the_same_bytes_are_read(model: Path, tmp_path: Path, number: int) -> None:
    """Of the source, of scratch, of strided parts, by `verify`, by the loaders."""
    assert convert(model, tmp_path / "mapped", "--tp_size", 2).code == 0
    with refusing_call(mmap, "mmap", number) as failed:
        assert convert(model, tmp_path / "read", "--tp_size", 2).code == 0
        assert convert(model, tmp_path / "scratch", "--tp_size", 2, "--scratch_after", "read").code == 0
        assert headrace("verify", tmp_path / "read", "--source", model).code == 0
        weights = api.load_from_hf_checkpoint(model, tp_size=2, tp_rank=1)
        assert all(weights[name].numel() for name in weights)
    assert failed
    assert files(tmp_path / "mapped") == files(tmp_path / "read") == files(tmp_path / "scratch")


@pytest.mark.parametrize("container", ["archive", "legacy", "meta", "gguf"])
def test_without_maps_other_containers_are_read(container: str, tmp_path: Path) -> None:
    """Their headers, their tensors and the strided parts of these."""
    source, place, flag = checkpoints.values(checkpoints.LLAMA), tmp_path / "model", "--model_dir"
    if container == "meta":
        meta_files.write(place, checkpoints.LLAMA, source, parts=2)
        flag = "--meta_ckpt_dir"
    elif container == "gguf":
        place = tmp_path / "model.gguf"
        gguf_files.write(place, checkpoints.LLAMA, source, "Q8_0")
    else:
        place.mkdir()
        (place / "config.json").write_text(json.dumps(checkpoints.LLAMA))
        # Matrices transposed, so that they lie in the file at strides.
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array.T).T) for name, array in source.items()}
        torch.save(tensors, place / "pytorch_model.bin", _use_new_zipfile_serialization=container == "archive")
    arguments = ("convert", flag, place, "--scheduler", "synchronous", "--tp_size", 2, "--output_dir")
    assert headrace(*arguments, tmp_path / "mapped").code == 0
    with refusing_call(mmap, "mmap", errno.ENODEV) as failed:
        assert headrace(*arguments, tmp_path / "read").code == 0
    assert failed
    assert files(tmp_path / "mapped") == files(tmp_path / "read")


@pytest.mark.parametrize("number", sorted(FALLBACKS["flock"]), ids=errno.errorcode.get)
def test_without_locks_a_run_goes_on_and_says_so(model: Path, tmp_path: Path, number: int) -> None:
    with refusing_call(fcntl, "flock", number) as failed:
        ran = convert(model, tmp_path / "out")
    assert ran.code == 0
    assert failed
    assert f"{tmp_path / 'out'} is on a file system without locks" in ran.err
    assert "without locks" not in convert(model, tmp_path / "locked").err
    assert files(tmp_path / "out") == files(tmp_path / "locked")


@pytest.mark.parametrize("number", sorted(FALLBACKS["fallocate"]), ids=errno.errorcode.get)
def test_without_fallocate_files_are_made_long_and_nothing_is_written_twice(
    model: Path, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def emulated(*_: object) -> None:
        raise AssertionError("the C library writes a byte into each block where the system cannot")

    def refused(*_: object) -> int:
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(os, "posix_fallocate", emulated)
    expected = tmp_path / "allocated"
    assert convert(model, expected, "--scratch_after", "read").code == 0
    monkeypatch.setattr(filesystem, "_system_call", lambda: refused)
    assert convert(model, tmp_path / "out", "--scratch_after", "read").code == 0
    assert files(expected) == files(tmp_path / "out")


def test_fallocate_takes_room_and_never_shortens(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10)
    descriptor = os.open(path, os.O_RDWR)
    try:
        filesystem.allocate(descriptor, path, 1 << 20)
        assert os.fstat(descriptor).st_size == 1 << 20
        assert os.fstat(descriptor).st_blocks * 512 >= 1 << 20
        with mock.patch.object(filesystem, "_system_call", return_value=None):
            filesystem.allocate(descriptor, path, 5)
            assert os.fstat(descriptor).st_size == 1 << 20
            filesystem.allocate(descriptor, path, 2 << 20)
            assert os.fstat(descriptor).st_size == 2 << 20
        assert path.read_bytes().rstrip(b"\0") == b"x" * 10
    finally:
        os.close(descriptor)
    with path.open("rb") as reading, pytest.raises(OSError, match="file") as raised:
        filesystem.allocate(reading.fileno(), path, 4 << 20)
    assert raised.value.filename == str(path)


def test_a_disk_that_says_nothing_of_its_room_is_not_full(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage(tmp_path))(0, 0, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert free_bytes(tmp_path) is None
    assert check_space({tmp_path: 1 << 60}) == []
    planned = headrace("plan", "--model_dir", model, "--output_dir", tmp_path / "out")
    assert planned.code == 0
    assert "room there unknown" in planned.out
    assert convert(model, tmp_path / "out").code == 0


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize(
    "call", ["pwrite", "pread of the source", "open of the source", "fdatasync", "flock", "statvfs", "fallocate"]
)
def test_an_error_of_the_system_names_its_file(model: Path, tmp_path: Path, call: str, name: str) -> None:
    """Whatever call it comes from: one sentence, exit code 2 before anything is written and 3 after."""
    number, out = getattr(errno, name), tmp_path / "out"
    with contextlib.ExitStack() as stack:
        patched = {
            "pwrite": lambda: [refusing_call(os, "pwrite", number, under=out)],
            "pread of the source": lambda: [
                refusing_call(mmap, "mmap", errno.ENODEV),
                refusing_call(os, "preadv", number, under=model),
            ],
            "open of the source": lambda: [refusing_call(os, "open", number, under=model)],
            "fdatasync": lambda: [refusing_call(os, "fdatasync", number, under=out)],
            "flock": lambda: [refusing_call(fcntl, "flock", number, under=out)],
            "statvfs": lambda: [refusing_call(shutil, "disk_usage", number)],
            "fallocate": lambda: [mock.patch.object(filesystem, "_fallocate", side_effect=OSError(number, os.strerror(number)))],
        }[call]()
        for each in patched:
            stack.enter_context(each)  # type: ignore[arg-type]
        ran = convert(model, out, "--sync")
    early = call in ("open of the source", "flock", "statvfs", "fallocate")
    assert ran.code == (2 if early else 3), ran
    assert str(model if "source" in call else tmp_path) in ran.err, ran
    assert os.strerror(number) in ran.err
    assert "Traceback" not in ran.err
    remedy = {"EMFILE": "ulimit -n", "ENFILE": "fs.file-max", "EROFS": "read-only", "ESTALE": "mount it again", "EDQUOT": "quota"}
    assert remedy.get(name, "") in ran.err
    assert not early or not out.exists()
    # What was stopped goes on.
    assert convert(model, out).code == 0


Command = Callable[[Path, Path], Ran]
COMMANDS: dict[str, Command] = {
    "verify": lambda out, source: headrace("verify", out, "--source", source),
    "report": lambda out, source: headrace("report", out, "--source", source),
    "inspect": lambda _, source: headrace("inspect", source),
    "plan": lambda out, source: headrace("plan", "--model_dir", source, "--output_dir", out.with_name("new")),
    "scratch ls": lambda out, _: headrace("scratch", "ls", out.with_name("kept")),
    "scratch rm": lambda out, _: headrace("scratch", "rm", out.with_name("kept"), "--all", "--yes"),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_ends_with_a_traceback(model: Path, tmp_path: Path, command: str, name: str) -> None:
    """Each finds all its files unreadable from some call on, and says which."""
    number, out = getattr(errno, name), tmp_path / "out"
    kept = ("--scratch_after", "read", "--scratch", tmp_path / "kept", "--keep_scratch")
    assert convert(model, out, *kept).code == 0
    with contextlib.ExitStack() as stack:
        for owner, call in ((mmap, "mmap"), (os, "preadv"), (os, "rmdir"), (os, "unlink")):
            stack.enter_context(refusing_call(owner, call, number, under=tmp_path))
        if command in ("inspect", "plan"):
            stack.enter_context(refusing_call(os, "fstat", number, under=model / "model.safetensors"))
        if command.startswith("scratch"):
            stack.enter_context(refusing_call(os, "stat", number, under=tmp_path / "kept/model"))
        ran = COMMANDS[command](out, model)
    assert ran.code in (2, 3, 5), ran  # 5: verify goes on, and says so of each tensor
    assert str(tmp_path) in ran.err
    assert os.strerror(number) in ran.err


@pytest.mark.parametrize("name", HARD)
def test_a_loader_raises_an_error_of_ours(model: Path, name: str) -> None:
    number = getattr(errno, name)
    weights = api.load_from_hf_checkpoint(model)
    with refusing_call(mmap, "mmap", number), pytest.raises(HeadraceError, match=os.strerror(number)) as raised:
        weights["lm_head.weight"]
    assert str(model) in str(raised.value)


def test_a_write_that_fails_is_an_error_with_the_files_name_in_python(model: Path, tmp_path: Path) -> None:
    with refusing_call(os, "pwrite", errno.EDQUOT, under=tmp_path / "out"), pytest.raises(WriteFailed, match="quota") as raised:
        api.convert(model_dir=model, output_dir=tmp_path / "out", scheduler="local")
    assert "rank0.safetensors.partial" in str(raised.value)
