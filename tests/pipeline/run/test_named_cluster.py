"""Clusters that a [cluster] table names: started for a job, closed after it, and refused by name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import convert
from pipeline.errors import BadInput
from pipeline.jobs.requests import gather
from pipeline.jobs.schedule import read_schedule
from pipeline.planning.job import make_job
from pipeline.run import named_cluster
from tests.support import checkpoints
from tests.support.commands import headrace
from tests.support.directories import contents
from tests.support.witness import wait


@pytest.fixture
def job(tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    return tmp_path / "job.toml"


def write(job: Path, cluster: str) -> Path:
    job.write_text(f'model_dir = "model"\noutput_dir = "out"\ntp_size = 2\n[cluster]\n{cluster}\n')
    return job


def test_a_job_runs_on_the_cluster_that_it_names(tmp_path: Path, job: Path) -> None:
    local = 'class = "distributed.LocalCluster"\nworkers = 2\nthreads_per_worker = 1\nprocesses = true\ndashboard_address = ":0"'
    ran = headrace("convert", write(job, local))
    assert ran.code == 0, ran.err
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "alone", tp_size=2, scheduler="threads")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_all_workers_that_are_asked_for_are_waited_for_and_none_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"class": "distributed.LocalCluster", "n_workers": 0, "processes": False, "dashboard_address": ":0"}
    with named_cluster.named_cluster({**table, "workers": 3}) as client:
        assert len(client.scheduler_info()["workers"]) == 3
    monkeypatch.setattr(named_cluster, "OTHERS_SECONDS", 0.1)
    monkeypatch.setattr("distributed.LocalCluster.scale", lambda *_: None)
    with named_cluster.named_cluster({**table, "n_workers": 1, "workers": 3}) as client:
        assert len(client.scheduler_info()["workers"]) == 1


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ('class = "dask_none.SLURMCluster"', "No module named 'dask_none'"),
        ('class = "pathlib.Path"', "which is no cluster of Dask's"),
        ('class = "LocalCluster"', "a class that can be imported"),
        ('class = "distributed.LocalCluster"\ncolour = 3', "cluster.class distributed.LocalCluster"),
    ],
)
def test_what_is_no_cluster_is_refused(job: Path, table: str, said: str) -> None:
    ran = headrace("convert", write(job, table))
    assert ran.code == 2
    assert said in ran.err
    assert not (job.parent / "out").exists()


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"workers": 2}, "no class"),
        ({"class": 3}, "the name of a class"),
        ({"class": "distributed.LocalCluster", "workers": 0}, "a number of workers"),
        ({"class": "distributed.LocalCluster", "tls": {"colour": "red"}}, "a table of ca_file, cert, key"),
    ],
)
def test_a_wrong_table_is_refused_while_planning(table: dict[str, object], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        make_job({"model_dir": "/m", "output_dir": "/o", "cluster": table})
    with pytest.raises(BadInput, match="one or the other"):
        make_job({"model_dir": "/m", "output_dir": "/o", "scheduler": "threads", "cluster": {"class": "distributed.LocalCluster"}})


def test_the_files_of_tls_are_relative_to_the_job_file(job: Path) -> None:
    made = make_job({}, write(job, 'class = "distributed.LocalCluster"\ntls = { ca_file = "ca.pem" }'))
    assert made.cluster
    assert made.cluster["tls"]["ca_file"] == str(job.parent / "ca.pem")


def test_the_table_of_a_batch_and_of_a_schedule_is_checked_as_that_of_a_job(tmp_path: Path) -> None:
    batch, schedule = tmp_path / "batch.toml", tmp_path / "schedule.toml"
    for table, said in (("workers = 2", "no class"), ('class = "distributed.LocalCluster"', "one or the other")):
        text = f"scheduler = 'tcp://127.0.0.1:1'\n[cluster]\n{table}\n"
        batch.write_text(f"files = []\n{text}")
        ran = headrace("batch", batch, "--dry_run")
        assert (ran.code, said in ran.err) == (2, True), ran
        schedule.write_text(text)
        with pytest.raises(BadInput, match=rf"schedule.toml: cluster.*{said}"):
            read_schedule(schedule)
    certificates = "scheduler = 'tls://127.0.0.1:1'\n[cluster]\ntls = { ca_file = 'ca.pem' }\n"
    batch.write_text(f"files = []\n{certificates}")
    schedule.write_text(certificates)
    for made in (gather([str(batch)], tmp_path).settings, read_schedule(schedule)):
        assert made.cluster == {"tls": {"ca_file": str(tmp_path / "ca.pem")}}, "relative to the file"


def test_a_batch_runs_on_the_cluster_that_its_file_names(tmp_path: Path, job: Path) -> None:
    write(job, "")
    job.write_text('model_dir = "model"\noutput_dir = "out"\n')
    batch = tmp_path / "batch.toml"
    local = 'class = "distributed.LocalCluster"\nn_workers = 2\nprocesses = true\ndashboard_address = ":0"\n'
    batch.write_text(f'files = ["job.toml"]\n[cluster]\n{local}resources = {{ MEMORY = 1e10 }}\n')
    ran = headrace("batch", batch)
    assert (ran.code, "1 done" in ran.out) == (0, True), ran.err
    batch.write_text(f'files = ["job.toml"]\n[cluster]\n{local}')
    job.write_text('model_dir = "model"\noutput_dir = "out2"\n')
    ran = headrace("batch", batch)
    assert (ran.code, "no worker that offers MEMORY" in ran.out) == (2, True), ran


def test_a_job_of_a_batch_runs_on_the_cluster_that_it_names(tmp_path: Path, job: Path) -> None:
    write(job, 'class = "distributed.LocalCluster"\nn_workers = 1\nprocesses = true\ndashboard_address = ":0"')
    other = tmp_path / "other.toml"
    other.write_text('model_dir = "model"\noutput_dir = "other"\ntp_size = 2\n')
    ran = headrace("batch", job, other, "--json")
    assert ran.code == 0, ran
    assert [(unit["state"], len(unit["outputs"])) for unit in json.loads(ran.out)["units"]] == [("done", 1)] * 2
    assert contents(tmp_path / "out") == contents(tmp_path / "other")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make certificates")
def test_a_cluster_behind_tls_by_the_files_of_the_job(tmp_path: Path, job: Path) -> None:
    pair = ("-keyout", "key.pem", "-out", "cert.pem")
    subject = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *pair, *subject]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    tls = [f"--tls-ca-file={tmp_path}/cert.pem", f"--tls-cert={tmp_path}/cert.pem", f"--tls-key={tmp_path}/key.pem"]
    file = tmp_path / "scheduler.json"
    place = ["--scheduler-file", str(file), "--no-dashboard"]
    started = []
    try:
        for module, more in (
            ("dask_scheduler", ["--protocol", "tls", "--host", "127.0.0.1", "--port", "0"]),
            ("dask_worker", ["--no-nanny", "--local-directory", str(tmp_path / "dask")]),
        ):
            started.append(subprocess.Popen([sys.executable, "-m", f"distributed.cli.{module}", *place, *more, *tls]))
            wait(file.exists, 30)
        address = json.loads(file.read_text())["address"]
        assert address.startswith("tls://")
        files = 'ca_file = "cert.pem"\ncert = "cert.pem"\nkey = "key.pem"'
        job.write_text(f'model_dir = "model"\noutput_dir = "out"\nscheduler = "{address}"\n[cluster.tls]\n{files}\n')
        ran = headrace("convert", job)
        assert ran.code == 0, ran.err
        convert(model_dir=tmp_path / "model", output_dir=tmp_path / "alone", scheduler="threads")
        assert contents(tmp_path / "out") == contents(tmp_path / "alone")
        # Without the certificates nobody is let in.
        job.write_text(f'model_dir = "model"\noutput_dir = "other"\nscheduler = "{address}"\n')
        assert headrace("convert", job).code == 2
    finally:
        for each in started:
            each.kill()
            each.wait()
