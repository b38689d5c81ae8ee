"""Dask's own report of a run, kept as a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import checkpoints
from tests.support.commands import headrace, one, refused
from tests.support.directories import contents


@pytest.fixture
def model(tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    return tmp_path / "model"


def test_the_report_is_kept_and_whole(model: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    with_it, without = tmp_path / "with", tmp_path / "without"
    ran = headrace("convert", "--model_dir", model, "--output_dir", with_it, "--performance_report", report)
    assert ran.code == 0, ran
    text = report.read_text()
    assert "Dask Performance Report" in text
    assert "write" in text  # the tasks' prefix, in the task stream
    assert '<script src="https://' not in text.lower()
    assert headrace("convert", "--model_dir", model, "--output_dir", without, "--scheduler", "threads").code == 0
    assert contents(with_it) == contents(without)


@pytest.mark.parametrize("scheduler", ["threads", "synchronous"])
def test_a_scheduler_without_a_cluster_has_none(model: Path, tmp_path: Path, scheduler: str) -> None:
    problem = one(refused(model, "--performance_report", tmp_path / "report.html", "--scheduler", scheduler))
    assert problem.startswith(f"--performance_report {tmp_path / 'report.html'}: found --scheduler {scheduler}")
    assert "expected a cluster" in problem


@pytest.mark.parametrize("path", ["no/such/report.html", "model", "out/report.html"])
def test_a_place_that_cannot_be_is_refused(model: Path, tmp_path: Path, path: str) -> None:
    (tmp_path / "out").mkdir()
    problem = one(refused(model, "--performance_report", tmp_path / path, "--scheduler", "local"))
    assert problem.startswith(f"--performance_report {tmp_path / path}: found")


@pytest.mark.usefixtures("model")
def test_a_job_files_report_is_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job.toml").write_text('model_dir = "model"\noutput_dir = "out"\nperformance_report = "report.html"\n')
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert headrace("convert", tmp_path / "job.toml", "--quiet").code == 0
    assert (tmp_path / "report.html").exists()


@pytest.mark.usefixtures("model")
def test_a_job_of_a_batch_that_wants_a_report_gets_a_cluster(tmp_path: Path) -> None:
    for name, report in (("with", 'performance_report = "report.html"\n'), ("without", "")):
        (tmp_path / f"{name}.toml").write_text(f'model_dir = "model"\noutput_dir = "ranks/{name}"\n{report}')
    names = [tmp_path / "with.toml", tmp_path / "without.toml"]
    ran = headrace("batch", *names, "--dry_run", "--json")
    assert ran.code == 0, ran
    options = {each["name"]: each["options"] for each in json.loads(ran.out)["units"]}
    assert "scheduler" not in options["with"]  # the default one
    assert options["without"]["scheduler"] == "threads"
