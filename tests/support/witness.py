"""A witness of the conversions that a batch or a daemon starts: which process wrote what, whether two did at once, and when.

Its code runs in every conversion before anything else, by Python's sitecustomize. It holds a lock for each directory that is
written until the process is gone, and says so in a log that is only added to. A conversion whose directory is named in `hold`
waits, once it is about to work, for as long as it is; one of `middle-` and that name when it has begun to write.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

CODE = """
import fcntl, os, sys, time, tomllib
if "convert" in sys.orig_argv and sys.orig_argv[-3].endswith(".toml"):
    folder = os.environ["WITNESS"]
    with open(sys.orig_argv[-3], "rb") as file:
        job = tomllib.load(file)
    outputs = [target["output_dir"] for target in job.get("target", [job])]
    names = [os.path.basename(output) for output in outputs]
    log = os.open(f"{folder}/log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for output in outputs:
        held = os.open(f"{folder}/{output.replace('/', '_')}.lock", os.O_WRONLY | os.O_CREAT)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.write(log, f"overlap {os.getpid()} {output}\\n".encode())
    os.write(log, f"start {os.getpid()} {' '.join(names)}\\n".encode())

    class Held:
        # As it is about to work.
        def find_spec(self, name, path=None, target=None):
            if name == "pipeline.planning.make_plan":
                os.write(log, f"work {os.getpid()} {' '.join(names)}\\n".encode())
                while any(os.path.exists(f"{folder}/hold/{name}") for name in names):
                    time.sleep(0.05)

    sys.meta_path.insert(0, Held())

    def middle(event, arguments):
        if event == "open" and str(arguments[0]).endswith("rank0.safetensors.partial"):
            if any(os.path.exists(f"{folder}/hold/middle-{name}") for name in names):
                os.write(log, f"middle {os.getpid()} {' '.join(names)}\\n".encode())
                while any(os.path.exists(f"{folder}/hold/middle-{name}") for name in names):
                    time.sleep(0.05)

    sys.addaudithook(middle)
"""


class Witness:
    """The witness of all conversions of processes with `environment`."""

    def __init__(self, place: Path) -> None:
        self.place = place / "witness"
        (self.place / "hold").mkdir(parents=True)
        (self.place / "site").mkdir()
        (self.place / "site/sitecustomize.py").write_text(CODE)

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment with the witness in it."""
        paths = os.pathsep.join([str(self.place / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {**os.environ, "PYTHONPATH": paths, "WITNESS": str(self.place)}

    def hold(self, *names: str) -> None:
        """Have the conversions of directories of these names wait."""
        for name in names:
            (self.place / "hold" / name).touch()

    def let(self, *names: str) -> None:
        """Let them go on."""
        for name in names:
            (self.place / "hold" / name).unlink()

    def log(self) -> list[list[str]]:
        """What was seen: (start, work, middle or overlap), the process, the names of its directories."""
        path = self.place / "log"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def pids(self, event: str, name: str) -> list[int]:
        """The processes of which an event was seen for a directory of this name."""
        return [int(pid) for kind, pid, *names in self.log() if kind == event and name in names]


def gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def wait(until: Callable[[], object], seconds: float, said: Callable[[], object] = str) -> None:
    """Wait until something holds; fails, with what `said` returns, where it does not in time."""
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, said()
        time.sleep(0.05)
