"""The command line: flags, job files, `plan`, what is printed where, and a second run of what is done."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.tensor.units import human_bytes
from tests.support import checkpoints
from tests.support.commands import COMMAND, convert, headrace, tree
from tests.support.directories import values_bytes

PLAN_KEYS = {
    "source",
    "notes",
    "targets",
    "phases",
    "scratch",
    "scratch_reasons",
    "tasks",
    "workers",
    "block_bytes",
    "piece_bytes",
    "peak_memory_bytes",
    "memory_limit_bytes",
    "bytes_read",
    "bytes_written",
    "scratch_bytes_read",
    "scratch_bytes_written",
    "scheduler",
    "obstacles",
    "plan_id",
    "done_tasks",
    "estimated_seconds",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    return tmp_path / "model"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, whose streams are no terminals."""
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False)


def mapping(output: Path) -> dict[str, int]:
    return json.loads((output / "config.json").read_text())["mapping"]


LOADED = """
import atexit, sys
heavy = {"numpy", "dask", "distributed", "bokeh", "zarr", "torch", "transformers", "sqlite3", "apscheduler", "gguf"}
atexit.register(lambda: print("loaded", *sorted(heavy & sys.modules.keys())))
from pipeline.cli import main
main()
"""


@pytest.mark.parametrize(
    ("command", "loaded"),
    [
        ("--help", []),
        ("plan", ["numpy"]),
        ("convert --scheduler threads", ["dask", "numpy"]),
        ("convert --scheduler local", ["dask", "distributed", "numpy"]),
    ],
)
def test_a_command_loads_what_it_needs(model: Path, output: Path, command: str, loaded: list[str]) -> None:
    words = command.split() if command == "--help" else [*command.split(), "--model_dir", str(model), "--output_dir", str(output)]
    ran = subprocess.run([sys.executable, "-c", LOADED, *words], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1].split() == ["loaded", *loaded]


def test_verifying_loads_neither_torch_nor_dask(model: Path, output: Path) -> None:
    """What compares values computes with NumPy, in threads: torch alone would be most of its time and memory."""
    assert (
        headrace("convert", "--model_dir", model, "--output_dir", output, "--scheduler", "threads", "--use_fp8_rowwise").code == 0
    )
    words = ["verify", str(output), "--source", str(model), "--quiet"]
    ran = subprocess.run([sys.executable, "-c", LOADED, *words], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout.split()) == (0, ["loaded", "numpy"]), ran.stderr


@pytest.mark.parametrize("dashed", [False, True])
def test_dashes_and_underscores_are_alike(model: Path, output: Path, dashed: bool) -> None:
    flags = {"model_dir": model, "output_dir": output, "tp_size": 2, "embedding_sharding_dim": 1, "log_format": "json"}
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    words = [word.replace("_", "-") if dashed and isinstance(word, str) else word for word in words]
    parallel = "--use-parallel-embedding" if dashed else "--use_parallel_embedding"
    assert headrace("convert", *words, parallel, "--scheduler", "threads").code == 0
    config = json.loads((output / "config.json").read_text())
    assert (config["mapping"]["tp_size"], config["use_parallel_embedding"], config["embedding_sharding_dim"]) == (2, True, 1)


@pytest.mark.parametrize("flag", ["--no_use_parallel_embedding", "--no-use-parallel-embedding"])
def test_a_flag_can_take_back_what_a_job_file_says(model: Path, output: Path, flag: str) -> None:
    job = model.parent / "job.toml"
    job.write_text("use_parallel_embedding = true\nscheduler = 'threads'")
    assert headrace("convert", job, "--model_dir", model, "--output_dir", output, flag).code == 0
    assert json.loads((output / "config.json").read_text())["use_parallel_embedding"] is False


def test_flags_override_a_job_file_and_the_rest_of_it_stands(model: Path, output: Path) -> None:
    job = model.parent / "job.toml"
    job.write_text(f"model_dir = '{model}'\noutput_dir = '{output}'\ntp_size = 4\npp_size = 3\nscheduler = 'threads'\n")
    assert headrace("convert", job, "--tp_size", 2).code == 0
    assert (mapping(output)["tp_size"], mapping(output)["pp_size"]) == (2, 3)
    assert len(list(output.glob("rank*.safetensors"))) == 6


