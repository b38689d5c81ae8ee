"""headrace as a guest: whatever process calls it is left as it was, and it works wherever it is called from.

Each situation is a process of its own, as what is looked at belongs to a process.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support import checkpoints
from tests.support.examples import by_night
from tests.support.places import ROOT

SECONDS = 120  # a process that takes longer hangs

# What a host can look at. `state()` gives it as plain values; `failing_task_is_logged()` runs a cluster of the host's own.
HOST = """
import asyncio, copy, gc, logging, multiprocessing, os, sys, threading, warnings
from pathlib import Path
import dask, dask.threaded, distributed
import numpy, pydantic
import headrace
MODEL, OUT = Path(sys.argv[1]), Path(sys.argv[2])

def client():
    try:
        return distributed.default_client()
    except ValueError:
        return None

def state():
    known = [each for each in logging.Logger.manager.loggerDict.values() if isinstance(each, logging.Logger)]
    loggers = [logging.root, *known]
    logs = {
        each.name: (each.level, each.propagate, [*each.filters], [(id(h), h.level, [*h.filters]) for h in each.handlers])
        for each in loggers
    }
    filters = [*warnings.filters]
    return copy.deepcopy(dask.config.config), filters, logs, id(client()), [*gc.callbacks], dict(os.environ), os.getcwd()

def differences(before):
    after = state()
    names = ("settings", "warnings", "loggers", "client", "gc", "environment", "directory")
    changed = [name for name, a, b in zip(names, before, after) if a != b and name != "loggers"]
    return changed + [name for name, was in before[2].items() if after[2][name] != was]

class Keep(logging.Handler):
    def __init__(self):
        super().__init__()
        self.said = []
    def emit(self, record):
        self.said.append(record.getMessage())

def failing_task_is_logged():
    keep = Keep()
    logging.getLogger("distributed.worker").addHandler(keep)
    with distributed.LocalCluster(n_workers=1, processes=False, dashboard_address=None, silence_logs=False) as cluster:
        with distributed.Client(cluster) as own:
            own.submit(lambda: 1 / 0, pure=False).exception()
    logging.getLogger("distributed.worker").removeHandler(keep)
    return any("Compute Failed" in text for text in keep.said)

def convert(name, **options):
    result = headrace.convert(model_dir=MODEL, output_dir=OUT / name, **options)
    assert headrace.verify(OUT / name, MODEL).ok
    return result
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("guest") / "model"
    checkpoints.write(place, checkpoints.LLAMA)
    return place


def in_a_process(
    model: Path, out: Path, text: str, environment: Mapping[str, str] | None = None, prelude: str = HOST
) -> subprocess.CompletedProcess[str]:
    out.mkdir(exist_ok=True)
    script = out / "script.py"
    script.write_text(f"{prelude}\nif __name__ == '__main__':\n{textwrap.indent(textwrap.dedent(text), '    ')}\n")
    command = [sys.executable, "-P", str(script), str(model), str(out)]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS, env=settings, cwd=out)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran


