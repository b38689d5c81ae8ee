"""The nodes of a run's graph, and how they are drawn."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from pipeline import plan
from pipeline.planning.build_steps import BuildStep
from pipeline.run.execute import execute
from pipeline.watching.charts import MOST_POINTS, bar_rows, clock, thinned, timeline
from pipeline.watching.graph_drawing import LIFT, MOST_OUTPUTS, graph_svg
from pipeline.watching.groups import columns_and_rows, without_circles
from pipeline.watching.nodes import LiveNode, StageProgress
from pipeline.watching.state import RunWatch, Share, Snapshot
from stages.build import BuilderCall
from stages.build.builders import Builder
from tests.support import checkpoints, quantized_checkpoints

SCHEDULERS = ["threads", "local"]


def watched(tmp_path: Path, kind: str, **options: object) -> Snapshot:
    """The last snapshot of a conversion of two small targets, in some groups."""
    source = tmp_path / "model"
    if kind == "dense":
        checkpoints.write(source, checkpoints.LLAMA)
    else:
        quantized_checkpoints.write(source, quantized_checkpoints.LLAMA, quantized_checkpoints.gptq())
    targets = [{"output_dir": tmp_path / "one"}, {"output_dir": tmp_path / "two", "tp_size": 2}]
    watch = RunWatch()
    execute(plan(model_dir=source, target=targets, workers=1, **options), watch=watch)
    return watch.snapshot()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(
    ("kind", "after", "stages"),
    [
        ("dense", "none", ["read", "rename", "write"]),
        ("dense", "rename", ["read", "rename", "scratch", "write"]),
        ("gptq", "unpack", ["read", "rename", "unpack", "scratch", "quantize", "write"]),
    ],
)
def test_all_stages_of_a_run_are_done_at_its_end(
    kind: str, after: str, stages: list[str], scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.planning.make_plan.block_bytes", lambda _: 20_000)
    now = watched(tmp_path, kind, scratch_after=after, scheduler=scheduler)
    nodes = {node.name: node for node in now.nodes}
    assert list(nodes) == [*stages, "finish"]
    assert all(node.done_tasks == node.tasks > 0 for node in now.nodes)
    assert now.graph_tasks == sum(node.tasks for node in now.nodes)
    assert nodes["finish"].tasks == 2
    assert now.whole == ("one", "two") or now.whole == ("two", "one")
    assert nodes["write"].nbytes == sum(share.total_bytes for share in now.ranks)
    assert nodes["write"].seconds > 0
    assert {("source", "read"), ("write", "finish")} < set(now.edges)
    if after == "none":
        assert nodes["read"].nbytes == now.bytes_read
    else:
        assert now.total_bytes == nodes["write"].nbytes + nodes["scratch"].nbytes
        assert 1.0 <= nodes["read"].nbytes / now.bytes_read < 1.05  # scales are looked at more than once
        first = stages[stages.index("scratch") + 1]
        assert {(stages[stages.index("scratch") - 1], "scratch"), ("scratch", first)} < set(now.edges)


def builder_call(name: str) -> BuilderCall:
    return BuilderCall(name, Builder(), (), Path(), Path(), Path())


def test_engines_stand_behind_the_outputs() -> None:
    steps = [BuildStep(builder_call(f"rank {n}"), Path("/engines/one"), 0) for n in (0, 1)]
    steps.append(BuildStep(builder_call("x"), Path("/engines/two")))
    progress = StageProgress((), 1, steps)
    assert progress.edges[-1] == ("finish", "build")
    progress.built("rank 1", 2.0, failed=False)
    progress.built("x", 0.5, failed=True)
    now = Snapshot(
        nodes=progress.nodes(),
        edges=progress.edges,
        engines=progress.engines(),
        ranks=(Share("out", 0, 5, 10),),
    )
    texts = drawn(now)
    assert texts[texts.index("build") :] == [
        *("build", "TensorRT-LLM's", "own builder", "2.5 s", "2 of 3 tasks"),
        *("one", "1 of 2 built", "two", "failed"),
    ]
    assert texts.index("finish") < texts.index("out") < texts.index("build")
    assert '<g class="failed">' in graph_svg(now)


def test_a_run_whose_builds_fail_has_failed(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    made, call = plan(model_dir=tmp_path / "model", output_dir=tmp_path / "out"), builder_call("x")
    for failed, state in ((True, "failed"), (False, "done")):
        watch = RunWatch()
        watch.started(made, "", 0, 0, 0)
        watch.bound((), [BuildStep(call, Path("e"))])
        watch.built("x", 1.0, failed)
        watch.finished()
        assert watch.snapshot().state == state


def test_a_run_that_has_no_groups_has_no_nodes() -> None:
    assert StageProgress().nodes() == ()
    assert StageProgress().graph_tasks == 0


def drawn(now: Snapshot) -> list[str]:
    """The texts of a drawing, which is well formed."""
    root = ET.fromstring(graph_svg(now))
    return [str(each.text) for each in root.iter("text")]


def test_the_graph_is_drawn_with_its_numbers() -> None:
    now = Snapshot(
        source_kind="Hugging Face safetensors",
        source_bytes=3 << 30,
        nodes=(LiveNode("read", 8, 2, 2 << 30, 4.0), LiveNode("write", 8, 2, 1 << 30, 1.0), LiveNode("finish", 2, 1)),
        edges=(("source", "read"), ("read", "write"), ("write", "finish")),
        ranks=(Share("a<b", 0, 5 << 20, 10 << 20), Share("a<b", 1, 5 << 20, 10 << 20), Share("other", 0, 4 << 20, 4 << 20)),
        whole=("other",),
    )
    assert drawn(now) == [
        *("source", "Hugging Face", "safetensors", "3.0 GiB", "2.0 GiB read"),
        *("read", "2.0 GiB", "4.0 s", "0.54 GB/s", "2 of 8 tasks"),
        *("write", "1.0 GiB", "1.0 s", "1.07 GB/s", "2 of 8 tasks"),
        *("finish", "renames files,", "config.json last", "1 of 2 outputs"),
        *("a<b", "10.0 MiB of 20.0 MiB"),
        *("other", "4.0 MiB, whole"),
    ]


def test_an_edge_over_other_stages_is_an_arc_and_many_outputs_are_counted() -> None:
    nodes = tuple(LiveNode(name, 1) for name in ("cast", "quantize", "write"))
    ranks = tuple(Share(f"output {n}", 0, 0, 1) for n in range(MOST_OUTPUTS + 3))
    text = graph_svg(Snapshot(nodes=nodes, edges=(("cast", "write"), ("cast", "quantize")), ranks=ranks))
    paths = [path.get("d", "") for path in ET.fromstring(text).iter("path") if path.get("class") == "edge"]
    starts = [[float(number) for number in re.split("[MC ]", path)[1:5]] for path in paths]
    assert [rise for _, y, _, control in starts if (rise := y - control)] == [pytest.approx(1.2 * LIFT)]
    assert "and 3 more" in text


def test_charts_are_well_formed_and_escape_names() -> None:
    points = [(float(n), float(n << 20)) for n in range(1000)]
    root = ET.fromstring(timeline("Memory", points, colour="teal", limit=2 << 30))
    (line,) = root.iter("polyline")
    assert len(line.get("points", "").split()) == MOST_POINTS
    texts = [text.text for text in root.iter("text")]
    assert texts[:3] == ["0", "1.2 GiB", "2.5 GiB"]
    assert texts[3:] == ["0:00", "8:20", "16:39"]
    rows = ET.fromstring(bar_rows("Ranks", [(("<a>", "rank 0"), 0.5, "5 B"), (("<a>", "rank 1"), 2.0, "9 B")], colour="teal"))
    assert [each.text for each in rows.iter("th")] == ["<a>", "rank 0", None, "rank 1"]
    assert [each.get("style") for each in rows.iter("div") if each.get("style")] == ["width:50.0%", "width:100.0%"]


def test_the_times_of_an_axis() -> None:
    assert [clock(seconds) for seconds in (0, 7.4, 60, 3599.6)] == ["0:00", "0:07", "1:00", "1:00:00"]


def test_a_long_line_keeps_its_means_and_its_end() -> None:
    points = [(float(n), 2.0 if n % 2 else 0.0) for n in range(10 * MOST_POINTS)]
    kept = thinned(points)
    assert len(kept) == MOST_POINTS
    assert kept[-1] == points[-1]
    assert {y for _, y in kept[:-1]} == {1.0}


CHAIN = {
    "read": set(),
    "rename": {"read"},
    "scratch": {"rename", "write"},
    "cast": {"scratch"},
    "quantize": {"cast"},
    "write": {"cast", "quantize"},
    "finish": {"write"},
}


def test_groups_that_wait_in_a_circle_are_laid_out() -> None:
    kept = without_circles(CHAIN)
    assert kept == {**CHAIN, "scratch": {"rename"}}
    assert columns_and_rows(kept) == {name: (place, 0) for place, name in enumerate(CHAIN)}


def test_groups_without_a_circle_keep_all_and_share_a_column() -> None:
    branches = {"z": set(), "a": {"z"}, "b": {"z"}, "c": {"a", "b"}}
    assert without_circles(branches) == branches
    places = columns_and_rows(branches)
    assert places["z"] == (0, 0)
    assert {places["a"], places["b"]} == {(1, 0), (1, 1)}
    assert places["c"][0] == 2