def test_paths_in_a_job_file_are_relative_to_the_file(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model.parent / "jobs"
    (folder / "elsewhere").mkdir(parents=True)
    (folder / "job.toml").write_text("model_dir = '../model'\noutput_dir = 'out'\nscheduler = 'threads'\nmemory_limit = '1GiB'\n")
    monkeypatch.chdir(folder / "elsewhere")
    assert headrace("convert", "../job.toml").code == 0
    assert (folder / "out" / "config.json").exists()


def test_paths_on_the_command_line_are_relative_to_the_current_directory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    assert convert("model", "here").code == 0
    assert (model.parent / "here" / "config.json").exists()


def test_plan_writes_nothing_and_says_what_convert_then_writes(model: Path, output: Path) -> None:
    arguments = ("--model_dir", model, "--output_dir", output, "--tp_size", 2, "--pp_size", 2, "--scheduler", "threads")
    before = tree(model.parent)
    table, planned = headrace("plan", *arguments), headrace("plan", *arguments, "--json")
    assert (table.code, table.err, planned.code, planned.err) == (0, "", 0, "")
    assert tree(model.parent) == before
    assert headrace("convert", *arguments).code == 0
    sizes = {path.name: path.stat().st_size for path in output.glob("rank*")}
    plan = json.loads(planned.out)
    assert {rank["file"]: rank["bytes"] for rank in plan["targets"][0]["ranks"]} == sizes
    assert plan["targets"][0]["bytes"] == sum(sizes.values())
    assert plan["bytes_written"] == values_bytes(output)
    for name, size in sizes.items():
        assert any(name in line and human_bytes(size) in line for line in table.out.splitlines())
    for rank in plan["targets"][0]["ranks"]:
        header = (output / rank["file"]).read_bytes()
        assert len(json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])) == rank["tensors"]
    assert json.loads((output / "headrace.json").read_text())["id"] == plan["targets"][0]["id"]


def test_plan_as_json(model: Path, output: Path) -> None:
    plan = json.loads(headrace("plan", "--model_dir", model, "--output_dir", output, "--json", "--workers", 3).out)
    assert plan.keys() == PLAN_KEYS
    source = plan["source"]
    assert (source["family"], source["architecture"], source["dtype"]) == ("llama", "LlamaForCausalLM", "float16")
    assert (source["tensors"], source["path"]) == (30, str(model))
    assert source["bytes"] == plan["bytes_read"] == sum(2 * array.size for array in checkpoints.values(checkpoints.LLAMA).values())
    target = plan["targets"][0]
    assert (target["path"], target["dtype"], target["up_to_date"]) == (str(output), "float16", False)
    assert target["free_bytes_there"] > 0
    assert (plan["workers"], plan["scheduler"], plan["obstacles"]) == (3, "local", [])
    assert 0 < plan["peak_memory_bytes"] <= plan["memory_limit_bytes"] == 2 << 30


def test_plan_says_that_a_finished_conversion_stands_in_the_way(model: Path, output: Path) -> None:
    convert(model, output)
    before = tree(output)
    ran = headrace("plan", "--model_dir", model, "--output_dir", output, "--tp_size", 2, "--json")
    assert ran.code == 2
    assert "tp_size 1 (asked: 2)" in json.dumps(json.loads(ran.out)["obstacles"])
    assert "--overwrite" in json.dumps(json.loads(ran.out)["obstacles"])
    same = headrace("plan", "--model_dir", model, "--output_dir", output, "--json")
    assert json.loads(same.out)["targets"][0]["up_to_date"] is True
    assert tree(output) == before


def test_plan_of_what_cannot_be_converted_exits_2(model: Path, output: Path) -> None:
    ran = headrace("plan", "--model_dir", model, "--output_dir", output, "--tp_size", 3, "--json")
    assert (ran.code, ran.out) == (2, "")
    assert "--tp_size 3: found num_attention_heads 8" in ran.err


@pytest.mark.parametrize("more", [(), ("--workers", 1, "--memory_limit", "1GiB")], ids=str)
def test_a_second_run_changes_nothing_and_says_so(model: Path, output: Path, more: tuple[object, ...]) -> None:
    assert convert(model, output).code == 0
    before = tree(output)
    ran = convert(model, output, *more)
    assert ran.code == 0
    assert "up to date" in " ".join(ran.out.split())
    assert tree(output) == before


def test_overwrite_starts_afresh(model: Path, output: Path) -> None:
    assert convert(model, output).code == 0
    rank = output / "rank0.safetensors"
    whole = rank.read_bytes()
    rank.write_bytes(bytes(len(whole)))
    assert convert(model, output, "--overwrite").code == 0
    assert rank.read_bytes() == whole


def test_a_message_is_one_line_where_there_is_no_terminal(model: Path, output: Path) -> None:
    deep = output / ("long" * 20) / ("name" * 20)
    assert convert(model, deep).code == 0
    assert convert(model, deep).out == f"{deep} is up to date: nothing to do\n"


def test_other_options_do_not_replace_a_finished_conversion_unless_asked(model: Path, output: Path) -> None:
    assert convert(model, output, "--tp_size", 4).code == 0
    before = tree(output)
    ran = convert(model, output, "--tp_size", 2)
    assert (ran.code, ran.out) == (2, "")
    assert str(output) in ran.err
    assert "--overwrite" in ran.err
    assert tree(output) == before
    assert convert(model, output, "--tp_size", 2, "--overwrite").code == 0
    assert {path.name for path in output.iterdir()} == {"config.json", "headrace.json", "rank0.safetensors", "rank1.safetensors"}
    assert mapping(output)["tp_size"] == 2


