"""Files that a task writes to: found under the last name, too, where another task has given it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stages.write.deliveries import Delivery
from stages.write.open_files import PARTIAL, OpenFiles


def delivery(path: Path) -> Delivery:
    return Delivery(str(path), 0, ((0, 1),), 0)


def test_a_rank_that_has_its_last_name_is_written_again(tmp_path: Path) -> None:
    rank = tmp_path / "rank0.safetensors"
    rank.write_bytes(b"12")
    with OpenFiles() as files:
        os.pwrite(files.descriptor(delivery(Path(f"{rank}{PARTIAL}"))), b"3", 1)
        files.synchronize()
    assert rank.read_bytes() == b"13"
    assert list(tmp_path.iterdir()) == [rank]


def test_the_partial_file_goes_first_and_one_that_is_nowhere_is_named(tmp_path: Path) -> None:
    rank, partial = tmp_path / "rank0.safetensors", tmp_path / f"rank0.safetensors{PARTIAL}"
    for path in (rank, partial):
        path.write_bytes(b"1")
    with OpenFiles() as files:
        os.pwrite(files.descriptor(delivery(partial)), b"2", 0)
    assert (rank.read_bytes(), partial.read_bytes()) == (b"1", b"2")
    with OpenFiles() as files, pytest.raises(FileNotFoundError, match=r"rank1\.safetensors\.partial"):
        files.descriptor(delivery(tmp_path / f"rank1.safetensors{PARTIAL}"))
