"""A conversion on a scheduler and workers that are processes: no tensor goes over the network, and what is lost costs no byte."""

from __future__ import annotations

import logging
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pipeline import WriteFailed, convert, plan
from pipeline.planning import memory
from pipeline.planning.dask_graph import StageGraph
from pipeline.run import execute
from pipeline.run.schedulers import elsewhere, runner
from tests.support import checkpoints
from tests.support.commands import COMMAND
from tests.support.dask_processes import DaskProcesses, Nodes
from tests.support.directories import contents, values_bytes
from tests.support.witness import wait

SECONDS = 60.0
CONFIG = {**checkpoints.LLAMA, "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
OPTIONS: dict[str, Any] = {"tp_size": 2, "use_weight_only": True}
STAGES = ("read", "rename", "quantize", "scratch", "write", "finish")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dozen groups where such a model would be one."""
    monkeypatch.setattr(memory, "MIN_BLOCK_BYTES", 1 << 20)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "model", CONFIG)
    return tmp_path / "model"


def expected(tmp_path: Path, model: Path, **options: Any) -> dict[str, bytes]:
    convert(model_dir=model, output_dir=tmp_path / "alone", scheduler="threads", **options)
    return contents(tmp_path / "alone")


@pytest.mark.parametrize("scratch", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_no_tensor_goes_through_the_scheduler_or_between_workers(
    tmp_path: Path, stack: ExitStack, scratch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "MIN_BLOCK_BYTES", 4 << 20)
    config = {**CONFIG, "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8}
    checkpoints.write(tmp_path / "model", {**config, "num_key_value_heads": 4})
    names = ("scheduler", "one", "two")
    try:
        nodes = Nodes(stack, *names)
    except OSError as error:
        pytest.skip(str(error))
    cluster = DaskProcesses(tmp_path, stack, nodes)
    for name in names[1:]:
        cluster.start_worker(name)
    more = {"scratch_after": ["unpack"], "scratch": tmp_path / "scratch"} if scratch else {}
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler=cluster.address, **OPTIONS, **more)
    assert contents(tmp_path / "out") == expected(tmp_path, tmp_path / "model", **OPTIONS)
    moved = values_bytes(tmp_path / "out")
    carried = {name: nodes.carried_bytes(name) for name in names}
    assert moved > 40 << 20
    # The tasks themselves, their results, and what a cluster says of itself.
    assert all(0 < each < moved / 50 for each in carried.values()), carried


@pytest.mark.parametrize("stage", [pytest.param(each, marks=() if each == "write" else pytest.mark.nightly) for each in STAGES])
def test_a_worker_that_dies_in_a_stage_costs_no_byte(tmp_path: Path, model: Path, stack: ExitStack, stage: str) -> None:
    cluster = DaskProcesses(tmp_path, stack)
    doomed = cluster.start_worker("doomed", dies_in=stage)
    rescue = threading.Thread(target=lambda: (doomed.wait(SECONDS), cluster.start_worker("other")))
    rescue.start()
    cut = {"scratch_after": ["unpack"], "scratch": tmp_path / "scratch"}
    convert(model_dir=model, output_dir=tmp_path / "out", scheduler=cluster.address, **OPTIONS, **cut)
    rescue.join()
    assert (doomed.returncode, (tmp_path / stage).exists()) == (-signal.SIGKILL, True)
    assert contents(tmp_path / "out") == expected(tmp_path, model, **OPTIONS)
    assert not list((tmp_path / "scratch").rglob("c/*"))


@pytest.mark.nightly
def test_what_a_lost_worker_had_done_is_not_missed_though_its_scratch_is_gone(
    tmp_path: Path, model: Path, stack: ExitStack
) -> None:
    cluster = DaskProcesses(tmp_path, stack)
    doomed = cluster.start_worker("doomed", dies_in="write", after=40)
    cluster.start_worker("other")
    wait(lambda: len(workers_of(cluster)) == 2, SECONDS)
    cut = {"scratch_after": ["unpack"], "scratch": tmp_path / "scratch"}
    convert(model_dir=model, output_dir=tmp_path / "out", scheduler=cluster.address, **OPTIONS, **cut)
    assert doomed.wait(SECONDS) == -signal.SIGKILL
    assert contents(tmp_path / "out") == expected(tmp_path, model, **OPTIONS)


def workers_of(cluster: DaskProcesses) -> list[str]:
    from distributed import Client

    with Client(cluster.address, set_as_default=False) as client:
        return list(client.scheduler_info()["workers"])


@pytest.mark.nightly
@pytest.mark.parametrize("stage", ["write", "scratch"])
def test_a_worker_that_stops_is_given_up_after_the_stated_time_and_may_go_on(
    tmp_path: Path, model: Path, stack: ExitStack, stage: str
) -> None:
    cluster = DaskProcesses(tmp_path, stack, DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL="5s")
    stopped = cluster.start_worker("stopped", dies_in=stage, by=signal.SIGSTOP)
    rescue = threading.Thread(target=lambda: (wait((tmp_path / stage).exists, SECONDS), cluster.start_worker("other")))
    rescue.start()
    cut = {"scratch_after": ["unpack"], "scratch": tmp_path / "scratch"}
    convert(model_dir=model, output_dir=tmp_path / "out", scheduler=cluster.address, **OPTIONS, **cut)
    rescue.join()
    assert stopped.poll() is None
    whole = expected(tmp_path, model, **OPTIONS)
    assert contents(tmp_path / "out") == whole
    # It writes what it was about to write, and finds that nobody waits for it.
    stopped.send_signal(signal.SIGCONT)
    wait(lambda: "stopped" in "".join(workers_of(cluster)) or stopped.poll() is not None or idle(stopped), SECONDS)
    assert contents(tmp_path / "out") == whole


def idle(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process takes no processor time for a second."""
    taken = []
    for _ in range(2):
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        taken.append(int(fields[11]) + int(fields[12]))
        threading.Event().wait(1)
    return taken[1] - taken[0] < 20


@pytest.mark.nightly
@pytest.mark.parametrize("lost", ["scheduler", "client"])
def test_the_same_command_goes_on_after_the_loss_of_the(tmp_path: Path, model: Path, stack: ExitStack, lost: str) -> None:
    (tmp_path / "job.toml").write_text('model_dir = "model"\noutput_dir = "out"\ntp_size = 2\nuse_weight_only = true\n')
    cluster = DaskProcesses(tmp_path, stack)
    held = cluster.start_worker("held", dies_in="write", after=10, by=signal.SIGSTOP)
    command = [*COMMAND, "convert", str(tmp_path / "job.toml"), "--scheduler", cluster.address, "--log_format", "text"]
    pipe = subprocess.PIPE
    client = stack.enter_context(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True))
    stack.callback(client.kill)
    wait((tmp_path / "write").exists, SECONDS, lambda: client.poll() is not None and client.communicate())
    if lost == "scheduler":
        cluster.scheduler.kill()
        _, said = client.communicate(timeout=SECONDS)
        assert client.returncode == 3, said
        assert "the cluster lost its scheduler (" in said
        assert "run the same command again" in said
        assert "Traceback" not in said
    else:
        client.kill()
        client.communicate()
    held.kill()
    held.wait()
    assert not (tmp_path / "out/config.json").exists()
    if lost == "scheduler":
        cluster.start_scheduler()
    cluster.start_worker("other")
    ran = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert ran.returncode == 0, ran.stderr
    assert contents(tmp_path / "out") == expected(tmp_path, model, **OPTIONS)