def test_a_changed_source_is_not_up_to_date(model: Path, output: Path) -> None:
    assert convert(model, output).code == 0
    checkpoints.write(model, checkpoints.LLAMA, seed=1)
    assert convert(model, output).code == 2
    assert convert(model, output, "--overwrite").code == 0
    checkpoints.write(model.parent / "model1", checkpoints.LLAMA, seed=1)
    assert convert(model.parent / "model1", model.parent / "fresh").code == 0
    assert (output / "rank0.safetensors").read_bytes() == (model.parent / "fresh" / "rank0.safetensors").read_bytes()


def test_a_damaged_output_is_not_up_to_date(model: Path, output: Path) -> None:
    assert convert(model, output).code == 0
    whole = (output / "rank0.safetensors").read_bytes()
    (output / "rank0.safetensors").write_bytes(whole[:-1])
    assert convert(model, output, "--overwrite").code == 0
    assert (output / "rank0.safetensors").read_bytes() == whole


def test_quiet_says_nothing(model: Path, output: Path) -> None:
    ran = process("convert", "--model_dir", model, "--output_dir", output, "--quiet")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    again = process("convert", "--model_dir", model, "--output_dir", output, "--quiet")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")


def test_quiet_still_says_what_is_wrong(model: Path, output: Path) -> None:
    ran = convert(model, output, "--quiet", "--tp_size", 3)
    assert ran.code == 2
    assert "--tp_size 3" in ran.err


def test_json_lines(model: Path, output: Path) -> None:
    ran = process("convert", "--model_dir", model, "--output_dir", output, "--log_format", "json", "--tp_size", 2)
    assert (ran.returncode, ran.stdout) == (0, "")
    events = [json.loads(line) for line in ran.stderr.splitlines()]
    assert [event["event"] for event in (events[0], events[-2], events[-1])] == ["started", "progress", "finished"]
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/status", events[0]["dashboard"])
    assert events[0]["page"] == events[0]["dashboard"].replace("/status", "/headrace")
    assert events[-2]["bytes"] == events[-2]["total_bytes"] == events[0]["bytes"]
    assert [(target, rank) for target, rank, *_ in events[-2]["ranks"]] == [(output.name, 0), (output.name, 1)]
    assert all(done == total > 0 for _, _, done, total in events[-2]["ranks"])
    assert events[-2]["done_tasks"] == events[-2]["tasks"] == events[0]["tasks"]
    assert 0 < events[-2]["memory_bytes"] < events[-2]["memory_limit_bytes"] == 2 << 30
    assert events[-1]["bytes_written"] == events[-2]["bytes"] == values_bytes(output)
    assert events[-1]["outputs"] == [
        str(output / name) for name in ("rank0.safetensors", "rank1.safetensors", "config.json", "headrace.json")
    ]
    assert events[-1]["up_to_date"] is False
    again = process("convert", "--model_dir", model, "--output_dir", output, "--log_format", "json", "--tp_size", 2)
    assert json.loads(again.stderr)["up_to_date"] is True


def test_plain_lines_and_the_dashboard_where_there_is_no_terminal(model: Path, output: Path) -> None:
    ran = process("convert", "--model_dir", model, "--output_dir", output)
    assert ran.returncode == 0
    assert "\x1b" not in ran.stdout + ran.stderr
    first, *_, last = ran.stderr.splitlines()
    pages = r"page (http://127\.0\.0\.1:\d+)/headrace; dashboard \1/status"
    assert re.fullmatch(rf"converting {model} in \d+ tasks; {pages}(; .*)?", first)
    assert re.fullmatch(r"checking: 276\.9 KiB of 276\.9 KiB, [\d.]+ [kMG]B/s, 1 of 1 rank file", last)
    assert "rank0.safetensors" in ran.stdout
    assert str(output) in ran.stdout


@pytest.mark.parametrize("scheduler", ["threads", "synchronous"])
def test_no_dashboard_without_a_cluster(model: Path, output: Path, scheduler: str) -> None:
    ran = headrace("convert", "--model_dir", model, "--output_dir", output, "--scheduler", scheduler)
    assert ran.code == 0
    assert "dashboard http" not in ran.err


def test_a_bar_on_a_terminal(model: Path, output: Path) -> None:
    ours, theirs = pty.openpty()
    command = [*COMMAND, "convert", "--model_dir", str(model), "--output_dir", str(output)]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"} | {"NO_COLOR": ""}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as running:
        os.close(theirs)
        screen = b""
        while select.select([ours], [], [], 60)[0]:
            try:
                read = os.read(ours, 1 << 16)
            except OSError:  # Linux says so when the other end is closed
                break
            if not read:
                break
            screen += read
        assert running.wait(60) == 0
    os.close(ours)
    text = screen.decode()
    assert "\x1b[" in text
    assert "━" in text
    assert re.search(r"page http://127\.0\.0\.1:\d+/headrace\r\n.*dashboard http://127\.0\.0\.1:\d+/status", text)
    assert re.search(r"done +━+ 276\.9 of 276\.9 KiB +1 of 1 rank file", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))
    assert "rank0.safetensors" in text
