"""A Dask scheduler and its workers as processes, each in a network namespace of its own where a test asks for that.

A worker can be told where to die: its code runs first (`--preload`), and kills its own process when a task of a stage is at work.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from tests.support.witness import wait

SECONDS = 60.0
# Of a worker that dies in a stage: it leaves a file of that name first. It has begun a task, or is in the middle of its bytes or of
# the names of files.
DOOMED = """
import os, signal, time
from pathlib import Path

stage, place, awaited = os.environ["DIES_IN"], Path(os.environ["DIES_AT"]), os.environ["DIES_AWAITING"]
sent, spared = int(os.environ["DIES_BY"]), int(os.environ["DIES_AFTER"])

def die():
    global spared
    spared -= 1
    if spared == -1:
        while awaited and not os.path.exists(awaited):
            time.sleep(0.01)
        (place / stage).touch()
        os.kill(os.getpid(), sent)

def dask_setup(worker):
    import stages.write
    from distributed import WorkerPlugin
    from pipeline.sinks import rank_file

    class Watch(WorkerPlugin):
        def transition(self, key, start, finish, **_):
            if finish == "executing" and key[0] == stage and stage not in ("write", "scratch", "finish"):
                die()

    worker._plugins_of_test = Watch()
    worker.plugins["dies"] = worker._plugins_of_test
    written = stages.write._write_all

    def write_all(descriptor, data, offset):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if stage == ("write" if "rank" in name and name.endswith(".partial") else "scratch"):
            written(descriptor, data[: len(data) // 2], offset)
            die()
        written(descriptor, data, offset)

    stages.write._write_all = write_all
    finished = rank_file.RankFile.finish

    def finish(self):
        finished(self)
        if stage == "finish":
            die()

    rank_file.RankFile.finish = finish
"""


class DaskProcesses:
    """A scheduler at one port, and workers; all are killed when `stack` is closed. `nodes`: their network, if it is their own."""

    def __init__(self, place: Path, stack: ExitStack, nodes: Nodes | None = None, **settings: str) -> None:
        self.place, self.stack, self.nodes = place, stack, nodes
        self.environment = {**os.environ, **settings}
        self.address = ""
        self.start_scheduler()

    def start_scheduler(self) -> None:
        """Start the scheduler: where there was one before, at its address."""
        file = self.place / "scheduler.json"
        file.unlink(missing_ok=True)
        host = self.nodes.address("scheduler") if self.nodes else "127.0.0.1"
        port = self.address.rpartition(":")[2] or "0"
        words = ("--host", host, "--port", port, "--no-dashboard", "--scheduler-file", str(file))
        self.scheduler = self._started("scheduler", "dask_scheduler", words)
        wait(lambda: file.exists() and file.read_text().endswith("}"), SECONDS)
        self.address = str(json.loads(file.read_text())["address"])

    def start_worker(
        self, name: str, dies_in: str = "", after: int = 0, by: signal.Signals = signal.SIGKILL, awaiting: Path | str = ""
    ) -> subprocess.Popen[bytes]:
        """Start a worker of one thread.

        `dies_in`: a stage, in which it sends itself the signal `by`, after so many times and when the file `awaiting` is there.
        """
        words = [self.address, "--no-nanny", "--nthreads", "1", "--no-dashboard", "--memory-limit", "0", "--name", name]
        words += ["--host", self.nodes.address(name)] if self.nodes else []
        words += ["--local-directory", str(self.place / "dask")]
        if dies_in:
            (self.place / "doomed.py").write_text(DOOMED)
            words += ["--preload", str(self.place / "doomed.py")]
        death = {"DIES_IN": dies_in, "DIES_BY": str(int(by)), "DIES_AFTER": str(after), "DIES_AWAITING": str(awaiting)}
        return self._started(name, "dask_worker", words, DIES_AT=str(self.place), **death)

    def _started(self, node: str, module: str, words: list[str] | tuple[str, ...], **settings: str) -> subprocess.Popen[bytes]:
        command = [*(self.nodes.inside(node) if self.nodes else ()), sys.executable, "-m", f"distributed.cli.{module}", *words]
        log = self.stack.enter_context((self.place / f"{node}.log").open("wb"))
        process = subprocess.Popen(command, env={**self.environment, **settings}, stdout=log, stderr=log)
        self.stack.callback(lambda: (process.kill(), process.wait()))
        return process


class Nodes:
    """Network namespaces behind one bridge, in which processes are like machines: each counts what goes over its own interface.

    Raises OSError where this system lets us make none.
    """

    def __init__(self, stack: ExitStack, *names: str) -> None:
        self.mark = f"hr{os.getpid() % 100_000}"
        self.network = f"10.{os.getpid() // 200 % 200 + 20}.{os.getpid() % 200}"
        self.numbers = {name: number for number, name in enumerate(names, 2)}
        if not shutil.which("ip") or os.geteuid():
            raise PermissionError("namespaces of networks are root's to make, by the command ip")
        stack.callback(lambda: subprocess.run(["ip", "link", "del", self.mark], check=False, capture_output=True))
        self._ip("link", "add", self.mark, "type", "bridge")
        self._ip("addr", "add", f"{self.network}.1/24", "dev", self.mark)
        self._ip("link", "set", self.mark, "up")
        for name, number in self.numbers.items():
            space, outside = self._space(name), f"{self.mark}v{number}"
            stack.callback(lambda space=space: subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True))
            self._ip("netns", "add", space)
            self._ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", space)
            self._ip("link", "set", outside, "master", self.mark, "up")
            self._ip("-n", space, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
            self._ip("-n", space, "link", "set", "eth0", "up")
            self._ip("-n", space, "link", "set", "lo", "up")

    def address(self, name: str) -> str:
        """The address of a node."""
        return f"{self.network}.{self.numbers[name]}"

    def inside(self, name: str) -> tuple[str, ...]:
        """What a command is preceded by, to run on a node."""
        return ("ip", "netns", "exec", self._space(name))

    def carried_bytes(self, name: str) -> int:
        """What has gone to and from a node so far."""
        counts = Path(f"/sys/class/net/{self.mark}v{self.numbers[name]}/statistics")
        return sum(int((counts / each).read_text()) for each in ("rx_bytes", "tx_bytes"))

    def _space(self, name: str) -> str:
        return f"{self.mark}-{name}"

    def _ip(self, *words: str) -> None:
        ran = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
        if ran.returncode:
            raise OSError(f"ip {' '.join(words)}: {ran.stderr.strip()}")