def test_dask_logs_nothing_of_a_lost_scheduler_that_a_run_reports_but_does_for_the_hosts_own_client(
    tmp_path: Path, stack: ExitStack
) -> None:
    from distributed import Client

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record)

    said: list[logging.LogRecord] = []
    logger, keep = logging.getLogger("distributed.client"), Keep(logging.ERROR)
    logger.addHandler(keep)
    stack.callback(logger.removeHandler, keep)
    filters = [*logger.filters]
    cluster = DaskProcesses(tmp_path, stack)
    # Neither gives up seeking it, however slow this machine is: that would be said, too.
    with Client(cluster.address, timeout=300, set_as_default=False) as hosts:
        with elsewhere(cluster.address, seconds=300) as client:
            cluster.scheduler.kill()
            wait(lambda: client.status == hosts.status == "connecting", SECONDS)
        assert said == []
        logger.error("whoever else logs")
    assert said[0].getMessage() == "whoever else logs"
    assert len(said) > 1, "the host's own client said nothing"
    assert logger.filters == filters


def test_a_lost_scheduler_costs_its_report_and_not_the_reason_of_the_runs_end(tmp_path: Path, stack: ExitStack) -> None:
    cluster, report = DaskProcesses(tmp_path, stack), tmp_path / "report.html"

    def lose() -> None:
        with runner(cluster.address, 1, report=report) as session:
            cluster.scheduler.kill()
            wait(lambda: session.client.status == "connecting", SECONDS)
            raise WriteFailed("the reason")

    with pytest.raises(WriteFailed, match="the reason"):
        lose()
    assert not report.exists()


