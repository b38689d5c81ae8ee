"""Two machines on one shared directory, played by namespaces with a host's name and a boot's id of their own."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import uuid
from pathlib import Path

import pytest

from pipeline import convert
from tests.support import checkpoints
from tests.support.commands import COMMAND
from tests.support.directories import contents
from tests.support.witness import Witness, wait

SECONDS = 60.0


class Machine:
    """A machine: its name, and its boot until `reboot`."""

    def __init__(self, name: str, place: Path, witness: Witness) -> None:
        self.name, self.file, self.witness = name, place / f"boot-{name}", witness
        self.reboot()

    def reboot(self) -> None:
        self.file.write_text(f"{uuid.uuid4()}\n")

    def start(self, *words: object) -> subprocess.Popen[str]:
        run = shlex.join([*COMMAND, *map(str, words)])
        shell = f"hostname {self.name} && mount --bind {shlex.quote(str(self.file))} /proc/sys/kernel/random/boot_id && exec {run}"
        user = ["--map-root-user"] if os.geteuid() else []
        pipe, environment = subprocess.PIPE, self.witness.environment
        command = ["unshare", "--mount", "--uts", *user, "sh", "-c", shell]
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)

    def run(self, *words: object) -> tuple[int, str]:
        """The exit code of a command, and all that it printed."""
        process = self.start(*words)
        out, err = process.communicate(timeout=SECONDS)
        return process.returncode, out + err


@pytest.fixture
def witness(tmp_path: Path) -> Witness:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    (tmp_path / "job.toml").write_text('model_dir = "model"\noutput_dir = "out"\nscheduler = "threads"\n')
    return Witness(tmp_path)


@pytest.fixture
def machines(tmp_path: Path, witness: Witness) -> tuple[Machine, Machine]:
    alpha, beta = (Machine(name, tmp_path, witness) for name in ("alpha", "beta"))
    code, said = alpha.run("--version")
    if code:
        pytest.skip(f"no namespaces here: {said.strip()[-200:]}")
    return alpha, beta


def convert_words(place: Path) -> tuple[object, ...]:
    return ("convert", place / "job.toml", "--log_format", "text")


def test_another_machines_conversion_is_never_guessed_to_be_gone(
    tmp_path: Path, witness: Witness, machines: tuple[Machine, Machine]
) -> None:
    alpha, beta = machines
    witness.hold("middle-out")
    at_work = alpha.start(*convert_words(tmp_path))
    wait(lambda: witness.pids("middle", "out"), SECONDS, witness.log)
    (pid,) = witness.pids("middle", "out")
    for killed in (False, True):
        if killed:  # which beta cannot see
            os.kill(pid, 9)
            at_work.communicate()
        code, said = beta.run(*convert_words(tmp_path))
        assert code == 2
        assert f"another job at work on it, process {pid} on alpha" in said
        assert f"run headrace unlock {tmp_path / 'out'}" in said
    witness.let("middle-out")
    code, said = alpha.run("unlock", tmp_path / "nowhere")
    assert (code, "no such directory" in said) == (2, True)
    code, said = beta.run("unlock", tmp_path / "out")
    assert (code, f"released, it was held by process {pid} on alpha" in said) == (0, True)
    code, said = beta.run(*convert_words(tmp_path))
    assert code == 0, said
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "alone", scheduler="threads")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "headrace.json", "rank0.safetensors"}


@pytest.mark.parametrize("rebooted", [False, True])
def test_a_machine_knows_its_own_processes_to_be_gone(
    tmp_path: Path, witness: Witness, machines: tuple[Machine, Machine], rebooted: bool
) -> None:
    alpha, _ = machines
    witness.hold("middle-out")
    at_work = alpha.start(*convert_words(tmp_path))
    wait(lambda: witness.pids("middle", "out"), SECONDS, witness.log)
    code, said = alpha.run("unlock", tmp_path / "out")
    assert (code, "of this machine at work on it" in said) == (2, True)
    (pid,) = witness.pids("middle", "out")
    os.kill(pid, 9)
    at_work.communicate()
    witness.let("middle-out")
    if rebooted:
        alpha.reboot()
    code, said = alpha.run(*convert_words(tmp_path))
    assert code == 0, said


def test_batches_of_two_machines_do_each_job_once(tmp_path: Path, machines: tuple[Machine, Machine]) -> None:
    text = '[retry]\nattempts = 40\nfirst_seconds = 0.3\nfactor = 1\n[[matrix]]\nmodel_dir = "model"\nsync = [true, false]\n'
    (tmp_path / "batch.toml").write_text(text + 'memory_limit = ["1GiB", "2GiB"]\noutput_dir = "o-{sync}-{memory_limit}"\n')
    started = [machine.start("batch", tmp_path / "batch.toml", "--max_jobs", 2, "--json") for machine in machines]
    ended = [(process.communicate(timeout=SECONDS), process.returncode) for process in started]
    assert [code for _, code in ended] == [0, 0], ended
    said = [json.loads(out)["jobs"] for (out, _), _ in ended]
    for both in zip(*said, strict=True):
        assert sorted(job["outcome"] for job in both) in (["done", "up_to_date"], ["up_to_date", "up_to_date"]), "each once"
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "alone", scheduler="threads")
    for output in tmp_path.glob("o-*"):
        assert contents(output) == contents(tmp_path / "alone")
    assert len(list(tmp_path.glob("o-*"))) == 4


@pytest.mark.nightly
def test_a_second_machine_on_a_daemons_history_harms_nothing(
    tmp_path: Path, witness: Witness, machines: tuple[Machine, Machine]
) -> None:
    alpha, beta = machines
    (tmp_path / "schedule.toml").write_text('[[interval]]\nname = "i"\nevery_seconds = 3600\nfiles = ["job.toml"]\n')
    witness.hold("out")
    store = ("--store", tmp_path / "history.db")
    daemon = alpha.start("serve", tmp_path / "schedule.toml", *store)
    wait(lambda: witness.pids("work", "out"), SECONDS, witness.log)
    code, said = beta.run("serve", tmp_path / "schedule.toml", *store)
    assert (code, f"process {daemon.pid} on alpha" in said) == (2, True), said
    code, said = beta.run("jobs", *store, "--json")
    assert [(row["name"], row["state"]) for row in json.loads(said)] == [("job", "running")]
    witness.let("out")
    wait(lambda: (tmp_path / "out/config.json").exists(), SECONDS, witness.log)
    wait(lambda: json.loads(beta.run("jobs", *store, "--json")[1])[0]["state"] == "done", SECONDS)
    daemon.terminate()
    assert daemon.wait() == 0
    # Killed, it is not guessed to be gone by another machine.
    daemon = alpha.start("serve", tmp_path / "schedule.toml", *store)
    wait(lambda: (tmp_path / "history.db.serve.lock").is_symlink(), SECONDS)
    daemon.kill()
    daemon.communicate()
    code, said = beta.run("serve", tmp_path / "schedule.toml", *store)
    assert (code, "on alpha" in said) == (2, True), said
