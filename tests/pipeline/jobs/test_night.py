"""A night: twelve jobs over three sources, and everything that goes wrong in one. What can end ends, once, with the right bytes."""

from __future__ import annotations

import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from pipeline import convert
from pipeline.jobs import process
from pipeline.jobs.rows import ACTIVE, RunRow
from pipeline.jobs.store import JobStore, open_store
from tests.support import checkpoints
from tests.support.commands import COMMAND
from tests.support.directories import contents

# Runs in every conversion before anything else: it holds a lock for each directory that is written, until the process is gone, and
# says so in a log that is only added to. Where another process holds one, two are at work at the same time.
WITNESS = """
import fcntl, os, sys, time, tomllib
if "pipeline.cli.child" in sys.orig_argv:
    folder = os.environ["NIGHT"]
    with open(sys.orig_argv[-3], "rb") as file:
        job = tomllib.load(file)
    log = os.open(f"{folder}/log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for target in job.get("target", [job]):
        output = target["output_dir"]
        held = os.open(f"{folder}/{output.replace('/', '_')}.lock", os.O_WRONLY | os.O_CREAT)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.write(log, f"overlap {os.getpid()} {output}\\n".encode())
    os.write(log, f"start {os.getpid()} {job.get('output_dir', 'merged')}\\n".encode())

    class Slow:
        # Once it has been told to go, and is about to work. Some work long, the first time.
        def find_spec(self, name, path=None, target=None):
            if name == "pipeline.planning.make_plan":
                once = f"{folder}/{next((word for word in ('victim', 'b-2GiB') if word in str(job)), '')}.begun"
                seconds = 0.3 if os.path.exists(once) or once.endswith("/.begun") else 20
                open(once, "w").close()
                os.write(log, f"work {os.getpid()} {job.get('output_dir', 'merged')}\\n".encode())
                time.sleep(seconds)

    sys.meta_path.insert(0, Slow())
"""
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
        self.place, self.end = place, time.monotonic() + WAIT_SECONDS
        for seed, name in enumerate("abc"):
            checkpoints.write(place / name, checkpoints.LLAMA, seed=seed)
        for name in ("site", "witness", "disk"):
            (place / name).mkdir()
        (place / "site/sitecustomize.py").write_text(WITNESS)
        (place / "batch.toml").write_text(BATCH.format(out=place / "out", disk=place / "disk"))
        (place / "schedule.toml").write_text(SCHEDULE)
        self.store: JobStore = open_store(place / "jobs.db")

    def daemon(self) -> subprocess.Popen[bytes]:
        """A daemon that sees a small disk at `disk`."""
        run = shlex.join([*COMMAND, "serve", str(self.place / "schedule.toml"), "--store", str(self.store.path)])
        disk = shlex.quote(str(self.place / "disk"))
        user = ["--map-root-user"] if os.geteuid() else []
        shell = f"mount -t tmpfs -o size=64k tmpfs {disk} && exec {run}"
        paths = os.pathsep.join([str(self.place / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": paths, "NIGHT": str(self.place / "witness")}
        return subprocess.Popen(["unshare", "--mount", *user, "sh", "-c", shell], env=environment, stderr=sys.stderr)

    def log(self) -> list[list[str]]:
        path = self.place / "witness/log"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def wait(self, until: Callable[[], object]) -> None:
        while not until():
            assert time.monotonic() < self.end, (self.log(), [(run.name, run.state, run.error) for run in self.store.runs()])
            time.sleep(0.05)

    def working(self, name: str) -> list[int]:
        """The processes that have begun to work on a directory."""
        return [int(pid) for event, pid, output in self.log() if event == "work" and Path(output).name == name]

    def run(self, name: str) -> RunRow:
        """The run that writes a directory."""
        (run,) = (run for run in self.store.runs() if any(Path(output).name == name for output in run.outputs))
        return run


def test_a_night(tmp_path: Path) -> None:
    night = Night(tmp_path)
    store = night.store
    first = night.daemon()
    # One conversion is killed in the middle.
    night.wait(lambda: night.working("victim"))
    (victim,) = night.working("victim")
    os.kill(victim, signal.SIGKILL)
    # So is the daemon, in the middle of another that would work for long, and another daemon starts at once.
    night.wait(lambda: store.counts_by_state()["done"] >= 3 and night.working("b-2GiB"))
    first.kill()
    first.wait()
    second = night.daemon()
    night.wait(lambda: store.workers()[0].pid == second.pid and not store.runs(states=ACTIVE))
    second.terminate()
    assert second.wait() == 0

    # What can end has ended, with the right bytes.
    for name, (source, options) in GOOD.items():
        alone = tmp_path / "alone" / name
        convert(model_dir=tmp_path / source, output_dir=alone, scheduler="threads", **options)
        assert contents(tmp_path / "out" / name) == contents(alone), name
    assert not list(tmp_path.rglob("*.partial"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(GOOD)

    # Once: each run has one attempt that did it, and one run stands for each job.
    runs = store.runs()
    attempts = {run.id: store.attempts(run.id) for run in runs}
    for name in GOOD:
        outcomes = [each.outcome for each in attempts[night.run(name).id]]
        assert outcomes.count("done") <= 1, "what is done is not done again"
        # One that ended in the moment in which the daemon was killed is found done.
        assert outcomes[-1] == "done" or outcomes[-2:] == ["lost", "up_to_date"]
        assert set(outcomes[:-1]) <= {"failed", "lost"}

    # Nothing ran twice at the same time: by the processes' own word, and by the store's.
    log = night.log()
    assert [word for word in log if word[0] == "overlap"] == []
    assert len(night.working("victim")) == len(night.working("b-2GiB")) == 2
    held = [(run.outputs, each) for run in runs for each in attempts[run.id]]
    for output in {output for outputs, _ in held for output in outputs}:
        spans = sorted((each.started, each.ended) for outputs, each in held if output in outputs)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans)), output

    # The store tells the truth: of every process that began, how each ended, and what is left.
    started = {int(word[1]) for word in log if word[0] == "start"}
    known = {each.pid for each in itertools.chain.from_iterable(attempts.values())}
    assert started <= known
    assert not any(process.birth(pid) for pid in started)
    states = Counter(run.state for run in runs)
    assert (states["done"] + states["up_to_date"], states["refused"], len(runs)) == (6, 3, 9)
    victims = attempts[night.run("victim").id]
    assert (victims[0].pid, victims[0].outcome, victims[0].exit_code) == (victim, "failed", 3)
    assert "SIGKILL" in victims[0].error
    assert "num_attention_heads 8" in night.run("a-3").error
    (odd,) = (run for run in runs if run.name == "b-odd")
    assert "job.0.colour: found an option that headrace does not have" in odd.error
    full = night.run("full")
    assert "bytes free" in full.error
    assert [each.outcome for each in attempts[full.id] if each.outcome != "lost"] == ["refused"] * 3
    assert sorted(each.ended is None for each in store.workers()) == [False, False]
    assert store.counts_by_state()["running"] == store.counts_by_state()["queued"] == 0
