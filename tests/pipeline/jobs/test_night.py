"""A night: twelve jobs over three sources, and everything that goes wrong in one. What can end ends, once, with the right bytes."""

from __future__ import annotations

import itertools
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline import convert
from pipeline.jobs.history import History
from pipeline.jobs.runs import ACTIVE
from tests.support import checkpoints
from tests.support.commands import COMMAND
from tests.support.directories import contents
from tests.support.witness import Witness, gone, wait

BATCH = """
[defaults]
model_dir = "b"
[[matrix]]
model_dir = "a"
tp_size = [1, 2, 4, 3]                  # one of them cannot be
output_dir = "{out}/a-{{tp_size}}"
[[matrix]]
memory_limit = ["1GiB", "2GiB", "3GiB"] # so that they cannot be one
output_dir = "{out}/b-{{memory_limit}}"
[[job]]
output_dir = "{out}/b-odd"
colour = "red"
[[job]]
model_dir = "c"
output_dir = "{out}/victim"
sync = true
[[job]]
model_dir = "c"
output_dir = "{disk}/full"
memory_limit = "1GiB"
[[matrix]]
model_dir = "c"
dtype = ["float16", "float32"]
output_dir = "{out}/c-{{dtype}}"
"""
SCHEDULE = """
max_jobs = 2
[http]
listen = "127.0.0.1:{port}"
[retry]
attempts = 3
first_seconds = 0.5
[[interval]]
name = "night"
every_seconds = 86_400
files = ["batch.toml"]
"""
WAIT_SECONDS = 110.0
# The directory of each job that can end, with its source and its options.
GOOD = {f"a-{tp}": ("a", {"tp_size": tp}) for tp in (1, 2, 4)}
GOOD |= {f"b-{limit}": ("b", {}) for limit in ("1GiB", "2GiB", "3GiB")}
GOOD |= {"victim": ("c", {})} | {f"c-{dtype}": ("c", {"dtype": dtype}) for dtype in ("float16", "float32")}


class Night:
    """The place of it, and the daemons that come and go."""

    def __init__(self, place: Path) -> None:
        self.place, self.witness = place, Witness(place)
        for seed, name in enumerate("abc"):
            checkpoints.write(place / name, checkpoints.LLAMA, seed=seed)
        (place / "disk").mkdir()
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.port = server.getsockname()[1]
        (place / "batch.toml").write_text(BATCH.format(out=place / "out", disk=place / "disk"))
        (place / "schedule.toml").write_text(SCHEDULE.format(port=self.port))

    def daemon(self) -> subprocess.Popen[bytes]:
        """A daemon that sees a small disk at `disk`."""
        run = shlex.join([*COMMAND, "serve", str(self.place / "schedule.toml"), "--store", str(self.place / "history.db")])
        disk = shlex.quote(str(self.place / "disk"))
        user = ["--map-root-user"] if os.geteuid() else []
        shell = f"mount -t tmpfs -o size=64k tmpfs {disk} && exec {run}"
        command = ["unshare", "--mount", *user, "sh", "-c", shell]
        return subprocess.Popen(command, env=self.witness.environment, stderr=sys.stderr)

    def runs(self) -> list[dict[str, Any]]:
        history = History(self.place / "history.db")
        try:
            return history.runs()
        finally:
            history.close()

    def run(self, name: str) -> dict[str, Any]:
        """The last run that writes a directory."""
        return next(run for run in self.runs() if any(Path(output).name == name for output in run["outputs"]))

    def wait(self, until: Any) -> None:
        wait(until, WAIT_SECONDS, lambda: (self.witness.log(), [(run["name"], run["state"], run["error"]) for run in self.runs()]))


@pytest.mark.nightly
def test_a_night(tmp_path: Path) -> None:
    night = Night(tmp_path)
    witness = night.witness
    witness.hold("victim", "b-2GiB")
    first = night.daemon()
    # One conversion is killed in the middle.
    night.wait(lambda: witness.pids("work", "victim"))
    (victim,) = witness.pids("work", "victim")
    witness.let("victim")
    os.kill(victim, signal.SIGKILL)
    # So is the daemon, in the middle of another that would work for long, and another daemon starts at once.
    night.wait(lambda: Counter(run["state"] for run in night.runs())["done"] >= 3 and witness.pids("work", "b-2GiB"))
    (held,) = witness.pids("work", "b-2GiB")
    first.kill()
    first.wait()
    wait(lambda: gone(held), 5)
    witness.let("b-2GiB")
    second = night.daemon()
    night.wait(lambda: len(witness.pids("work", "b-2GiB")) == 2)
    night.wait(lambda: not [run for run in night.runs() if run["state"] in ACTIVE])
    second.terminate()
    assert second.wait() == 0

    # What can end has ended, with the right bytes.
    for name, (source, options) in GOOD.items():
        alone = tmp_path / "alone" / name
        convert(model_dir=tmp_path / source, output_dir=alone, scheduler="threads", **options)
        assert contents(tmp_path / "out" / name) == contents(alone), name
    assert not list(tmp_path.rglob("*.partial"))
    assert not list(tmp_path.rglob("headrace*.lock"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(GOOD)

    # Once: by the processes' own word no two wrote one directory at a time, and none outlives the daemons.
    assert [word for word in witness.log() if word[0] == "overlap"] == []
    assert len(witness.pids("work", "victim")) == len(witness.pids("work", "b-2GiB")) == 2
    assert all(gone(int(word[1])) for word in witness.log())
    for name in set(GOOD) - {"victim", "b-2GiB"}:
        assert 1 <= len(witness.pids("work", name)) <= 2, "what is done is not done again, but for what the daemon was at"

    # The history tells the truth.
    runs = night.runs()
    victim_runs = [run for run in runs if any(Path(output).name == "victim" for output in run["outputs"])]
    assert victim_runs[0]["state"] in ("done", "up_to_date")
    assert sum(run["attempts"] for run in victim_runs) >= 2
    last = {tuple(run["outputs"]) or run["name"]: run for run in reversed(runs)}
    states = Counter(run["state"] for run in last.values())
    assert (states["done"] + states["up_to_date"], states["refused"], len(last)) == (6, 3, 9)
    assert "num_attention_heads 8" in night.run("a-3")["error"]
    (odd,) = (run for run in runs if run["name"] == "b-odd")
    assert "job.0.colour: found an option that headrace does not have" in odd["error"]
    full = night.run("full")
    assert " free; expected room for " in full["error"]
    assert all(before["number"] > after["number"] for before, after in itertools.pairwise(runs))
