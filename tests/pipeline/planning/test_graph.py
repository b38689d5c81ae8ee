"""The graph of a plan: its nodes agree with the Dask graph that runs, and its line, DOT and SVG say them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import pipeline.planning.make_plan as planning
from pipeline import convert, plan
from pipeline.planning.graph import PlanGraph
from pipeline.planning.graph_nodes import GraphEdge, GraphNode
from pipeline.planning.plans import Plan
from tests.support import checkpoints, quantized_checkpoints

CUTS: tuple[list[str], ...] = ([], ["unpack"], ["read", "shard"])
HOSTILE = "</title><script>alert(1)</script>\"'&lt;\\N {} \u202e\x1b\x00\ud800" + "long" * 20


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(planning, "block_bytes", lambda *_: 20_000)  # many groups of a small model
    checkpoints.write(tmp_path / "model", quantized_checkpoints.LLAMA)
    return tmp_path / "model"


def planned(model: Path, after: list[str], **options: Any) -> Plan:
    tables = [
        {"output_dir": model.parent / "int8", "tp_size": 2, "use_weight_only": True},
        {"output_dir": model.parent / "dense", "tp_size": 1, "dtype": "bfloat16"},
    ]
    return plan(model_dir=model, target=tables, scratch_after=after, **options)


@pytest.mark.parametrize("after", CUTS)
def test_nodes_have_the_tasks_and_edges_of_the_dask_graph(model: Path, after: list[str]) -> None:
    made = planned(model, after)
    graph, dask = made.graph(), made.dask
    found: Counter[str] = Counter()
    for node in graph.nodes:
        found[node.name] += node.tasks
    assert +found == {name: len(layer) for name, layer in dask.layers.items()}
    assert found["read"] > 1
    # An edge between two stages of the collapsed graph is one between their layers, or goes through a place of scratch.
    stage = {node.id: node.name for node in graph.nodes if node.kind == "stage"}
    into = {edge.end: stage[edge.start] for edge in graph.edges if edge.end.startswith("scratch.")}
    pairs = {(stage.get(edge.start) or into.get(edge.start), stage.get(edge.end)) for edge in graph.edges}
    drawn = {(a, b) for a, b in pairs if a and b and a != b}
    # `finish` also waits for the tasks that write scratch, of which it notes the seconds.
    assert drawn == {(a, b) for b, befores in dask.dependencies.items() for a in befores} - {("scratch", "finish")}


@pytest.mark.parametrize("after", CUTS)
def test_nodes_have_the_bytes_of_the_plan(model: Path, after: list[str]) -> None:
    made = planned(model, after)
    nodes = {node.id: node for node in made.graph().nodes}
    assert nodes["source"].nbytes == made.source.nbytes
    assert nodes["0.read"].nbytes == sum(store.source_bytes for store in made.phases[0].stores)
    assert nodes[f"{len(made.phases) - 1}.write"].nbytes == made.phases[-1].written_bytes((0, 1))
    assert [nodes[f"output.{n}"].nbytes for n in (0, 1)] == [target.output.size_bytes for target in made.targets]
    assert [nodes[f"output.{n}"].place for n in (0, 1)] == [str(target.output.directory) for target in made.targets]
    assert [node.place for node in nodes.values() if node.kind == "scratch"] == [cut.place for cut in made.scratch]


def test_the_line(model: Path) -> None:
    dense = plan(model_dir=model, output_dir=model.parent / "out").graph()
    tasks = dense.nodes[1].tasks
    assert dense.line() == f"source -> read {tasks} -> rename {tasks} -> write {tasks} -> finish 1 -> out"
    cut = planned(model, ["unpack"]).graph().line()
    assert " -> zarr after unpack -> " in cut
    assert cut.endswith(" -> finish 2 -> int8, dense")


def test_what_is_there_already_is_marked(model: Path) -> None:
    options = {"model_dir": model, "output_dir": model.parent / "out", "scratch_after": ["unpack"], "keep_scratch": True}
    assert not any(node.done for node in plan(**options).graph().nodes)
    convert(**options, scheduler="threads")
    assert [node.name for node in plan(**options).graph().nodes if not node.done] == ["model"]
    again = plan(**options, overwrite=True).graph()
    assert [node.name for node in again.nodes if node.done] == ["read", "rename", "scratch", "after unpack"]


def test_engines_follow_their_outputs(model: Path) -> None:
    job = model.parent / "job.toml"
    job.write_text('model_dir = "model"\n[[target]]\noutput_dir = "a"\n[engine]\noutput_dir = "a-engine"\n')
    graph = plan(job).graph()
    assert graph.nodes[-1].place == str(model.parent / "a-engine")
    assert {GraphEdge("output.0", "0.build"), GraphEdge("0.build", "engine.0")} < set(graph.edges)
    assert graph.line().endswith("-> a -> build 1 -> engine a-engine")


def hostile() -> PlanGraph:
    nodes = [GraphNode(name, "scratch", HOSTILE, 1, 7, HOSTILE, HOSTILE) for name in "abc"]
    rows = ((tuple(nodes[:1]), tuple(nodes[1:2])), ((nodes[2],),))
    return PlanGraph(rows, (GraphEdge("a", "b"), GraphEdge("b", "c"), GraphEdge("b", "a")))


def test_text_of_files_is_text_in_svg() -> None:
    text = hostile().to_svg()
    tree = ElementTree.fromstring(text)
    tags = Counter(element.tag.rpartition("}")[2] for element in tree.iter())
    assert (tags["script"], tags["title"], tags["marker"]) == (0, 3, 1)
    titles = [element.text for element in tree.iter() if element.tag.endswith("}title")]
    assert all(title and title.startswith("</title><script>") and "\\x1b\\x00\\ud800" in title for title in titles)
    text.encode()


def test_text_of_files_is_text_in_dot() -> None:
    text = hostile().to_dot()
    line = next(line for line in text.splitlines() if line.startswith('  "a" ['))
    # Without escaped characters, quotes come in pairs around the values.
    plain = line.replace("\\\\", "").replace('\\"', "")
    assert plain.count('"') == 2 * len(["id", "label", "tooltip", "style", "class"])
    assert "&amp;lt;" in plain
    assert text.count("\n") == 5 + 3 + 3 + 1 - 1
    text.encode()


def test_the_picture_knows_light_and_dark_and_keeps_boxes_apart(model: Path) -> None:
    graph = planned(model, ["read", "shard"]).graph()
    text = graph.to_svg()
    assert "prefers-color-scheme: dark" in text
    tree = ElementTree.fromstring(text)
    width, height = (float(tree.attrib[name]) for name in ("width", "height"))
    boxes = []
    for group in tree.iter("{http://www.w3.org/2000/svg}g"):
        words = [element for element in group if element.tag.endswith("}text")]
        boxes.append((float(words[0].attrib["x"]), float(words[0].attrib["y"])))
    assert len(boxes) == len(graph.nodes)
    assert all(74 <= x <= width - 74 and 0 < y < height for x, y in boxes)
    assert all(abs(a[0] - b[0]) > 148 or abs(a[1] - b[1]) > 60 for n, a in enumerate(boxes) for b in boxes[n + 1 :])
