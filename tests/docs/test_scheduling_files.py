"""The examples of docs/scheduling: what they would be given to reads them, and the Slurm script does as it says."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from apscheduler.triggers.cron import CronTrigger

from pipeline.planning.job import make_job
from tests.support.commands import headrace
from tests.support.places import DOCS

FOLDER = DOCS / "scheduling"

CRON_NOW = datetime(2026, 1, 1, tzinfo=UTC)
PROGRAM = "/opt/headrace/bin/headrace"
UNITS = sorted(path.name for path in FOLDER.iterdir() if path.suffix in (".service", ".timer"))


def commands() -> list[str]:
    """Every command line of ours in the examples, from the subcommand on."""
    text = "\n".join(path.read_text() for path in sorted(FOLDER.iterdir()) if path.suffix != ".yaml")
    text = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    found = re.findall(rf"(?:{PROGRAM}|^headrace) (.+?)(?: >>.*| &)?$", text, re.MULTILINE)
    return [*found, " ".join(container()["command"][1:])]


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / "cronjob.yaml").read_text()))


def container() -> dict[str, Any]:
    (one,) = documents()[1]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    return dict(one)


def test_the_commands_are_ours() -> None:
    assert len(commands()) == 6
    for line in commands():
        name, *words = line.split()
        flags = {word for word in words if word.startswith("--")}
        text = headrace(name, "--help").out
        assert flags <= set(re.findall(r"--\w+", text)), line


def test_the_crontab() -> None:
    lines = [line for line in (FOLDER / "crontab").read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) == 2
    for line in lines:
        *fields, command = line.split(maxsplit=5)
        assert CronTrigger.from_crontab(" ".join(fields)).get_next_fire_time(None, CRON_NOW)
        assert command.startswith(f"{PROGRAM} ")  # cron's PATH knows it not
        assert "%" not in command  # which cron takes for a new line


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze on PATH")
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    for name in UNITS:
        (tmp_path / name).write_text((FOLDER / name).read_text().replace(PROGRAM, "/bin/true"))
    command = ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / name) for name in UNITS)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    ours = [line for line in ran.stderr.splitlines() if str(tmp_path) in line or "headrace" in line]
    assert not ours, ran.stderr


@pytest.mark.parametrize("name", [name for name in UNITS if name.endswith(".service")])
def test_the_services_give_up_where_it_cannot_help(name: str) -> None:
    text = (FOLDER / name).read_text()
    assert "Restart=on-failure" in text
    (codes,) = re.findall(r"RestartPreventExitStatus=(.+)", text)
    assert "2" in codes.split()
    assert "3" not in codes.split()


def test_the_cronjob_by_kubernetes_own_schema() -> None:
    schema = pytest.importorskip("kubernetes_validate", reason="no package kubernetes-validate")
    for document in documents():
        schema.validate(document, "1.30", strict=True)


def test_the_cronjob_fits_together() -> None:
    config, job = documents()
    assert [(each["apiVersion"], each["kind"]) for each in (config, job)] == [("v1", "ConfigMap"), ("batch/v1", "CronJob")]
    spec = job["spec"]
    assert CronTrigger.from_crontab(spec["schedule"], timezone=spec["timeZone"])
    assert spec["concurrencyPolicy"] == "Forbid"
    inner = spec["jobTemplate"]["spec"]
    pod = inner["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # which a pod failure policy asks for
    exits = [rule["onExitCodes"] for rule in inner["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert exits == [{"containerName": container()["name"], "operator": "In", "values": [1, 2]}]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container()["volumeMounts"]}
    assert volumes.keys() == mounts.keys()
    assert volumes["jobs"]["configMap"]["name"] == config["metadata"]["name"]
    assert mounts["jobs"] in container()["command"]
    assert container()["resources"]["requests"]["memory"] == container()["resources"]["limits"]["memory"]


def test_the_job_files_of_the_cronjob(tmp_path: Path) -> None:
    for name, text in documents()[0]["data"].items():
        (tmp_path / name).write_text(text)
        assert make_job({}, tmp_path / name).targets


class Slurm:
    """The script in a stand-in for Slurm: what it calls are scripts that write down how they were called."""

    def __init__(self, folder: Path, headrace: str) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        self._program("headrace", headrace)
        self._program("scontrol", "")
        (folder / "jobs.txt").write_text("a.toml\nb with blanks.toml\n")

    def _program(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f'#!/bin/bash\nprintf "%s\\n" "{name}" "$@" >> "{self.folder}/called"\n{text}\n')
        path.chmod(0o755)

    def start(self, **environment: str) -> subprocess.Popen[str]:
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        slurm = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "77", "SLURM_CPUS_PER_TASK": "8", "SLURM_MEM_PER_NODE": "4096"}
        command = ["bash", str(FOLDER / "slurm-array.sh"), str(self.folder / "jobs.txt")]
        return subprocess.Popen(command, env={**slurm, **environment, "PATH": path}, stderr=subprocess.PIPE, text=True)

    def run(self, **environment: str) -> int:
        with self.start(**environment) as process:
            return process.wait(30)

    @property
    def called(self) -> list[str]:
        return (self.folder / "called").read_text().splitlines()


CONVERT = ["headrace", "convert", "b with blanks.toml", "--scheduler", "threads", "--workers", "8", "--memory_limit", "3584MiB"]


@pytest.mark.parametrize("code", [0, 1, 2])
def test_slurm_does_one_line_with_what_it_grants(tmp_path: Path, code: int) -> None:
    slurm = Slurm(tmp_path, f"exit {code}")
    assert slurm.run() == code
    assert slurm.called == CONVERT


def test_slurm_queues_again_what_may_go_on(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, "exit 3")
    assert slurm.run() == 3
    assert slurm.called == [*CONVERT, "scontrol", "requeue", "77_1"]


def test_slurm_does_not_queue_again_for_ever(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, "exit 3")
    assert slurm.run(SLURM_RESTART_COUNT="5") == 3
    assert slurm.called == CONVERT


def test_slurm_hands_its_signal_on_and_waits(tmp_path: Path) -> None:
    # The stand-in ends in order: a moment after the signal, with 3.
    slurm = Slurm(
        tmp_path, f"trap 'sleep 0.3; touch {tmp_path}/ended; exit 3' TERM\ntouch {tmp_path}/ready\nwhile :; do sleep 0.05; done"
    )
    with slurm.start() as process:
        while not (tmp_path / "ready").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 3
    assert (tmp_path / "ended").exists()
    assert slurm.called == [*CONVERT, "scontrol", "requeue", "77_1"]


def test_slurm_without_a_line_for_it(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, "exit 0")
    assert slurm.run(SLURM_ARRAY_TASK_ID="2") == 2
    assert not (tmp_path / "called").exists()


def test_the_script_is_whole() -> None:
    script = FOLDER / "slurm-array.sh"
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    options = re.findall(r"^#SBATCH (--[\w-]+)", script.read_text(), re.MULTILINE)
    assert {"--requeue", "--signal", "--mem", "--cpus-per-task"} <= set(options)
    # Options after the first command would not be read.
    head = script.read_text().split("set -euo pipefail")[0]
    assert len(re.findall("#SBATCH", head)) == len(options)
    if shutil.which("shellcheck"):
        ran = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout


def test_every_example_is_named_in_the_text() -> None:
    text = (FOLDER.parent / "scheduling.md").read_text()
    for path in FOLDER.iterdir():
        assert f"scheduling/{path.name}" in text
