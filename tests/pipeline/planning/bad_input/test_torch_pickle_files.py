"""PyTorch files whose archive or format is damaged, or that are not what they seem: the report names the file."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from pipeline.errors import BadInput
from pipeline.tensor.tensors import LazyTensor
from stages.read import torch_pickle
from tests.pipeline.planning.bad_input.torch_pickles import (
    FILE,
    FLOATS,
    MAGIC,
    PROTOCOL,
    SYSTEM,
    archive,
    legacy,
    model_directory,
    pickled,
    problem,
    problem_of,
    tensor,
)
from tests.support import checkpoints
from tests.support.commands import headrace, one, refused
from tests.support.examples import examples


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return model_directory(tmp_path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, bytes]:
    """A small file in each format, by whether it is a zip archive."""
    path = tmp_path_factory.mktemp("sound") / FILE
    made = {}
    for zipped in (True, False):
        torch.save(torch.nn.Linear(3, 4).state_dict(), path, _use_new_zipfile_serialization=zipped)
        made[zipped] = path.read_bytes()
    return made


def test_a_big_endian_archive(model: Path) -> None:
    report = problem(model, archive({"a": tensor()}, records={"byteorder": b"big"}))
    assert report.startswith("found byteorder big; expected a file of a little-endian machine")


def test_an_unknown_byte_order(model: Path) -> None:
    report = problem(model, archive({"a": tensor()}, records={"byteorder": b"\x1b[2Jmiddle" * 20}))
    assert report.startswith("found byteorder '\\x1b[2J")


def test_a_big_endian_legacy_file(model: Path) -> None:
    report = problem(model, legacy({"a": tensor(view=(None,))}, head=(MAGIC, PROTOCOL, {**SYSTEM, "little_endian": False})))
    assert "expected a file of a little-endian machine" in report


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_archive(compression: int, model: Path) -> None:
    report = problem(model, archive({"a": tensor()}, compression=compression))
    assert report.startswith("archive/data.pkl: found compressed data; expected data stored as they are")


def test_one_compressed_record(model: Path) -> None:
    (model / FILE).write_bytes(archive({"a": tensor()}, records={"data/0": None}))
    with zipfile.ZipFile(model / FILE, "a") as file:
        file.writestr("archive/data/0", FLOATS, zipfile.ZIP_DEFLATED)
    assert problem_of(model).startswith("archive/data/0: found compressed data")


def test_an_encrypted_archive(model: Path) -> None:
    content = bytearray(archive({"a": tensor()}))
    at = content.index(b"PK\1\2")  # the flags of the directory's first entry
    content[at + 8] |= 1
    assert problem(model, bytes(content)).startswith("archive/data.pkl: found encrypted data")


@pytest.mark.parametrize("record", ["constants.pkl", "code/__torch__.py"])
def test_a_torchscript_archive(record: str, model: Path) -> None:
    report = problem(model, archive({"a": tensor()}, records={record: b"\x80\x02)."}))
    assert report.startswith("found a TorchScript archive; expected a state dict. Load it with torch, and save the state_dict()")


def test_an_archive_without_a_pickle(model: Path) -> None:
    report = problem(model, archive({}, records={"data.pkl": None}))
    assert report.startswith("found a zip archive of 3 records, none of them */data.pkl")


@pytest.mark.parametrize("name", ["/data.pkl", "/a/b/data.pkl", "/data.pkl/"])
def test_a_pickle_at_another_place(name: str, model: Path) -> None:
    report = problem(model, archive({}, records={"data.pkl": None, name: pickled({})}))
    assert "none of them */data.pkl" in report


def test_two_pickles(model: Path) -> None:
    report = problem(model, archive({"a": tensor()}, records={"/other/data.pkl": pickled({})}))
    assert report.startswith("found a zip archive of 5 records, 2 of them */data.pkl")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_record_that_stands_twice(model: Path) -> None:
    (model / FILE).write_bytes(archive({"a": tensor()}))
    with zipfile.ZipFile(model / FILE, "a") as file:
        file.writestr("archive/data/0", FLOATS[::-1])
    assert "a record that stands twice" in problem_of(model)


@pytest.mark.parametrize("version", [b"11\n", b"x", b"-1", b"", b"\xff", b"9" * 500])
def test_another_version(version: bytes, model: Path) -> None:
    assert "found " in problem(model, archive({"a": tensor()}, records={"version": version}))


def entry(content: bytes, name: str) -> int:
    """Where the directory's entry of a record begins."""
    at = content.index(b"PK\1\2")
    while content[at + 46 : at + 46 + len(name)] != name.encode():
        at = content.index(b"PK\1\2", at + 4)
    return at


@pytest.mark.parametrize("offset", [0, 7, 2**31, 2**32 - 2])
@pytest.mark.parametrize("record", ["archive/data.pkl", "archive/data/0", "archive/byteorder"])
def test_a_record_that_is_not_where_the_directory_says(record: str, offset: int, model: Path) -> None:
    content = bytearray(archive({"a": tensor()}))
    at = entry(bytes(content), record)
    if record == "archive/data.pkl" and offset == 0:
        offset = 1
    content[at + 42 : at + 46] = struct.pack("<I", offset)
    assert "damaged one (" in problem(model, bytes(content))


@pytest.mark.parametrize("record", ["archive/data.pkl", "archive/data/0"])
def test_a_record_that_reaches_past_the_end(record: str, model: Path) -> None:
    content = bytearray(archive({"a": tensor()}))
    at = entry(bytes(content), record)
    content[at + 20 : at + 28] = struct.pack("<II", 10**6, 10**6)
    assert "cut short in data" in problem(model, bytes(content))