def said(text: str) -> str:
    """Standard error without Dask's warning of a port, which another process may take in the last moment."""
    return re.sub(r"\S+: UserWarning: Port \d+ is already in use.*?warnings.warn\(\n", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("scheduler", by_night(["local", "threads", "synchronous"], ["local", "threads"]))
def test_a_call_leaves_settings_warnings_loggers_and_clients_as_they_were(model: Path, tmp_path: Path, scheduler: str) -> None:
    ran = in_a_process(
        model,
        tmp_path,
        f"""
        convert("first")  # so that all is imported, as PyTorch has filters of its own
        before = state()
        headrace.plan(model_dir=MODEL, output_dir=OUT / "out", scheduler="{scheduler}")
        convert("out", scheduler="{scheduler}")
        headrace.inspect(MODEL)
        headrace.report(OUT / "out", MODEL)
        assert differences(before) == [], differences(before)
        print("from here on the host's own", file=sys.stderr)
        assert failing_task_is_logged()
        """,
    )
    assert said(ran.stderr.partition("from here on")[0]) == ""


def test_a_call_that_fails_leaves_them_too(model: Path, tmp_path: Path) -> None:
    """A task fails: Dask logs nothing of it, and says so of the host's own tasks as before."""
    ran = in_a_process(
        model,
        tmp_path,
        """
        import stages.write
        from unittest import mock
        convert("first")
        before = state()
        with mock.patch.object(stages.write, "_write_all", side_effect=OSError(5, "Input/output error", "rank0")):
            try:
                headrace.convert(model_dir=MODEL, output_dir=OUT / "out")
            except headrace.WriteFailed as error:
                assert "rank0" in str(error), error
            else:
                raise AssertionError("it did not fail")
        assert differences(before) == [], differences(before)
        print("from here on the host's own", file=sys.stderr)
        assert failing_task_is_logged()
        """,
    )
    assert said(ran.stderr.partition("from here on")[0]) == ""
    assert "Compute Failed" in ran.stderr


def test_calls_of_several_threads_at_once_beside_a_client_of_the_hosts(model: Path, tmp_path: Path) -> None:
    """Each thread sees the host's default client, its settings and its filters during the calls as well."""
    in_a_process(
        model,
        tmp_path,
        """
        with distributed.LocalCluster(n_workers=1, processes=False, dashboard_address=None) as cluster:
            with distributed.Client(cluster) as own:
                convert("first")
                before, failed = state(), []

                def work(name):
                    try:
                        convert(name)
                    except BaseException as error:
                        failed.append(error)

                for turn in range(3):
                    threads = [threading.Thread(target=work, args=(f"{turn}-{n}",)) for n in range(3)]
                    [thread.start() for thread in threads]
                    while any(thread.is_alive() for thread in threads):
                        assert distributed.default_client() is own and distributed.get_client() is own
                        assert dask.config.get("scheduler", None) == "dask.distributed"
                        assert dask.config.config == before[0] and [*warnings.filters] == before[1]
                        ended = [f.result() for f in distributed.as_completed(own.map(abs, [-1, 2], pure=False))]
                        assert sorted(ended) == [1, 2]
                    [thread.join() for thread in threads]
                assert failed == []
                assert differences(before) == [], differences(before)
                import dask.array as da
                assert da.ones(10).sum().compute() == 10
        """,
    )


def test_loggers_that_the_host_set_are_not_set_by_dask(model: Path, tmp_path: Path) -> None:
    """Importing distributed sets Tornado's loggers: a host that serves with Tornado keeps its own."""
    prelude = "import logging, sys\nlogging.getLogger('tornado').setLevel('INFO')\nimport headrace"
    in_a_process(
        model,
        tmp_path,
        """
        assert "distributed" not in sys.modules
        headrace.convert(model_dir=sys.argv[1], output_dir=sys.argv[2] + "/out")
        assert "distributed" in sys.modules
        tornado = logging.getLogger("tornado")
        assert (tornado.level, tornado.propagate, tornado.handlers) == (logging.INFO, True, [])
        """,
        prelude=prelude,
    )


def test_callbacks_of_dask_are_the_hosts_own(model: Path, tmp_path: Path) -> None:
    """Dask's context of callbacks is the process's: the host hears of its own tasks alone, and headrace of none of them."""
    in_a_process(
        model,
        tmp_path,
        """
        from dask.callbacks import Callback
        keys = []
        work = threading.Thread(target=convert, args=("out",), kwargs={"scheduler": "threads"})
        with Callback(pretask=lambda key, *_: keys.append(key)):
            active = Callback.active
            work.start()
            computed = 0
            while work.is_alive() or not computed:
                assert dask.threaded.get({"own": (abs, -1)}, "own") == 1
                assert Callback.active is active and len(active) == 1
                computed += 1
            work.join()
        assert keys == ["own"] * computed, keys
        assert (OUT / "out/config.json").exists()
        """,
    )


@pytest.mark.parametrize("method", by_night(["fork", "spawn", "forkserver"], ["fork", "spawn"]))
def test_a_child_of_a_process_that_has_converted(model: Path, tmp_path: Path, method: str) -> None:
    in_a_process(
        model,
        tmp_path,
        f"""
        convert("parent")
        child = multiprocessing.get_context("{method}").Process(target=convert, args=("child",), daemon=True)
        child.start()
        child.join(60)
        assert child.exitcode == 0, child.exitcode
        assert headrace.verify(OUT / "child", MODEL).ok
        """,
    )


def test_a_fork_of_the_systems_own(model: Path, tmp_path: Path) -> None:
    """After a conversion, and again in the child's child."""
    in_a_process(
        model,
        tmp_path,
        """
        convert("0")
        for depth in (1, 2):
            child = os.fork()
            if child:
                assert os.waitpid(child, 0)[1] == 0
                os._exit(0)
            convert(str(depth))
        os._exit(0)
        """,
    )


def test_inside_a_running_event_loop(model: Path, tmp_path: Path) -> None:
    """As in a notebook's cell; and as a web handler does, in threads beside the loop."""
    in_a_process(
        model,
        tmp_path,
        """
        async def work():
            convert("cell")
            await asyncio.gather(*(asyncio.to_thread(convert, f"handler{n}") for n in range(2)))
            return asyncio.get_running_loop().is_running()

        assert asyncio.run(work())
        """,
    )


def test_inside_a_task_of_the_hosts_cluster(model: Path, tmp_path: Path) -> None:
    in_a_process(
        model,
        tmp_path,
        """
        with distributed.LocalCluster(n_workers=1, processes=False, dashboard_address=None) as cluster:
            with distributed.Client(cluster) as own:
                before = state()
                assert own.submit(lambda: convert("out").bytes_written > 0).result()
                assert own.submit(lambda: distributed.get_client() is not None).result()
                assert before[0] == dask.config.config
        """,
    )


SITE = """
distributed:
  comm:
    require-encryption: true
  dashboard:
    link: "/user/{A_NAME_THAT_IS_NOT_SET}/proxy/{port}/status"
  worker:
    lifetime:
      duration: 1 ms
    memory:
      spill: 0.01
  scheduler:
    worker-saturation: 1.0
"""


@pytest.mark.parametrize("report", [False, True], ids=["", "with Dask's report"])
def test_under_a_sites_settings(model: Path, tmp_path: Path, report: bool) -> None:
    """Of encryption, of a dashboard behind a proxy, of workers that end: none of them is for a cluster in this process."""
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings/site.yaml").write_text(SITE)
    page = tmp_path / "report.html"
    more = f"performance_report={str(page)!r}" if report else ""
    text = f"""
    assert dask.config.get("distributed.comm.require-encryption") is True
    convert("out", {more})
    """
    in_a_process(model, tmp_path / "out", text, {"DASK_CONFIG": str(tmp_path / "settings")})
    assert not report or "bokeh" in page.read_text().lower()


@pytest.mark.parametrize(
    ("command", "text"),
    by_night(itertools.product(["plan", "convert"], ["distributed: [", "- a list"]), [("convert", "distributed: [")]),
)
def test_settings_that_dask_cannot_read_are_refused_with_the_files_name(
    model: Path, tmp_path: Path, command: str, text: str
) -> None:
    out = tmp_path / "out"
    (tmp_path / "settings").mkdir()
    file = tmp_path / "settings/site.yaml"
    file.write_text(text)
    arguments = [command, "--model_dir", str(model), "--output_dir", str(out), "--scheduler", "threads"]
    ran = in_an_environment(arguments, {"DASK_CONFIG": str(file.parent)})
    assert ran.returncode == 2, ran
    assert str(file) in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not out.exists()


@pytest.mark.parametrize("command", ["verify", pytest.param("report", marks=pytest.mark.nightly)])
def test_a_verification_needs_no_dask(model: Path, tmp_path: Path, command: str) -> None:
    """It verifies where Dask's settings are none that it could read."""
    out = tmp_path / "out"
    convert = ["convert", "--model_dir", str(model), "--output_dir", str(out), "--scheduler", "threads"]
    assert in_an_environment(convert, {}).returncode == 0
    (tmp_path / "site.yaml").write_text("- a list")
    ran = in_an_environment([command, str(out), "--source", str(model)], {"DASK_CONFIG": str(tmp_path)})
    assert ran.returncode == 0, ran


def in_an_environment(arguments: list[str], settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "500", **settings}
    command = [sys.executable, "-P", "-m", "pipeline.cli", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
