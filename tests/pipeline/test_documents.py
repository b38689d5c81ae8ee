"""JSON and TOML of strangers: what is too large, too deep or no file is refused before it costs anything."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.documents import (
    MAX_DEPTH,
    MAX_DIGITS,
    MAX_TOML_BYTES,
    MAX_VALUES,
    open_regular,
    parse_json,
    read_document,
    read_object,
    read_toml_file,
)
from pipeline.errors import BadInput
from pipeline.planning.job_file import read_job_file
from stages.read.json_file import json_file
from stages.read.ranks import open_checkpoint
from stages.read.safetensors import open_file, parse_header
from tests.support import checkpoints
from tests.support.commands import limited, one, refused

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4' * 64}\nsize 4976698672\n"
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(plain)
def test_json_is_what_the_library_reads(value: Any) -> None:
    text = json.dumps(value)
    assert parse_json(text) == json.loads(text)
    assert parse_json(text.encode()) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), f"more than {MAX_DEPTH} deep"),
        ('{"a":' * 90_000 + "1" + "}" * 90_000, f"more than {MAX_DEPTH} deep"),
        ("[" + "[]," * MAX_VALUES + "[]]", f"more than {MAX_VALUES:,}"),
        ("9" * (MAX_DIGITS + 1), "a number of 101 digits"),
        ("-" + "9" * 400, "a number of 401 digits"),
        ("0." + "9" * 400, "a number of 402 digits"),
        ("9" * 1_000_000, "a number of 1,000,000 digits"),
        ("{", ""),
        ("", ""),
    ],
)
def test_what_no_checkpoint_has_is_refused_in_no_time(text: str, said: str) -> None:
    begun = time.process_time()
    with pytest.raises(ValueError, match=said):
        parse_json(text)
    assert time.process_time() - begun < 2


def test_the_deepest_and_the_longest_that_are_allowed() -> None:
    value = parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    for _ in range(MAX_DEPTH - 1):
        (value,) = value
    assert value == []
    assert parse_json("9" * MAX_DIGITS) == int("9" * MAX_DIGITS)


def test_fifty_million_lists_in_a_header_take_no_memory(tmp_path: Path) -> None:
    header = b'{"a":[' + b"[]," * 20_000_000 + b"[]]}"
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    tensors, problems = parse_header(header, 0, path)
    assert not tensors
    assert "20,000,003 values" in str(problems[0]) or "values, more than" in str(problems[0])


@pytest.mark.parametrize("read", [json_file, lambda path: read_toml_file(path, "a file"), read_document])
def test_a_sparse_file_of_gigabytes_is_refused_by_its_size(tmp_path: Path, read: Any) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(6 << 30)
    begun = time.process_time()
    with pytest.raises(BadInput, match="6,442,450,944 bytes"):
        read(tmp_path / "config.json")
    assert time.process_time() - begun < 1


def test_a_sparse_config_of_a_model_is_a_problem(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    with (tmp_path / "model" / "config.json").open("wb") as file:
        file.truncate(6 << 30)
    assert "found 6,442,450,944 bytes; expected at most" in one(refused(tmp_path / "model"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (".".join("a" * 50_000) + " = 1", "a key of more than"),
        ("[" + ".".join("a" * 50_000) + "]", "a key of more than"),
        ("x = {" + ".".join(['"a"'] * 50_000) + " = 1}", "a key of more than"),
        ("x = " + "[" * 5_000 + "]" * 5_000, "deep"),
        ("x = " + "[" * 80 + "]" * 80, "deep"),
        ("x = " + "9" * 5_000, "not TOML"),
        ("x = ", "not TOML"),
        ("a" * 1_000_000, "not TOML"),
        ('"' * 100_001, "not TOML"),
    ],
)
def test_toml_that_nobody_writes_is_refused_in_no_time(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "job.toml").write_text(text)
    begun = time.process_time()
    with pytest.raises(BadInput, match=said):
        read_job_file(tmp_path / "job.toml")
    assert time.process_time() - begun < 3


def test_long_words_with_dots_in_values_are_no_keys(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(f'a = "{"../" * 200}x"\nb = "{"Some words. " * 200}"\n"c.{"d" * 200}" = 1\n')
    assert len(read_toml_file(tmp_path / "job.toml", "a job file")) == 3


def test_a_toml_file_of_megabytes(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_bytes(b"#" * (MAX_TOML_BYTES + 1))
    with pytest.raises(BadInput, match=f"found {MAX_TOML_BYTES + 1:,} bytes"):
        read_toml_file(tmp_path / "job.toml", "a job file")


@pytest.mark.parametrize("read", [open_regular, read_document, json_file, open_file, read_job_file])
def test_a_named_pipe_is_refused_without_waiting(tmp_path: Path, read: Any) -> None:
    os.mkfifo(tmp_path / "file")
    with pytest.raises(BadInput, match="found a named pipe; expected a regular file"):
        read(tmp_path / "file")
    assert read_object(tmp_path / "file") == {}


def test_sockets_and_devices_are_refused() -> None:
    with pytest.raises(BadInput, match="found a device"):
        open_regular(Path("/dev/zero"))


def test_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("file")
        with pytest.raises(BadInput, match="found a socket"):
            open_regular(Path("file"))


def test_a_link_to_a_file_is_a_file_and_a_directory_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    (tmp_path / "link").symlink_to("file")
    assert json_file(tmp_path / "link")[0] == {}
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(BadInput, match="cannot be read"):
        json_file(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json", "quantize_config.json"])
def test_a_pipe_in_a_checkpoint_never_hangs(tmp_path: Path, name: str) -> None:
    model = tmp_path / "model"
    checkpoints.write(model, checkpoints.LLAMA)
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    ran = limited({"RLIMIT_CPU": 20}, "plan", "--model_dir", model, "--output_dir", tmp_path / "out")
    if name == "quantize_config.json":  # not read where it is no file
        assert ran.code == 0, ran
    else:
        assert ran.code == 2, ran
        assert f"{name}: found a named pipe" in ran.err


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "m.gguf"]
)
def test_a_pointer_of_git_lfs_is_named(tmp_path: Path, name: str) -> None:
    model = tmp_path / "model"
    checkpoints.write(model, checkpoints.LLAMA)
    if name in ("pytorch_model.bin", "m.gguf"):
        (model / "model.safetensors").unlink()
    if name == "m.gguf":
        (model / "config.json").unlink()
    (model / name).write_text(POINTER)
    problem = one(refused(model))
    assert problem.startswith(f"{model / name}: found a pointer of Git LFS")
    assert "git lfs pull" in problem


def test_a_pointer_among_ranks_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"mapping": {"world_size": 1}}')
    (tmp_path / "rank0.safetensors").write_text(POINTER)
    with pytest.raises(BadInput, match="a pointer of Git LFS"):
        open_checkpoint(tmp_path)