def test_a_directory_that_is_said_to_be_enormous(model: Path) -> None:
    # A sparse file of 3 GiB whose last bytes say that all before them are the directory.
    (model / FILE).write_bytes(b"PK\3\4")
    nbytes = (3 << 30) - 22
    with (model / FILE).open("r+b") as file:
        file.truncate(nbytes)
        file.seek(nbytes)
        file.write(b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, nbytes, 0, 0))
    assert f"a directory of {nbytes:,} bytes" in problem_of(model)


@pytest.mark.parametrize("zipped", [True, False])
def test_every_truncation_is_refused(model: Path, sound: dict[bool, bytes], zipped: bool) -> None:
    (model / FILE).write_bytes(sound[zipped])
    for length in range(len(sound[zipped]) - 1, -1, -1):
        os.truncate(model / FILE, length)
        assert opened(model / FILE) is None, length
    (model / FILE).write_bytes(sound[zipped][:-1])
    assert plan(model) == 2


@pytest.mark.parametrize("zipped", [True, False])
@examples(300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes(model: Path, sound: dict[bool, bytes], zipped: bool, data: st.DataObject) -> None:
    content = bytearray(sound[zipped])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (model / FILE).write_bytes(content)
    # Values, names and padding may be any; what must not be is another exception, which would come out of the call.
    opened(model / FILE)


@examples(300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=60), start=st.sampled_from([b"", b"\x80\x02", b"PK\3\4", b"\x80\x02}(", b"\x80\x02(ctorch\nSize\n"])
)
def test_random_bytes(model: Path, content: bytes, start: bytes) -> None:
    (model / FILE).write_bytes(start + content)
    assert opened(model / FILE) is None
    (model / FILE).write_bytes(archive(start + content + b"."))
    assert not opened(model / FILE)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_file_whose_tensors_are_sound_is_still_no_model(zipped: bool, model: Path, sound: dict[bool, bytes]) -> None:
    (model / FILE).write_bytes(sound[zipped])
    assert opened(model / FILE)
    assert plan(model) == 2


def opened(path: Path) -> Mapping[str, LazyTensor] | None:
    """The tensors that the reader finds in a file, None where it refuses it. Any other exception comes out here."""
    try:
        return torch_pickle.open_file(path)[1]
    except BadInput:
        return None


def plan(model: Path) -> int:
    ran = headrace("plan", "--model_dir", model, "--output_dir", model.parent / "out")
    assert ran.code == 0 or ran.err.startswith("headrace: "), ran
    return ran.code


def test_a_tar_archive_of_the_first_torch(model: Path) -> None:
    with tarfile.open(model / FILE, "w") as file:
        for name in ("storages", "tensors", "pickle"):
            file.addfile(tarfile.TarInfo(name))
    assert problem_of(model).startswith("found a tar archive, as torch made before 0.2")


def test_a_name_that_looks_like_a_tar_archive(tmp_path: Path) -> None:
    # In the legacy format, at the place where tar archives say what they are.
    for length in range(90, 130):
        name = "n" * length + "ustar"
        torch.save({name: torch.ones(3)}, tmp_path / FILE, _use_new_zipfile_serialization=False)
        if (tmp_path / FILE).read_bytes()[257:262] == b"ustar":
            assert torch_pickle.open_file(tmp_path / FILE)[1].keys() == {name}
            return
    raise AssertionError("no name fell on that place")


OTHERS = {
    "empty": b"",
    "one byte": b"P",
    "the beginning of a zip": b"PK\3\4",
    "text": b"<!DOCTYPE html>\n<p>Not found</p>\n",
    "a page": b"<!DOCTYPE html><html>Not found</html>",
    "zeros": bytes(4096),
    "a bare pickle": pickle.dumps({"a": [1.0, 2.0]}),
    "another magic number": legacy({}, head=(MAGIC + 1, PROTOCOL, SYSTEM)),
    "another protocol": legacy({}, head=(MAGIC, PROTOCOL + 1, SYSTEM)),
    "no keys": legacy({"a": tensor(view=(None,))}, keys={}),
    "keys that are numbers": legacy({"a": tensor(view=(None,))}, keys=[0]),
    "a key that no tensor has": legacy({"a": tensor(view=(None,))}, keys=["1"]),
    "a storage of a negative size": legacy({"a": tensor(view=(None,))}, storages=struct.pack("<q", -1)),
    "a storage past the end": legacy({"a": tensor(view=(None,))}, storages=struct.pack("<q", 2**62)),
    "no storages": legacy({"a": tensor(view=(None,))}, storages=b""),
}


@pytest.mark.parametrize("case", OTHERS)
def test_files_that_are_none_of_torchs(case: str, model: Path) -> None:
    report = problem(model, OTHERS[case])
    assert report.startswith("found what is no checkpoint of torch.save, or a damaged one (")


def test_a_system_that_does_not_say_its_byte_order(model: Path) -> None:
    for system in ({}, [], "little_endian", 5):
        assert "found sys_info" in problem(model, legacy({}, head=(MAGIC, PROTOCOL, system)))


def test_safetensors_under_another_name(model: Path) -> None:
    checkpoints.write(model.parent / "other", checkpoints.LLAMA)
    shutil.copy(model.parent / "other/model.safetensors", model / FILE)
    assert problem_of(model).startswith("found what is no checkpoint of torch.save")


def test_a_file_that_is_a_directory(model: Path) -> None:
    (model / FILE).mkdir()
    assert one(refused(model)).startswith(f"{model / FILE}: found a file that cannot be read")
