"""What is brought to the disk: rank files by whichever name they have."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.sinks.syncing import sync_files


def test_a_file_that_got_its_final_name_meanwhile_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = list[str]()
    monkeypatch.setattr(os, "fdatasync", lambda file: flushed.append(str(Path(f"/proc/self/fd/{file}").readlink())))
    for name in ("rank0.safetensors", "rank1.safetensors.partial", "chunk"):
        (tmp_path / name).touch()
    asked = [tmp_path / name for name in ("rank0.safetensors.partial", "rank1.safetensors.partial", "chunk", "freed")]
    sync_files(asked, missing_ok=True)
    assert sorted(flushed) == sorted(str(path) for path in tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        sync_files(asked)
