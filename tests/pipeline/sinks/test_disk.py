"""Full and read-only disks: refused with the path and the bytes, and nothing half-written looks whole."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.sinks.output_checks import check_space
from tests.support import checkpoints
from tests.support.commands import headrace

# What the disk says at the last moment, where the check before it was wrong.
LYING = "import pipeline.sinks.output_checks\npipeline.sinks.output_checks.free_bytes = lambda _: 1 << 60\n"


def on_small_disk(size: str, mount: Path, arguments: list[str], prelude: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command where `mount` is a tmpfs of `size`, then list what is left on it."""
    mount.mkdir(exist_ok=True)
    script = f"{prelude}from pipeline.cli import main\nmain()"
    run = shlex.join([sys.executable, "-c", script, *arguments])
    place = shlex.quote(str(mount))
    shell = f"mount -t tmpfs -o size={size} tmpfs {place} && {{ {run}; code=$?; find {place} -mindepth 1; exit $code; }}"
    user = ["--map-root-user"] if os.geteuid() else []
    return subprocess.run(["unshare", "--mount", *user, "sh", "-c", shell], capture_output=True, text=True, check=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    return tmp_path / "model"


@pytest.mark.parametrize("prelude", ["", LYING], ids=["checked before", "found when reserving"])
@pytest.mark.parametrize("after", ["none", "unpack"])
def test_a_full_disk_is_refused_and_left_empty(model: Path, prelude: str, after: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    arguments = ["convert", "--model_dir", str(model), "--output_dir", str(disk / "new/out"), "--scratch_after", after, "--quiet"]
    ran = on_small_disk("128k", disk, arguments, prelude)
    assert ran.returncode == 2, ran
    assert "nothing was written" in ran.stderr
    assert str(disk / "new") in ran.stderr
    assert ("No space left" if prelude else " free; expected room for ") in ran.stderr
    assert ran.stdout == "", "nothing is left on the disk"


def test_scratch_and_outputs_share_a_disks_room(model: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    arguments = ["convert", "--model_dir", str(model), "--output_dir", str(disk / "out"), "--quiet", "--scratch_after"]
    assert on_small_disk("480k", disk, [*arguments, "none"]).returncode == 0
    ran = on_small_disk("480k", disk, [*arguments, "read,shard"])
    assert ran.returncode == 2, ran
    assert " free; expected room for " in ran.stderr


def test_a_directory_that_cannot_be_written_is_refused(model: Path) -> None:
    ran = headrace("convert", "--model_dir", model, "--output_dir", "/proc/out", "--scheduler", "threads")
    assert ran.code == 2
    assert "/proc" in ran.err


def test_what_goes_while_room_is_counted_takes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Another conversion removes its journal and its scratch in the moment between a look at a directory and at what is in it.
    output = tmp_path / "out"
    output.mkdir()
    (output / "rank0.safetensors.partial").write_bytes(bytes(1 << 20))
    held = (output / "rank0.safetensors.partial").stat().st_blocks * 512
    listed = [(str(output), [], ["headrace.json.partial", "rank0.safetensors.partial"])]
    places = iter([tmp_path / "gone", output])
    monkeypatch.setattr("pipeline.sinks.output_checks.os.walk", lambda _: listed)
    monkeypatch.setattr("pipeline.sinks.output_checks.existing", lambda _: next(places, output))
    monkeypatch.setattr("pipeline.sinks.output_checks.free_bytes", lambda _: 100)
    assert check_space({output: held + 100}) == []
    (problem,) = check_space({output: held + 101})
    assert (problem.found, problem.expected.endswith("(1 bytes more)")) == ("100 B free", True)
