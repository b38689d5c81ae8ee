"""Real file systems: the same bytes on each that this machine can mount, with scratch, resumed, flushed and verified."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import Interrupted, convert, plan, verify
from pipeline.run.execute import execute
from pipeline.watching.listener import Silent
from stages.write import Written
from tests.support import checkpoints
from tests.support.directories import contents

IN_MEMORY = ("tmpfs", "ramfs")
ON_A_DISK = ("ext2", "ext3", "ext4", "vfat", "xfs", "btrfs")
FSYNC, FDATASYNC = os.fsync, os.fdatasync  # tests do not wait for the disk: these do
IMAGE_BYTES = 400 << 20  # xfs takes no smaller one; the file is sparse


@contextlib.contextmanager
def mounted(kind: str, place: Path) -> Iterator[Path]:
    """A new file system of this kind; the test is skipped where the machine does not allow that."""
    place.mkdir()
    image = place.with_name(f"{place.name}.image")
    commands = [["mount", "-t", kind, "-o", f"size={64 << 20}", "none", str(place)]]
    if kind in ON_A_DISK:
        maker = shutil.which(f"mkfs.{kind}") or pytest.skip(f"no mkfs.{kind} here")
        with image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        commands = [[maker, str(image)], ["mount", "-t", kind, "-o", "loop", str(image), str(place)]]
    if os.geteuid():
        pytest.skip("mounting takes root")
    for command in commands:
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            pytest.skip(f"{' '.join(command[:3])}: {ran.stderr.strip()[:200]}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


class Stop(Silent):
    """Interrupts a run after its second group."""

    done = 0

    def advanced(self, written: Written) -> None:  # noqa: ARG002
        self.done += 1
        if self.done == 2:
            raise KeyboardInterrupt


def use(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Source, scratch and output there: stopped, taken up again, called whole, looked at, and used by a second job."""
    monkeypatch.setattr(os, "fsync", FSYNC)
    monkeypatch.setattr(os, "fdatasync", FDATASYNC)
    monkeypatch.setattr("pipeline.planning.make_plan.block_bytes", lambda _: 20_000)
    model = place / "model"
    checkpoints.write(model, checkpoints.LLAMA)
    usual: dict[str, Any] = {"model_dir": model, "tp_size": 2, "scheduler": "threads"}
    convert(**usual, output_dir=tmp_path / "plain")
    asked = usual | {"output_dir": place / "out", "scratch": place / "scratch", "sync": True}
    asked |= {"scratch_after": "read,shard", "keep_scratch": True}
    with contextlib.suppress(Interrupted):
        execute(plan(**asked), Stop())
    assert not (place / "out" / "config.json").exists()
    convert(**asked)
    verify(place / "out", model).check()
    convert(**asked | {"output_dir": place / "second"})
    assert contents(place / "out") == contents(place / "second") == contents(tmp_path / "plain")
    assert convert(**asked).up_to_date


@pytest.mark.parametrize("kind", IN_MEMORY)
def test_in_memory(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mounted(kind, tmp_path / "there") as place:
        use(place, tmp_path, monkeypatch)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ON_A_DISK)
def test_on_a_disk_in_a_file(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mounted(kind, tmp_path / "there") as place:
        use(place, tmp_path, monkeypatch)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["tmpfs", "ext2", "ext3"])
def test_a_full_one_is_refused_or_goes_on_when_there_is_room(kind: str, tmp_path: Path) -> None:
    """ext2 and ext3 promise no room, so that it may run out on the way."""
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    asked: dict[str, Any] = {"model_dir": tmp_path / "model", "scheduler": "threads"}
    convert(**asked, output_dir=tmp_path / "plain")
    with mounted(kind, tmp_path / "there") as place:
        with (place / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(1 << 20)):
                pass
        with pytest.raises(Exception, match=r"room|No space left|bytes free") as raised:
            convert(**asked, output_dir=place / "out")
        assert raised.value.exit_code in (2, 3)  # type: ignore[attr-defined]
        (place / "filler").unlink()
        convert(**asked, output_dir=place / "out")
        assert contents(place / "out") == contents(tmp_path / "plain")
