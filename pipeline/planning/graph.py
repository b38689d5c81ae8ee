"""The graph of a plan as people look at it: a node for each stage with all its tasks, and for each place of bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from pipeline.planning.bind import STAGES, stages_of_group
from pipeline.planning.graph_dot import dot_text
from pipeline.planning.graph_nodes import GraphEdge, GraphNode
from pipeline.planning.graph_svg import svg_text
from pipeline.planning.phases import Phase, Phased
from pipeline.sinks.remote import RemoteGroup
from pipeline.sinks.scratch import ScratchGroup

Row = tuple[tuple[GraphNode, ...], ...]  # columns from left to right, each of nodes that stand below one another


@dataclass(frozen=True)
class PlanGraph:
    """A plan's graph, collapsed. `rows`: its columns of nodes in the order in which bytes pass them, a row for each phase."""

    rows: tuple[Row, ...]
    edges: tuple[GraphEdge, ...] = field(repr=False)

    @property
    def nodes(self) -> tuple[GraphNode, ...]:
        """All nodes, in the order in which bytes pass them."""
        return tuple(node for row in self.rows for column in row for node in column)

    def line(self) -> str:
        """The graph in one line: `source -> read 14 -> rename 14 -> write 14 -> finish 1 -> out`."""
        columns = (", ".join(_short(node) for node in column) for row in self.rows for column in row)
        return " -> ".join(columns)

    def to_dot(self) -> str:
        """The graph in Graphviz's language."""
        return dot_text(self.rows, self.edges)

    def to_svg(self) -> str:
        """The graph as an SVG picture, which follows the viewer's light or dark colour scheme."""
        return svg_text(self.rows, self.edges)


def _short(node: GraphNode) -> str:
    if node.kind == "stage":
        return f"{node.name} {node.tasks}"
    return {"source": "source", "scratch": f"zarr {node.name}", "engine": f"engine {node.name}"}.get(node.kind, node.name)


def collapse(
    plan: Phased,
    source: GraphNode,
    outputs: Sequence[GraphNode],
    engines: Sequence[tuple[int, GraphNode]],
    builds: int = 0,
    layers: int = 0,
) -> PlanGraph:
    """Make the graph of a plan's phases between its source, its outputs and their engines.

    `outputs`: of the last phase's sinks. `engines`: each with the number of the output that it is built from. `builds`: the tasks
    that build them. `layers`: the decoder layers that are calibrated first.
    """
    rows: list[Row] = []
    edges: dict[GraphEdge, None] = {}
    cuts: dict[str, GraphNode] = {}
    for number, phase in enumerate(plan.phases):
        last = "write" if number == len(plan.phases) - 1 else "scratch"
        passed = _passed(plan, number, last)
        done = all(node.done for node in outputs) if last == "write" else not phase.pending
        stages = [
            GraphNode(f"{number}.{name}", "stage", name, tasks, nbytes, done=done) for name, (tasks, nbytes) in passed.tasks.items()
        ]
        edges |= {GraphEdge(f"{number}.{a}", f"{number}.{b}"): None for a, b in passed.edges}
        edges |= {GraphEdge(source.id, node.id): None for node in stages if node.name == "read"}
        edges |= {GraphEdge(cuts[place].id, f"{number}.{stage}"): None for place, stage in passed.opens}
        row: list[tuple[GraphNode, ...]] = [*([(source,)] if not rows else []), *((stage,) for stage in stages)]
        if passed.measures and layers:
            calibrate = GraphNode("calibrate", "stage", "calibrate", layers, detail="a layer a task", done=done)
            row[0 if rows else 1] = (*row[0 if rows else 1], calibrate)
            edges |= {GraphEdge(source.id, calibrate.id): None}
            edges |= {GraphEdge(calibrate.id, f"{number}.{stage}"): None for stage in passed.measures}
        if last == "write":
            finish = GraphNode(f"{number}.finish", "stage", "finish", len(outputs), done=done)
            row += [(finish,), tuple(outputs)]
            edges |= {GraphEdge(stages[-1].id, finish.id): None, **{GraphEdge(finish.id, node.id): None for node in outputs}}
            if engines:
                build = GraphNode(f"{number}.build", "stage", "build", builds)
                row += [(build,), tuple(node for _, node in engines)]
                for of, node in engines:
                    edges |= {GraphEdge(outputs[of].id, build.id): None, GraphEdge(build.id, node.id): None}
        else:
            made = _cuts(phase, len(cuts))
            cuts |= {node.place: node for node in made}
            row.append(made)
            edges |= {GraphEdge(stages[-1].id, node.id): None for node in made}
        rows.append(tuple(row))
    return PlanGraph(tuple(rows), tuple(edges))


def _cuts(phase: Phase, before: int) -> tuple[GraphNode, ...]:
    """The nodes of a phase's cuts, which are numbered from `before`."""
    name = phase.name.removeprefix("scratch ")
    return tuple(
        GraphNode(f"scratch.{before + n}", "scratch", name, 0, phase.written_bytes((n,)), place, "Zarr", phase.sinks[n].complete)
        for n, place in enumerate(_places(phase))
    )


def _places(phase: Phase) -> list[str]:
    return [sink.place for sink in phase.sinks if isinstance(sink, ScratchGroup | RemoteGroup)]


@dataclass
class _Passed:
    """The stages of a phase: tasks and bytes by stage, which follows which, and which opens chunks of which place.

    `measures`: those that take ranges which are measured in the same run.
    """

    tasks: dict[str, tuple[int, int]] = field(default_factory=dict)
    edges: dict[tuple[str, str], None] = field(default_factory=dict)
    opens: dict[tuple[str, str], None] = field(default_factory=dict)
    measures: dict[str, None] = field(default_factory=dict)


def _passed(plan: Phased, number: int, last: str) -> _Passed:
    phase = plan.phases[number]
    sinks = range(len(phase.sinks))
    places = _places(plan.phases[number - 1]) if number else []
    groups: Counter[str] = Counter()
    # Of each store, by its position in the phase, and by the stages that groups pass, which are mostly the same ones.
    elements: dict[tuple[str, ...], Counter[int]] = {}
    positions = {id(store): n for n, store in enumerate(phase.stores)}
    result = _Passed()
    for index, group in enumerate(phase.groups):
        stages, _, openers, inputs, _ = stages_of_group(plan, number, index, sinks)
        names = tuple([stage for stage, _ in stages])
        if inputs.layer >= 0:
            result.measures["quantize" if "quantize" in names else last] = None
        result.edges |= dict.fromkeys(pairwise([*names, last]))
        groups.update(names)
        counts = elements.setdefault(names, Counter())
        for store, chunk in group:
            counts[positions[id(store)]] += store.block_elements(chunk)
        for chunk_name, stage in openers.items():
            result.opens[next(place for place in places if chunk_name.startswith(f"{place}/")), stage or last] = None
    for name in STAGES:
        if name in groups:
            passed = sum((counts for names, counts in elements.items() if name in names), Counter[int]())
            nbytes = sum(phase.stores[n].share_bytes(count) for n, count in passed.items())
            result.tasks[name] = groups[name], nbytes
    result.tasks[last] = len(phase.groups), phase.written_bytes(sinks)
    return result
