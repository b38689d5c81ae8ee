"""The page of a conversion, in a browser while it runs; its metrics and health; where it listens."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import dask
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline import BadInput, convert, plan
from pipeline.planning.listen import Listen, parse_listen
from pipeline.watching.conversion import serving
from pipeline.watching.notes import page_address
from pipeline.watching.page import ConversionPage, body, dask_links, duration, header, rates, stage_order
from pipeline.watching.state import RunWatch, Sample, Snapshot
from tests.pipeline.watching.held import held, several_blocks
from tests.pipeline.watching.web import fetch, fetch_when_there, free_port
from tests.support import browser, checkpoints
from tests.support.places import ROOT

# The numbers of rows of the tables that a page of Dask's shows.
ROWS = "[...Bokeh.documents[0]._all_models.values()].filter(m => m.type === 'ColumnDataSource').map(m => m.get_length())"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return several_blocks(tmp_path_factory.mktemp("source") / "Llama & <friends>")


def values(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """{(sample's name, its labels): value} of Prometheus's text."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@browser.needed
def test_the_page_beside_the_dashboard_follows_the_run(source: Path, tmp_path: Path) -> None:
    targets = [{"output_dir": tmp_path / "tp2", "tp_size": 2}, {"output_dir": tmp_path / "pp3", "pp_size": 3}]
    with browser.browser() as tab:
        with held(source, target=targets) as run:
            base = run.dashboard.removesuffix("/status")
            fetch_when_there(base + "/headrace")
            tab.open(base + "/headrace")
            text = tab.wait(lambda text: "written" in text and "rank 2" in text)
            assert run.plan is not None
            assert "Llama & <friends>" in text
            assert f"{len(run.written)} of {run.plan.tasks} groups of blocks" in text
            for word in (
                "running",
                "Throughput",
                "Memory of the process",
                "tp2",
                "pp3",
                "rank 1",
                "read",
                "write",
                "of 2.0 GiB peak memory",
            ):
                assert word in text, word
            assert tab.logged == []
        # The server has gone with the run; the page stays, and says how it ended.
        text = tab.wait(lambda text: " done " in text)
        for word in ("last layer", "2 of 2 outputs", "whole"):
            assert word in text, word
        assert tab.evaluate("document.title") == "done: tp2, pp3"
        time.sleep(2)
        assert tab.text() == text
        assert tab.evaluate("document.body.className") == ""
        assert tab.logged == []


def test_metrics_beside_the_dashboard(source: Path, tmp_path: Path) -> None:
    with held(source, output_dir=tmp_path / "out", tp_size=2) as run:
        base = run.dashboard.removesuffix("/status")
        fetch_when_there(base + "/headrace")
        found = values(fetch_when_there(base + "/metrics"))
        done = sum(written.bytes_written for written in run.written)
        assert found["headrace_stage_bytes_total", (("stage", "write"),)] == done
        for stage in ("read", "write", "checksum"):
            expected = sum(written.metrics[stage, "bytes"] for written in run.written)
            assert found["headrace_stage_bytes_total", (("stage", stage),)] == expected
            assert found["headrace_stage_seconds_total", (("stage", stage),)] > 0
        job = ("job", "out")
        assert found["headrace_job_bytes", (job,)] == done < found["headrace_job_size_bytes", (job,)]
        assert found["headrace_job_done_tasks", (job,)] == len(run.written)
        assert run.plan is not None
        assert found["headrace_job_tasks", (job,)] == run.plan.tasks
        assert 0 < found["headrace_job_memory_bytes", (job,)] < found["headrace_job_memory_limit_bytes", (job,)] == 2 << 30
        ranks = [found["headrace_rank_bytes", (job, ("rank", str(n)), ("target", "out"))] for n in range(2)]
        assert sum(ranks) == done
        assert found["headrace_jobs", (("state", "running"),)] == 1
        assert found["headrace_queue_length", ()] == 0
        health = json.loads(fetch(base + "/health")[1])
        assert (health["status"], health["state"], health["bytes"]) == ("ok", "running", done)
        assert health["done_tasks"] == len(run.written)


@pytest.mark.parametrize("scheduler", ["threads", "synchronous"])
def test_a_page_without_a_cluster(source: Path, tmp_path: Path, scheduler: str) -> None:
    port = free_port()
    listen = f"127.0.0.1:{port}"
    with held(source, output_dir=tmp_path / "out", scheduler=scheduler, listen=listen) as run:
        assert run.dashboard == f"http://{listen}/headrace"
        assert "<title>headrace</title>" in fetch(run.dashboard)[1]
        assert "<title>headrace</title>" in fetch(f"http://{listen}/")[1]
        assert values(fetch(f"http://{listen}/metrics")[1])["headrace_jobs", (("state", "running"),)] == 1
        assert fetch(f"http://{listen}/health")[0] == 200
    with pytest.raises(OSError, match="refused"):
        fetch(f"http://{listen}/health")


def test_a_page_without_a_cluster_is_on_the_usual_port_or_on_another(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    monkeypatch.setattr("pipeline.watching.conversion.Listen", lambda *given: Listen(*given) if given else Listen(port=port))
    with held(source, output_dir=tmp_path / "a", scheduler="threads") as run:
        assert run.dashboard == f"http://127.0.0.1:{port}/headrace"
        with held(source, output_dir=tmp_path / "b", scheduler="synchronous") as second:
            assert second.dashboard not in ("", run.dashboard)
            assert "<title>headrace</title>" in fetch(second.dashboard)[1]
        assert "renames files" in fetch(run.dashboard)[1]


def test_a_page_that_nobody_opens_loads_no_server(tmp_path: Path) -> None:
    """In a process of its own: neither Tornado nor Bokeh, and the end of the run does not wait."""
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    code = f"""
import sys
import headrace
headrace.convert(model_dir={str(tmp_path / "model")!r}, output_dir={str(tmp_path / "out")!r}, scheduler="threads",
                 listen="127.0.0.1:{free_port()}")
print(sorted({{"tornado", "bokeh", "distributed", "http.server"}} & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert ran.stdout == "[]\n"


def test_the_end_reaches_an_open_page_and_the_stream_closes(source: Path, tmp_path: Path) -> None:
    """Read as a browser reads it: a first event while the run goes on, and a last that says how it ended."""
    listen = f"127.0.0.1:{free_port()}"
    lines: list[str] = []

    def read() -> None:
        with urllib.request.urlopen(f"http://{listen}/headrace/live", timeout=30) as stream:
            for line in stream:
                lines.append(line.decode())

    with held(source, output_dir=tmp_path / "out", scheduler="threads", listen=listen):
        reader = threading.Thread(target=read)
        reader.start()
        end = time.monotonic() + 30
        while not lines:
            assert time.monotonic() < end
            time.sleep(0.01)
    reader.join(30)
    assert not reader.is_alive()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert not events[0]["ended"]
    assert "<span class='pill running'>" in events[0]["body"]
    assert events[-1]["ended"]
    assert "<span class='pill done'>" in events[-1]["body"]
    assert events[-1]["title"] == "done: out"


def test_a_run_that_fails_says_so_on_its_page() -> None:
    watch = RunWatch()
    with pytest.raises(OSError, match="disk"), serving(watch, Listen(port=free_port())):
        raise OSError("the disk has gone")
    _, title, ended = ConversionPage(watch).look()
    assert (title, ended) == ("failed: ", True)
    assert "<span class='pill failed'>failed</span>" in body(watch.snapshot())


@browser.needed
def test_the_page_follows_dark_mode(source: Path, tmp_path: Path) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    with (
        held(source, output_dir=tmp_path / "out", scheduler="threads", listen=f"127.0.0.1:{free_port()}") as run,
        browser.browser() as tab,
    ):
        tab.open(run.dashboard)
        tab.wait(lambda text: "Graph" in text)
        colours = {}
        for scheme in ("light", "dark"):
            tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            colours[scheme] = [int(part) for part in re.findall(r"\d+", tab.evaluate(colour))]
        assert min(colours["light"]) > 200
        assert max(colours["dark"]) < 60
        assert "--scheduler threads has no dashboard" in tab.text()


@pytest.mark.nightly
@browser.needed
def test_dasks_own_pages_of_a_run_with_scratch(tmp_path: Path) -> None:
    """Of some hundred megabytes: Dask draws each task, each stage and its progress, and our page says where."""
    before = dask.config.get("distributed.dashboard.graph-max-items", None)
    source = several_blocks(tmp_path / "model", layers=8)
    options = {"output_dir": tmp_path / "out", "tp_size": 2, "scratch_after": "rename"}
    with held(source, 20, **options) as run, browser.browser() as tab:
        base = run.dashboard.removesuffix("/status")
        tab.open(f"{base}/headrace")
        text = tab.wait(lambda text: "Dask shows" in text)
        (tasks,) = re.findall(r"graph of (\d+) tasks", text)
        assert tab.evaluate("document.querySelectorAll('svg.graph .edge').length") == 6
        for page, rows in (("graph", int(tasks)), ("groups", 5), ("status", 5)):
            tab.open(f"{base}/{page}")
            end = time.monotonic() + 30
            while rows not in (tab.evaluate(ROWS) or []):
                assert time.monotonic() < end, (page, tab.evaluate(ROWS))
                time.sleep(0.1)
        assert tab.logged == []
        assert dask.config.get("distributed.dashboard.graph-max-items", None) == before
    assert dask.config.get("distributed.dashboard.graph-max-items", None) == before


@pytest.mark.parametrize("scheduler", ["local", "threads"])
def test_an_address_that_is_taken_is_refused_before_anything_is_written(source: Path, tmp_path: Path, scheduler: str) -> None:
    listen = f"127.0.0.1:{free_port()}"
    with (
        held(source, output_dir=tmp_path / "first", scheduler="threads", listen=listen),
        pytest.raises(BadInput, match=listen) as raised,
    ):
        convert(model_dir=source, output_dir=tmp_path / "second", scheduler=scheduler, listen=listen)
    assert raised.value.problems[0].subject == f"--listen {listen}"
    assert not (tmp_path / "second").exists()


def test_another_port_where_the_usual_one_is_taken(source: Path, tmp_path: Path) -> None:
    with held(source, output_dir=tmp_path / "a") as first, held(source, output_dir=tmp_path / "b") as second:
        assert first.dashboard != second.dashboard
        for run, name in ((first, "a"), (second, "b")):
            fetch_when_there(run.dashboard.removesuffix("/status") + "/headrace")
            assert json.loads(fetch(run.dashboard.removesuffix("status") + "health")[1])["outputs"] == [str(tmp_path / name)]


@pytest.mark.parametrize(
    ("text", "host", "port", "url"),
    [
        ("127.0.0.1:8787", "127.0.0.1", 8787, "http://127.0.0.1:8787"),
        (":9000", "127.0.0.1", 9000, "http://127.0.0.1:9000"),
        ("0.0.0.0:80", "0.0.0.0", 80, "http://127.0.0.1:80"),
        ("[::1]:65535", "::1", 65535, "http://[::1]:65535"),
        ("gpu-box.lan:8787", "gpu-box.lan", 8787, "http://gpu-box.lan:8787"),
    ],
)
def test_addresses(text: str, host: str, port: int, url: str) -> None:
    assert parse_listen(text) == Listen(host, port)
    assert parse_listen(text).url == url


@pytest.mark.parametrize("text", ["", "8787", "localhost", "127.0.0.1:", "127.0.0.1:0", "x:65536", "x:-1", "x:٣", "::1:80", "x:8o"])
def test_addresses_that_are_none(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        parse_listen(text)
    with pytest.raises(BadInput, match="--listen"):
        plan(model_dir=tmp_path, output_dir=tmp_path / "out", listen=text)


def test_the_header_escapes_names() -> None:
    now = Snapshot(name="<script>", source="a&b", outputs=("<i>",), state="running", total_bytes=10, done_bytes=5)
    text = header(now)
    assert "<script>" not in text
    assert "<i>" not in text
    assert "a&amp;b" in text
    assert "width:50.0%" in text


def test_rates_are_differences() -> None:
    samples = [Sample(0, 100, 1), Sample(2, 300, 1), Sample(2, 300, 1), Sample(4, 300, 1)]
    assert rates(samples) == [(0, 100), (2, 100), (4, 0)]
    assert rates(samples[:1]) == []
    # One that follows at once is not a peak.
    assert rates([Sample(0, 0, 1), Sample(10, 100, 1), Sample(10.1, 200, 1)]) == [(0, 200 / 10.1), (10.1, 200 / 10.1)]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1:00 min"), (3599, "59:59 min"), (7500, "2:05 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_stages_stand_in_the_order_of_the_work() -> None:
    names: list[Any] = ["write", "checksum", "some_day", "shard", "cast", "unpack", "read"]
    assert sorted(names, key=stage_order) == ["read", "unpack", "cast", "shard", "some_day", "checksum", "write"]


def test_metrics_say_what_is_not_installed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pipeline.watching.metrics", None)
    with held(source, output_dir=tmp_path / "out", scheduler="threads", listen=f"127.0.0.1:{free_port()}") as run:
        status, text = fetch(run.dashboard.replace("/headrace", "/metrics"))
        assert (status, text) == (501, "# prometheus_client is not installed: pip install headrace[jobs]\n")
        assert fetch(run.dashboard)[0] == fetch(run.dashboard.replace("/headrace", "/health"))[0] == 200


@pytest.mark.parametrize("scheduler", ["local", "threads"])
def test_an_address_that_is_not_this_machines(source: Path, tmp_path: Path, scheduler: str) -> None:
    with pytest.raises(BadInput, match=r"--listen 198\.51\.100\.1:8787: found"):
        convert(model_dir=source, output_dir=tmp_path / "out", scheduler=scheduler, listen="198.51.100.1:8787")
    assert not (tmp_path / "out").exists()


def test_a_cluster_elsewhere_and_the_page_here(source: Path, tmp_path: Path) -> None:
    from distributed import LocalCluster

    listen = f"127.0.0.1:{free_port()}"
    report = tmp_path / "report.html"
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, protocol="tcp", dashboard_address=None) as cluster,
        held(
            source, output_dir=tmp_path / "out", scheduler=cluster.scheduler_address, listen=listen, performance_report=report
        ) as run,
    ):
        assert run.plan is not None
        assert page_address(run.plan.job, run.dashboard) == f"http://{listen}/headrace"
        assert "<title>headrace</title>" in fetch(f"http://{listen}/headrace")[1]
        assert values(fetch(f"http://{listen}/metrics")[1])["headrace_job_done_tasks", (("job", "out"),)] == len(run.written)
    assert "Dask Performance Report" in report.read_text()


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (Snapshot(scheduler="local", graph_tasks=12), ['"graph">graph of 12 tasks', '"individual-task-stream"']),
        (Snapshot(scheduler="local", graph_tasks=20_001), ["no graph, as 20001 tasks are more than the 20000", '"groups"']),
        (Snapshot(scheduler="tcp://a:1", dashboard="http://a:8787/status"), ['"http://a:8787/graph"', '"http://a:8787/groups"']),
        (Snapshot(scheduler="threads"), ["--scheduler threads has no dashboard"]),
        (Snapshot(scheduler="local", state="done"), ["went with the run"]),
    ],
    ids=["ours", "too many", "elsewhere", "threads", "over"],
)
def test_where_dask_shows_the_run(now: Snapshot, words: list[str]) -> None:
    text = dask_links(now)
    for word in words:
        assert word in text
    assert ("<a " in text) == (now.scheduler != "threads" and not now.ended)
