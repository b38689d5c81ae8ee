"""`headrace batch` from the command line, with real conversions: each source once, failures alone, and a summary that is true."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline import convert
from pipeline.jobs.store import open_store
from tests.support import checkpoints, quantized_checkpoints
from tests.support.commands import COMMAND, Ran, headrace
from tests.support.directories import contents


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        checkpoints.write(directory / name, checkpoints.LLAMA, seed=seed)
    return directory


def batch(tmp_path: Path, *arguments: object) -> tuple[Ran, dict[str, Any]]:
    ran = headrace("batch", *arguments, "--store", tmp_path / "jobs.db", "--json")
    return ran, json.loads(ran.out) if ran.out else {}


def outcomes(said: dict[str, Any]) -> dict[str, str]:
    return {job["name"]: job["outcome"] for job in said["jobs"]}


def matrix(models: Path, tmp_path: Path) -> tuple[object, ...]:
    return (
        "--model_dir",
        models / "a",
        "--model_dir",
        models / "b",
        "--tp_size",
        "1,2,3",
        "--output_dir",
        tmp_path / "{model}-{tp_size}",
    )


def test_a_matrix_reads_each_source_once_and_goes_on_past_what_fails(models: Path, tmp_path: Path) -> None:
    ran, said = batch(tmp_path, *matrix(models, tmp_path), "--summary", tmp_path / "summary.json")
    assert ran.code == 2
    assert outcomes(said) == {f"{name}-{tp}": "refused" if tp == 3 else "done" for name in "ab" for tp in (1, 2, 3)}
    assert json.loads((tmp_path / "summary.json").read_text()) == said
    assert said["counts"] == {"done": 4, "refused": 2}
    read = (models / "a/model.safetensors").stat().st_size
    made = [each for each in said["conversions"] if each["attempts"]]
    assert [each["attempts"] for each in made] == [1, 1]
    assert all(0.9 * read < each["bytes_read"] <= read for each in made), "each source was read once"
    for name, tp in (("a", 1), ("a", 2), ("b", 2)):
        convert(model_dir=models / name, output_dir=tmp_path / "alone", tp_size=tp, scheduler="threads", overwrite=True)
        assert contents(tmp_path / f"{name}-{tp}") == contents(tmp_path / "alone")
    # Once more: nothing is left to do, and no process is made for that.
    ran, said = batch(tmp_path, *matrix(models, tmp_path))
    assert ran.code == 2
    assert set(outcomes(said).values()) == {"up_to_date", "refused"}
    assert sum(each["attempts"] for each in said["conversions"]) == 0


def test_what_was_done_before_is_not_done_again_inside_of_a_conversion(models: Path, tmp_path: Path) -> None:
    batch(tmp_path, "--model_dir", models / "a", "--tp_size", "1", "--output_dir", tmp_path / "{tp_size}")
    before = (tmp_path / "1/rank0.safetensors").stat()
    ran, said = batch(tmp_path, "--model_dir", models / "a", "--tp_size", "1,2", "--output_dir", tmp_path / "{tp_size}")
    assert (ran.code, outcomes(said)) == (0, {"1": "up_to_date", "2": "done"})
    assert (tmp_path / "1/rank0.safetensors").stat() == before


def test_a_dry_run_does_nothing(models: Path, tmp_path: Path) -> None:
    ran, said = batch(tmp_path, *matrix(models, tmp_path), "--dry_run")
    assert ran.code == 0
    assert [(each["jobs"], each["state"]) for each in said] == [  # type: ignore[index]
        (["a-1", "a-2"], "to do"),
        (["a-3"], "refused"),
        (["b-1", "b-2"], "to do"),
        (["b-3"], "refused"),
    ]
    assert list(tmp_path.iterdir()) == []
    shown = headrace("batch", *matrix(models, tmp_path), "--dry_run").out
    assert "a (2 jobs)" in shown


def test_values_that_no_target_can_hold_refuse_their_own_job_alone(tmp_path: Path) -> None:
    tensors = checkpoints.values(quantized_checkpoints.LLAMA)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    checkpoints.save(tmp_path / "model", quantized_checkpoints.LLAMA, tensors)
    arguments = ("--model_dir", tmp_path / "model", "--quantization", "none,int8", "--output_dir", tmp_path / "{quantization}")
    ran, said = batch(tmp_path, *arguments)
    assert (ran.code, outcomes(said)) == (2, {"none": "done", "int8": "refused"})
    assert [each["outcome"] for each in said["conversions"]] == ["split", "done", "refused"]
    assert (tmp_path / "none/config.json").exists()
    assert not (tmp_path / "int8").exists()


def test_a_packed_source_is_unpacked_once_for_conversions_that_cannot_be_one(tmp_path: Path) -> None:
    quantized_checkpoints.write(tmp_path / "model", quantized_checkpoints.LLAMA, quantized_checkpoints.gptq())
    text = "".join(
        f'[[job]]\nmodel_dir = "model"\noutput_dir = "{name}"\nsync = {sync}\n' for name, sync in (("x", "true"), ("y", "false"))
    )
    (tmp_path / "batch.toml").write_text(text)
    ran, said = batch(tmp_path, tmp_path / "batch.toml", "--max_jobs", 2)
    assert (ran.code, outcomes(said)) == (0, {"x": "done", "y": "done"})
    assert contents(tmp_path / "x") == contents(tmp_path / "y")
    store = open_store(tmp_path / "jobs.db")
    first, second = (store.attempts(each["run"])[0] for each in said["conversions"])
    assert first.ended
    assert first.ended <= second.started, "one after the other, as they share scratch"
    assert ("unpack" in first.by_stage, "unpack" in second.by_stage) == (True, False)
    assert not (tmp_path / ".headrace-scratch").exists(), "and it is removed after the last"


def test_a_directory_of_jobs_with_a_broken_one(models: Path, tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    for name, text in (
        ("one", f'model_dir = "{models / "a"}"\noutput_dir = "../out"\n'),
        ("two", "?"),
        ("three", 'model_dir = "m"'),
    ):
        (tmp_path / f"jobs/{name}.toml").write_text(text)
    ran, said = batch(tmp_path, tmp_path / "jobs")
    assert (ran.code, outcomes(said)) == (2, {"one": "done", "two": "refused", "three": "refused"})


def test_nothing_asked_for_is_refused(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    for arguments in ((tmp_path / "jobs",), (tmp_path / "none-*.toml",), ("--tp_size", "2")):
        ran, _ = batch(tmp_path, *arguments)
        assert ran.code == 2, ran
        assert "Traceback" not in ran.err


def test_jobs_are_listed_shown_cancelled_and_retried(models: Path, tmp_path: Path) -> None:
    batch(tmp_path, "--model_dir", models / "a", "--tp_size", "1,3", "--output_dir", tmp_path / "{tp_size}")
    store = ("--store", tmp_path / "jobs.db")
    rows = json.loads(headrace("jobs", *store, "--json").out)
    assert {row["name"]: row["state"] for row in rows} == {"1": "done", "3": "refused"}
    assert [row["name"] for row in json.loads(headrace("jobs", *store, "--state", "done", "--json").out)] == ["1"]
    assert "one of queued" in headrace("jobs", *store, "--state", "happy").err
    number = next(row["id"] for row in rows if row["name"] == "1")
    shown = json.loads(headrace("jobs", "show", number, *store, "--json").out)
    assert shown["runs"][0]["attempt_list"][0]["outcome"] == "done"
    for words in (("jobs", *store), ("jobs", "show", number, *store), ("jobs", *store, "show", number)):
        ran = headrace(*words)
        assert ran.code == 0
        assert "done" in ran.out
    assert "it ended: done" in headrace("jobs", "cancel", number, *store).err
    assert json.loads(headrace("jobs", "retry", number, *store, "--json").out)["state"] == "queued"
    assert "it is queued" in headrace("jobs", "retry", number, *store).err
    assert json.loads(headrace("jobs", "cancel", number, *store, "--json").out)["state"] == "cancelled"
    assert headrace("jobs", "show", 99, *store).code == 2


def test_stopped_it_says_so_and_the_next_goes_on(models: Path, tmp_path: Path) -> None:
    arguments = [*map(str, matrix(models, tmp_path)), "--store", str(tmp_path / "jobs.db"), "--json"]
    with subprocess.Popen([*COMMAND, "batch", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr
        next(line for line in running.stderr if "started" in line)
        running.send_signal(signal.SIGTERM)
        out, _ = running.communicate()
    said = json.loads(out)
    assert outcomes(said)["b-1"] == "interrupted"
    # What is refused is worse than what was interrupted.
    assert running.returncode == 2
    _, said = batch(tmp_path, *matrix(models, tmp_path))
    assert set(outcomes(said).values()) <= {"done", "up_to_date", "refused"}
    assert all((tmp_path / f"{name}-{tp}/config.json").exists() for name in "ab" for tp in (1, 2))


def test_two_batches_at_once_do_each_job_once(models: Path, tmp_path: Path) -> None:
    arguments = [*map(str, matrix(models, tmp_path)), "--store", str(tmp_path / "jobs.db"), "--json"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    both = [subprocess.Popen([*COMMAND, "batch", *arguments], stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    said = [json.loads(each.communicate()[0]) for each in both]
    for name in ("a-1", "a-2", "b-1", "b-2"):
        assert sorted(outcomes(each)[name] for each in said) in (
            ["done", "up_to_date"],
            ["up_to_date", "up_to_date"],
            ["done", "done"],
        )
    store = open_store(tmp_path / "jobs.db")
    attempts = [attempt for run in store.runs() for attempt in store.attempts(run.id)]
    written = [attempt for attempt in attempts if attempt.bytes_written]
    assert len(written) == 2, "one of the two wrote, the other found it done"


def test_a_batch_in_a_thread_is_stopped_by_its_event(models: Path, tmp_path: Path) -> None:
    from pipeline.jobs.batch import Batch
    from pipeline.jobs.events import Hub
    from pipeline.jobs.limits import Limits
    from pipeline.jobs.requests import of_matrix
    from pipeline.jobs.units import make_units

    units = make_units(of_matrix({"model_dir": str(models / "a"), "output_dir": str(tmp_path / "x")}, tmp_path, "test"))
    stop, store = threading.Event(), open_store(tmp_path / "jobs.db", time.time)
    stop.set()
    result = Batch(store, Hub(), units, Limits(1, 1 << 40)).run(stop)
    assert [(entry.outcome, entry.exit_code) for entry in result.jobs] == [("interrupted", 3)]
    assert result.exit_code == 3
    assert store.workers()[0].ended


def test_a_store_that_is_not_there_is_not_made_to_be_looked_at(tmp_path: Path) -> None:
    for words in (("jobs",), ("jobs", "show", 1), ("gc",)):
        ran = headrace(*words, "--store", tmp_path / "gone.db")
        assert (ran.code, "no such file" in ran.err) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_batch_was_at_is_not_said_to_run(models: Path, tmp_path: Path) -> None:
    arguments = [*map(str, matrix(models, tmp_path)), "--store", str(tmp_path / "jobs.db")]
    with subprocess.Popen([*COMMAND, "batch", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr
        next(line for line in running.stderr if "started" in line)
        running.kill()
    rows = json.loads(headrace("jobs", "--store", tmp_path / "jobs.db", "--json").out)
    assert {row["name"]: row["state"] for row in rows if row["state"] != "refused"} == {
        "a (2 jobs)": "interrupted",
        "b (2 jobs)": "interrupted",
    }