def test_a_task_that_is_done_again_does_not_miss_the_scratch_that_was_freed(
    tmp_path: Path, model: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All results of `write` are with a worker that dies, and those of `scratch`, none of which is done again, with another."""
    cluster = DaskProcesses(tmp_path, stack, DASK_DISTRIBUTED__SCHEDULER__WORK_STEALING="False")
    # It dies when this process has given up scratch that only one of the last groups read. The other worker has the results of the
    # first ones, too: its `scratch` waits for them.
    freed, free = tmp_path / "freed", execute.LeftToDo.free
    monkeypatch.setattr(execute.LeftToDo, "free", lambda self, number: (free(self, number), number >= 20 and freed.touch()))
    doomed = cluster.start_worker("doomed", dies_in="write", after=120, awaiting=freed)
    cluster.start_worker("other")
    wait(lambda: len(workers_of(cluster)) == 2, SECONDS)
    made = StageGraph.highlevel

    def placed(graph: StageGraph) -> Any:
        layered = made(graph)
        for name, layer in layered.layers.items():
            layer.annotations["workers"] = ["doomed" if name == "write" else "other"]
            layer.annotations["allow_other_workers"] = True
        return layered

    monkeypatch.setattr(StageGraph, "highlevel", placed)
    graphs = list[int]()
    run = execute._Run._run_graph
    monkeypatch.setattr(execute._Run, "_run_graph", lambda self, *own: (graphs.append(len(self.done)), run(self, *own))[1])
    cut = {"scratch_after": ["unpack"], "scratch": tmp_path / "scratch"}
    result = convert(model_dir=model, output_dir=tmp_path / "out", scheduler=cluster.address, **OPTIONS, **cut)
    assert doomed.wait(SECONDS) == -signal.SIGKILL
    assert len(graphs) > 1, "the loss was not felt"
    assert graphs[1] > 0
    assert contents(tmp_path / "out") == expected(tmp_path, model, **OPTIONS)
    assert result.bytes_written == values_bytes(tmp_path / "out")
    assert not list((tmp_path / "scratch").rglob("c/*"))


def test_beside_an_engine_that_is_built_such_a_loss_ends_the_run(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> None:
        raise FileNotFoundError(2, "No such file or directory", "a chunk")

    done = execute._Run.do
    monkeypatch.setattr(execute._Run, "do", lambda self, session, _: done(self, session, ("a build",)))
    monkeypatch.setattr(execute._Run, "_run_graph", lost)
    monkeypatch.setattr(execute.LeftToDo, "gave_up", lambda _, chunk: chunk == "a chunk")
    with pytest.raises(WriteFailed, match=r"the cluster lost a worker, .*out is not complete: run the same command again"):
        convert(model_dir=model, output_dir=tmp_path / "out", scheduler="threads")


def test_scratch_may_be_ahead_by_all_threads_of_a_cluster(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import Client, LocalCluster

    asked = list[int]()
    monkeypatch.setattr(execute, "scratch_window", lambda threads: asked.append(threads) or 4)
    with (
        LocalCluster(n_workers=2, threads_per_worker=5, processes=False, dashboard_address=":0", protocol="tcp") as made,
        Client(made, set_as_default=False),
    ):
        cut = {"scratch_after": ["unpack"], "scratch": tmp_path / "scratch", "workers": 2}
        projected = plan(model_dir=model, output_dir=tmp_path / "out", scheduler=made.scheduler_address, **OPTIONS, **cut)
        convert(model_dir=model, output_dir=tmp_path / "out", scheduler=made.scheduler_address, **OPTIONS, **cut)
    assert asked == [10]
    assert projected.scratch[0].bound_bytes == (2 * 10 + 2 + 2) * projected.block_bytes
    assert contents(tmp_path / "out") == expected(tmp_path, model, **OPTIONS)
