"""`headrace batch` from the command line, with real conversions: each source once, failures alone, and a summary that is true."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline import convert
from pipeline.planning.job import make_job
from tests.pipeline.jobs.stand_in import wait
from tests.pipeline.watching.web import fetch, free_port
from tests.support import checkpoints, quantized_checkpoints
from tests.support.commands import COMMAND, Ran, headrace
from tests.support.directories import contents


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        checkpoints.write(directory / name, checkpoints.LLAMA, seed=seed)
    return directory


def batch(*arguments: object) -> tuple[Ran, dict[str, Any]]:
    ran = headrace("batch", *arguments, "--json")
    return ran, json.loads(ran.out) if ran.out else {}


def outcomes(said: dict[str, Any]) -> dict[str, str]:
    return {job["name"]: job["outcome"] for job in said["jobs"]}


def matrix(models: Path, tmp_path: Path) -> list[str]:
    sources = ("--model_dir", models / "a", "--model_dir", models / "b")
    return [*map(str, sources), "--tp_size", "1,2,3", "--output_dir", str(tmp_path / "{model}-{tp_size}")]


@contextlib.contextmanager
def running(*arguments: object, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A batch in a process of its own."""
    command = [*COMMAND, "batch", *map(str, arguments), "--json", "--log_format", "json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    ) as started:
        try:
            yield started
        finally:
            started.kill()


def until(started: subprocess.Popen[str], event: str) -> dict[str, Any]:
    """The first event of a kind that a batch says."""
    assert started.stderr
    return next(said for said in map(json.loads, started.stderr) if said["event"] == event)


def test_a_matrix_reads_each_source_once_and_goes_on_past_what_fails(models: Path, tmp_path: Path) -> None:
    ran, said = batch(*matrix(models, tmp_path), "--summary", tmp_path / "summary.json")
    assert ran.code == 2
    assert outcomes(said) == {f"{name}-{tp}": "refused" if tp == 3 else "done" for name in "ab" for tp in (1, 2, 3)}
    assert json.loads((tmp_path / "summary.json").read_text()) == said
    assert (said["schema"], said["exit_code"], said["counts"]) == (1, 2, {"done": 4, "refused": 2})
    read = (models / "a/model.safetensors").stat().st_size
    made = [each for each in said["units"] if each["attempts"]]
    assert [each["attempts"] for each in made] == [1, 1]
    assert all(0.9 * read < each["bytes_read"] <= read for each in made), "each source was read once"
    assert {job["unit"] for job in said["jobs"]} == {each["number"] for each in said["units"]}
    for name, tp in (("a", 1), ("a", 2), ("b", 2)):
        convert(model_dir=models / name, output_dir=tmp_path / "alone", tp_size=tp, scheduler="threads", overwrite=True)
        assert contents(tmp_path / f"{name}-{tp}") == contents(tmp_path / "alone")
    # Once more: nothing is left to do, and no process is made for that.
    ran, said = batch(*matrix(models, tmp_path))
    assert (ran.code, set(outcomes(said).values())) == (2, {"up_to_date", "refused"})
    assert sum(each["attempts"] for each in said["units"]) == 0
    assert "up_to_date" in headrace("batch", *matrix(models, tmp_path)).out


def test_what_was_done_before_is_not_done_again_inside_of_a_conversion(models: Path, tmp_path: Path) -> None:
    arguments = ("--model_dir", models / "a", "--output_dir", tmp_path / "{tp_size}", "--tp_size")
    convert(model_dir=models / "a", output_dir=tmp_path / "1", scheduler="threads")
    before = (tmp_path / "1/rank0.safetensors").stat()
    ran, said = batch(*arguments, "1,2")
    assert (ran.code, outcomes(said)) == (0, {"1": "up_to_date", "2": "done"})
    assert (tmp_path / "1/rank0.safetensors").stat() == before


def test_a_dry_run_says_what_a_batch_would_do_and_does_nothing(models: Path, tmp_path: Path) -> None:
    ran, said = batch(*matrix(models, tmp_path), "--dry_run")
    assert (ran.code, said["exit_code"], said["schema"]) == (2, 2, 1)
    assert [(each["members"], each["state"]) for each in said["units"]] == [
        (["a-1", "a-2"], "to do"),
        (["a-3"], "refused"),
        (["b-1", "b-2"], "to do"),
        (["b-3"], "refused"),
    ]
    assert all((each["bytes"] > 0) == (each["state"] == "to do") for each in said["units"])
    assert list(tmp_path.iterdir()) == []
    shown = headrace("batch", *matrix(models, tmp_path), "--dry_run")
    assert (shown.code, "a (2 jobs)" in shown.out, "num_attention_heads" in shown.out) == (2, True, True)
    assert batch("--model_dir", models / "a", "--output_dir", tmp_path / "x", "--dry_run")[0].code == 0


def test_job_files_for_other_queues(models: Path, tmp_path: Path) -> None:
    jobs = tmp_path / "jobs"
    ran, said = batch(*matrix(models, tmp_path), "--write_jobs", jobs)
    assert (ran.code, len(said["units"])) == (2, 4)
    files = sorted(jobs.iterdir())
    assert [each["file"] for each in said["units"]] == [str(files[0]), None, str(files[1]), None]
    assert [file.name for file in files] == ["000-a--2-jobs-.toml", "001-b--2-jobs-.toml"]
    assert list(tmp_path.iterdir()) == [jobs], "nothing is converted"
    for file, name in zip(files, "ab", strict=True):
        assert headrace("convert", file).code == 0
        assert [target.tp_size for target in make_job({}, file).targets] == [1, 2]
        assert (tmp_path / f"{name}-2/config.json").exists()
    (tmp_path / "file").touch()
    ran, _ = batch(*matrix(models, tmp_path / "more"), "--write_jobs", tmp_path / "file")
    assert (ran.code, "--write_jobs" in ran.err) == (2, True)
    ran, _ = batch(*matrix(models, tmp_path / "more"), "--write_jobs", tmp_path / "none", "--dry_run")
    assert (ran.code, (tmp_path / "none").exists()) == (2, False)


def test_what_was_just_written_is_left_for_another_time(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    arguments = ("--model_dir", tmp_path / "model", "--output_dir", tmp_path / "out", "--settle")
    ran, said = batch(*arguments, 600)
    assert (ran.code, outcomes(said)) == (0, {"out": "unsettled"})
    assert not (tmp_path / "out").exists()
    assert batch(*arguments, 0)[1]["counts"] == {"done": 1}


def test_values_that_no_target_can_hold_refuse_their_own_job_alone(tmp_path: Path) -> None:
    tensors = checkpoints.values(quantized_checkpoints.LLAMA)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    checkpoints.save(tmp_path / "model", quantized_checkpoints.LLAMA, tensors)
    arguments = ("--model_dir", tmp_path / "model", "--quantization", "none,int8", "--output_dir", tmp_path / "{quantization}")
    ran, said = batch(*arguments)
    assert (ran.code, outcomes(said)) == (2, {"none": "done", "int8": "refused"})
    assert [each["state"] for each in said["units"]] == ["split", "done", "refused"]
    assert (tmp_path / "none/config.json").exists()
    assert not (tmp_path / "int8").exists()


def test_a_packed_source_is_unpacked_once_for_conversions_that_cannot_be_one(tmp_path: Path) -> None:
    quantized_checkpoints.write(tmp_path / "model", quantized_checkpoints.LLAMA, quantized_checkpoints.gptq())
    text = "".join(f'[[job]]\nmodel_dir = "model"\noutput_dir = "{name}"\nworkers = {name[1]}\n' for name in ("x1", "y2"))
    (tmp_path / "batch.toml").write_text(text)
    ran, said = batch(tmp_path / "batch.toml", "--max_jobs", 2)
    assert (ran.code, outcomes(said)) == (0, {"x1": "done", "y2": "done"})
    assert contents(tmp_path / "x1") == contents(tmp_path / "y2")
    first, second = said["units"]
    assert first["ended"] <= second["started"], "one after the other, as they share scratch"
    packed = (tmp_path / "model/model.safetensors").stat().st_size
    assert second["bytes_read"] < packed / 2 < first["bytes_read"]
    assert not (tmp_path / ".headrace-scratch").exists(), "and it is removed after the last"


def test_a_directory_of_jobs_with_a_broken_one(models: Path, tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    texts = {"one": f'model_dir = "{models / "a"}"\noutput_dir = "../out"\n', "two": "?", "three": 'model_dir = "m"'}
    for name, text in texts.items():
        (tmp_path / f"jobs/{name}.toml").write_text(text)
    ran, said = batch(tmp_path / "jobs")
    assert (ran.code, outcomes(said)) == (2, {"one": "done", "two": "refused", "three": "refused"})


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("jobs",), "expected job files"),
        (("none-*.toml",), "expected a pattern"),
        (
            ("--tp_size", "2"),
            "--tp_size: found no --model_dir and --output_dir beside it; expected both, as flags make a matrix\n",
        ),
        (("--model_dir", "{models}/a"), "--model_dir: found no --output_dir beside it"),
        (("--n_layer", "2"), "flags of the model's shape: found no --model_dir and --output_dir"),
        (("jobs", "--dtype", "float16"), "They do not change job files: write the options into these"),
        (("--model_dir", "m", "--output_dir", "o", "--max_memory", "much"), "--max_memory: found 'much'"),
        (("--model_dir", "{models}/a", "--output_dir", "o", "--scheduler", "here"), "--scheduler: found here"),
        (("--model_dir", "{models}/a", "--output_dir", "o", "--metrics", "/gone/x.prom"), "--metrics /gone/x.prom"),
        (
            ("--model_dir", "{models}/a", "--output_dir", "o", "--summary", "/gone/s.json"),
            "--summary /gone/s.json: found No such file",
        ),
        (("--model_dir", "{models}/a", "--output_dir", "o", "--summary", "jobs"), "--summary jobs: found Is a directory"),
        (("--model_dir", "{models}/a", "--output_dir", "o", "--listen", "8787"), "--listen: found '8787'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_with_the_batch_is_refused(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], found: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs").mkdir()
    ran = headrace("batch", *(each.replace("{models}", str(models)) for each in arguments))
    assert (ran.code, found in ran.err, "Traceback" in ran.err) == (2, True, False), ran
    assert not (tmp_path / "o").exists()


def test_a_summary_that_cannot_be_written_in_the_end_is_still_shown(models: Path, tmp_path: Path) -> None:
    ran, said = batch("--model_dir", models / "a", "--output_dir", tmp_path / "o", "--summary", "/dev/full")
    assert (ran.code, outcomes(said)) == (3, {"o": "done"})
    assert "--summary /dev/full: No space left on device" in ran.err


def test_its_page_and_its_metrics(models: Path, tmp_path: Path) -> None:
    listen = f"127.0.0.1:{free_port()}"
    hold = tmp_path / "site"
    hold.mkdir()
    (hold / "sitecustomize.py").write_text(
        f"import sys, time, pathlib\nif 'pipeline.cli.child' in sys.orig_argv:\n"
        f"    while not pathlib.Path({str(tmp_path / 'go')!r}).exists(): time.sleep(0.05)\n"
    )
    path = os.pathsep.join(filter(None, (str(hold), os.environ.get("PYTHONPATH", ""))))
    arguments = ("--model_dir", models / "a", "--output_dir", tmp_path / "out", "--listen", listen)
    with running(*arguments, "--metrics", tmp_path / "x.prom", PYTHONPATH=path) as started:
        assert f"page http://{listen}/headrace" in until(started, "page")["message"]
        until(started, "started")
        assert "<h1>headrace batch</h1>" in fetch(f"http://{listen}/headrace")[1]
        (run,) = json.loads(fetch(f"http://{listen}/api/jobs")[1])["runs"]
        assert (run["name"], run["state"]) == ("out", "running")
        assert fetch(f"http://{listen}/status")[0] == 200, "Dask's own"
        assert "headrace_queue_length 0.0" in (tmp_path / "x.prom").read_text()
        (tmp_path / "go").touch()
        started.communicate()
        assert started.returncode == 0
    families = text_string_to_metric_families((tmp_path / "x.prom").read_text())
    found = {(sample.name, tuple(sample.labels.values())): sample.value for family in families for sample in family.samples}
    assert found["headrace_jobs", ("done",)] == 1
    assert found["headrace_stage_bytes_total", ("write",)] > 0
    assert not list(tmp_path.glob(".*.new"))


def test_stopped_it_says_so_and_the_next_goes_on(models: Path, tmp_path: Path) -> None:
    with running(*matrix(models, tmp_path), "--max_jobs", 1) as started:
        until(started, "started")
        started.send_signal(signal.SIGTERM)
        out, errors = started.communicate()
    said = json.loads(out)
    assert outcomes(said)["b-1"] == "interrupted"
    assert "Traceback" not in errors
    assert (started.returncode, said["exit_code"]) == (2, 2), "what is refused is worse than what was interrupted"
    assert not list(tmp_path.rglob("*.lock*"))
    _, said = batch(*matrix(models, tmp_path))
    assert set(outcomes(said).values()) <= {"done", "up_to_date", "refused"}
    assert all((tmp_path / f"{name}-{tp}/config.json").exists() for name in "ab" for tp in (1, 2))


def test_killed_it_takes_its_conversions_with_it_and_the_next_goes_on(models: Path, tmp_path: Path) -> None:
    with running(*matrix(models, tmp_path)) as started:
        pid = int(until(started, "started")["pid"])
        started.kill()
        started.wait()
        wait(
            lambda: not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        )
    ran, said = batch(*matrix(models, tmp_path))
    assert (ran.code, said["counts"]["refused"]) == (2, 2)
    assert all((tmp_path / f"{name}-{tp}/config.json").exists() for name in "ab" for tp in (1, 2))
    assert not list(tmp_path.rglob("*.lock*"))


@pytest.mark.nightly
def test_two_batches_at_once_end_each_with_all_done(models: Path, tmp_path: Path) -> None:
    (tmp_path / "batch.toml").write_text(
        f'[retry]\nfirst_seconds = 0.2\nfactor = 1\nattempts = 50\n[[matrix]]\nmodel_dir = ["{models}/a", "{models}/b"]\n'
        'tp_size = [1, 2]\noutput_dir = "out/{model}-{tp_size}"\n'
    )
    file = tmp_path / "batch.toml"
    with running(file) as first, running(file) as second, ThreadPoolExecutor(2) as threads:
        both = [json.loads(out) for out, _ in threads.map(lambda each: each.communicate(), (first, second))]
    for said in both:
        assert said["exit_code"] == 0, said
        assert set(outcomes(said).values()) <= {"done", "up_to_date"}
    convert(model_dir=models / "b", output_dir=tmp_path / "alone", tp_size=2, scheduler="threads")
    assert contents(tmp_path / "out/b-2") == contents(tmp_path / "alone")
    assert not list((tmp_path / "out").rglob("*.lock*"))
