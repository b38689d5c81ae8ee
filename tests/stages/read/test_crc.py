"""CRCs of archives of torch.save: held against the data where that is asked for, by the same rule as `unzip -t`."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from stages.read.crc import PIECE_BYTES, check_crcs
from tests.support import checkpoints
from tests.support.commands import convert, headrace, one, refused


@pytest.fixture
def model(tmp_path: Path) -> Path:
    source = checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    (tmp_path / "model" / "model.safetensors").unlink()
    values = {name: torch.from_numpy(array.copy()) for name, array in source.items()}
    torch.save(values, tmp_path / "model" / "pytorch_model.bin")
    return tmp_path / "model"


def damage(path: Path, record: int, at: int = 0) -> str:
    """Flip a bit of a storage's data; returns the record's name without the archive's folder."""
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if "/data/" in entry.filename]
        entry = entries[record]
        with archive.open(entry) as opened:
            content = opened.read(256)
    data = bytearray(path.read_bytes())
    start = data.index(content, entry.header_offset)
    data[start + at] ^= 1
    path.write_bytes(bytes(data))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() == entry.filename, "Python's own reader finds it, too"
    return entry.filename.partition("/")[2]


def test_a_flipped_bit_is_a_problem_where_it_is_looked_for(model: Path, tmp_path: Path) -> None:
    path = model / "pytorch_model.bin"
    assert check_crcs([path]) == ([], 1)
    name = damage(path, 3)
    problem = one(refused(model, "--check_crc"))
    assert problem.startswith(f"{path}: found 1 of ")
    assert f" records with another CRC-32, the first {name}; expected the CRC-32 that " in problem
    assert headrace("plan", "--model_dir", model, "--output_dir", tmp_path / "out", "--check_crc").code == 2
    assert convert(model, tmp_path / "out").code == 0, "nobody asked"


def test_several_are_one_problem(model: Path) -> None:
    path = model / "pytorch_model.bin"
    first = damage(path, 0)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith("/data/5"))
    data[data.index(b"/data/5", entry.header_offset) + 256] ^= 1  # behind the padding of its header
    path.write_bytes(bytes(data))
    (problem,), count = check_crcs([path, path.parent / "config.json"])
    assert count == 1
    assert problem.found.startswith("2 of ")
    assert problem.found.endswith(f"the first {first}")


def test_a_record_larger_than_a_piece(tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    torch.save({"a": torch.arange(PIECE_BYTES // 2, dtype=torch.int32)}, path)
    assert check_crcs([path]) == ([], 1)
    data = bytearray(path.read_bytes())
    data[PIECE_BYTES + 4096] ^= 8
    path.write_bytes(bytes(data))
    ((problem,), _) = check_crcs([path])
    assert problem.found.endswith(" records with another CRC-32, the first data/0")


def test_an_archive_that_was_saved_without_checksums_is_noted(model: Path, tmp_path: Path) -> None:
    path = model / "pytorch_model.bin"
    values = torch.load(path)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(values, path)
    finally:
        torch.serialization.set_crc32_options(before)
    with zipfile.ZipFile(path) as archive:
        assert {entry.CRC for entry in archive.infolist()} == {0}
    assert check_crcs([path]) == ([], 0)
    ran = headrace("plan", "--model_dir", model, "--output_dir", tmp_path / "out", "--check_crc", "--json")
    assert ran.code == 0
    assert "check_crc: no file of this source has checksums" in ran.out


def test_one_record_without_its_checksum_is_a_problem(model: Path) -> None:
    """All others have one: this one was lost."""
    path = model / "pytorch_model.bin"
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith("/data/20"))
    at = data.rindex(b"PK\1\2", 0, data.rindex(entry.filename.encode()))  # its place in the directory
    data[at + 16 : at + 20] = bytes(4)
    path.write_bytes(bytes(data))
    ((problem,), _) = check_crcs([path])
    assert problem.found.startswith("1 of ")
    assert problem.found.endswith("the first data/20")


def test_a_source_without_checksums_is_noted(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    ran = headrace("plan", "--model_dir", tmp_path / "model", "--output_dir", tmp_path / "out", "--check_crc", "--json")
    assert ran.code == 0
    assert "check_crc: no file of this source has checksums" in ran.out
