"""Options, job files, memory limits, schedulers and sources that cannot be."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import distributed
import pytest

from tests.support import checkpoints
from tests.support.commands import COMMAND, convert, headrace, one, refused, tree


@pytest.fixture
def model(tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    return tmp_path / "model"


WRONG = [
    ("dtype", "float8"),
    ("dtype", "FLOAT16"),
    ("tp_size", 0),
    ("tp_size", -2),
    ("pp_size", 0),
    ("cp_size", 0),
    ("moe_tp_size", -2),
    ("moe_ep_size", -2),
    ("embedding_sharding_dim", 2),
    ("mlp_bias", "drop"),
    ("workers", -1),
    ("memory_limit", "lots"),
    ("memory_limit", "-2GiB"),
    ("memory_limit", ""),
    ("scheduler", "cluster"),
    ("scheduler", ""),
    ("scheduler", "http://127.0.0.1:8786"),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_value_that_an_option_does_not_take(model: Path, name: str, value: object) -> None:
    # The last of two equal flags counts, so that `--scheduler` too can be wrong here.
    problem = one(refused(model, f"--{name}", value))
    assert problem.startswith(f"--{name}: found ")
    assert str(value) in problem.partition("; expected ")[0]


@pytest.mark.parametrize(
    "flags", [("--tp_size", "two"), ("--tp_size", "1.5"), ("--nonsense", "1"), ("--tp_size",), ("a", "b")], ids=str
)
def test_arguments_that_the_command_line_does_not_take(model: Path, flags: tuple[str, ...]) -> None:
    before = tree(model.parent)
    ran = convert(model, model.parent / "out", *flags)
    assert ran.code == 2
    assert "Traceback" not in ran.err
    assert flags[-1 if flags[0] == "a" else 0] in ran.err
    assert tree(model.parent) == before


def test_every_wrong_option_comes_in_one_report(model: Path) -> None:
    report = refused(model, "--dtype", "int4", "--tp_size", 0, "--memory_limit", "lots", "--embedding_sharding_dim", 7)
    assert {problem.partition(":")[0] for problem in report} == {
        "--dtype",
        "--tp_size",
        "--memory_limit",
        "--embedding_sharding_dim",
    }


@pytest.mark.parametrize("command", ["convert", "plan"])
def test_the_two_paths_must_be_given(command: str) -> None:
    ran = headrace(command, "--tp_size", 2)
    assert ran.code == 2
    assert "--model_dir: found nothing" in ran.err
    assert "--output_dir: found nothing" in ran.err


@pytest.mark.parametrize("option", ["model_dir", "output_dir"])
def test_an_empty_path_is_not_the_current_directory(model: Path, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (model.parent / "empty").mkdir()
    monkeypatch.chdir(model if option == "model_dir" else model.parent / "empty")
    assert one(refused(model, f"--{option}", "")).startswith(f"--{option}")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("tp_sizes = 2", ["tp_sizes", "tp_size"]),
        ("tp_size = 'two'", ["tp_size", "two"]),
        ("tp_size = [2]", ["tp_size"]),
        ("dtype = 'int4'\npp_size = 0", ["dtype", "pp_size"]),
        ("[model]\npath = 'x'", ["model"]),
        ("model_dir = 5", ["model_dir"]),
        ("memory_limit = 'lots'", ["memory_limit"]),
        ("tp_size = ", ["not TOML"]),
        ("tp_size = 1\ntp_size = 2", ["not TOML"]),
        ("\0", ["not TOML"]),
    ],
)
def test_bad_job_files(model: Path, text: str, names: list[str]) -> None:
    job = model.parent / "job.toml"
    job.write_text(text)
    before = tree(model.parent)
    more = [] if "model_dir" in text else ["--model_dir", model]
    ran = headrace("convert", job, *more, "--output_dir", model.parent / "out")
    assert ran.code == 2
    assert ran.out == ""
    assert str(job) in ran.err
    assert all(name in ran.err for name in names)
    assert tree(model.parent) == before


def test_an_unknown_key_of_a_job_file_names_the_one_that_was_meant(model: Path) -> None:
    job = model.parent / "job.toml"
    job.write_text("tp_siz = 2")
    report = headrace("convert", job, "--model_dir", model, "--output_dir", model.parent / "out").err
    assert "Did you mean tp_size?" in report
    assert "cp_size" not in report


@pytest.mark.parametrize("name", ["gone.toml", "folder", "binary.toml", "x" * 300])
def test_a_job_file_that_cannot_be_read(model: Path, name: str) -> None:
    (model.parent / "folder").mkdir()
    (model.parent / "binary.toml").write_bytes(b"\xff\xfe\x00")
    ran = headrace("convert", model.parent / name, "--model_dir", model, "--output_dir", model.parent / "out")
    assert ran.code == 2
    assert f"{model.parent / name}: found " in ran.err


@pytest.mark.parametrize("name", ["gone", "gone/deeper", "x" * 300])
def test_a_source_that_is_not_there(model: Path, name: str) -> None:
    source = model.parent / name
    # The last of two equal flags counts.
    assert one(refused(model, "--model_dir", source)).startswith(f"{source}: found ")


@pytest.mark.parametrize("name", ["empty", "notes", "notes/readme.txt", "empty.gguf", "blank"])
def test_a_source_that_is_no_checkpoint(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("no weights here")
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "blank").touch()
    source = tmp_path / name
    assert one(refused(source, output=tmp_path / "out")).startswith(f"{source}: found ")


def test_a_source_and_an_output_that_cannot_be_come_in_one_report(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    problems = refused(tmp_path / "gone")
    assert [problem.partition(": ")[0] for problem in problems] == [str(tmp_path / "gone"), f"--output_dir {tmp_path / 'out'}"]


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("limit", ["1MiB", "160MiB", "0"])
def test_a_memory_limit_that_nothing_fits_names_the_tensor_and_what_would(model: Path, workers: int, limit: str) -> None:
    problem = one(refused(model, "--workers", workers, "--memory_limit", limit))
    assert problem.startswith("--memory_limit: found ")
    assert re.search(r"a piece of (transformer|lm_head)[\w.]+", problem), problem
    remedy = re.search(r"Give --memory_limit (\w+)", problem)
    assert remedy, problem
    followed = convert(model, model.parent / "out", "--workers", workers, "--memory_limit", remedy[1])
    assert followed.code == 0, followed


def test_fewer_workers_where_the_memory_limit_offers_them(tmp_path: Path) -> None:
    # One piece of a very wide matrix for each worker: sixteen do not fit where eight do.
    wide = {
        **checkpoints.LLAMA,
        "hidden_size": 1 << 18,
        "num_hidden_layers": 1,
        "head_dim": 8,
        "vocab_size": 16,
        "intermediate_size": 8,
    }
    checkpoints.write(tmp_path / "model", {**wide, "num_attention_heads": 1, "num_key_value_heads": 1})
    problem = one(refused(tmp_path / "model", "--workers", 64, "--memory_limit", "200MiB"))
    fewer = re.search(r"or --workers (\d+)", problem)
    assert fewer, problem
    assert convert(tmp_path / "model", tmp_path / "out", "--workers", fewer[1], "--memory_limit", "200MiB").code == 0


@pytest.mark.parametrize("address", ["tcp://", "tcp://127.0.0.1:notaport", "tls://127.0.0.1:1"])
def test_a_scheduler_address_that_is_none(model: Path, address: str) -> None:
    assert address in one(refused(model, "--scheduler", address))


def test_a_scheduler_that_does_not_answer(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = distributed.Client
    monkeypatch.setattr(distributed, "Client", lambda address, timeout: whole(address, timeout=timeout / 20))
    problem = one(refused(model, "--scheduler", "tcp://127.0.0.1:1"))
    assert problem.startswith("--scheduler tcp://127.0.0.1:1: found no answer")


@pytest.mark.parametrize("flags", [("--tp_size", "3"), ("--dtype", "int4"), ("--nonsense", "1")], ids=str)
def test_the_process_itself_exits_2_without_a_traceback(model: Path, flags: tuple[str, str]) -> None:
    arguments = ["convert", "--model_dir", str(model), "--output_dir", str(model.parent / "out"), *flags]
    ran = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert flags[0] in ran.stderr
    assert "Traceback" not in ran.stderr
    assert ran.stdout == ""
    assert not (model.parent / "out").exists()
