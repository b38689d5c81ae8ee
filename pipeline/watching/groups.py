"""Dask's pages of tasks, for as many as a run has, and of task groups, laid out so that it can draw a run's stages.

Dask's own layout takes the groups in an order without regard to what they wait for (dask 2026.8), and fails where a group comes
before one that it waits for. It fails too where groups wait for one another in a circle. The tasks of a run have none, but its
stages can: later chunks of scratch wait until earlier ones are read, so `scratch` waits for `write`, and `write` for `scratch`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from graphlib import TopologicalSorter
from typing import Any

from distributed.dashboard.components import scheduler as components

from pipeline.planning.dask_graph import ORDER
from pipeline.watching.nodes import GRAPH_MAX_ITEMS

PLACES = {stage: place for place, stage in enumerate(ORDER)}
MILLISECONDS = 200  # between two looks at the scheduler


def graph_page(scheduler: Any, extra: Mapping[str, Any], document: Any) -> None:
    """Fill a Bokeh document with the tasks of a scheduler, up to GRAPH_MAX_ITEMS; the arguments are those of Dask's pages."""
    graph = components.TaskGraph(scheduler, sizing_mode="stretch_both")
    graph.max_items = GRAPH_MAX_ITEMS
    _fill(document, graph, "Dask: Task Graph", extra)


def groups_page(scheduler: Any, extra: Mapping[str, Any], document: Any) -> None:
    """Fill a Bokeh document with the task groups of a scheduler; the arguments are those of Dask's pages."""
    _fill(document, StageGroups(scheduler, sizing_mode="stretch_both"), "Dask: Task Groups Graph", extra)


def _fill(document: Any, graph: Any, title: str, extra: Mapping[str, Any]) -> None:
    document.title = title
    graph.update()
    components.add_periodic_callback(document, graph, MILLISECONDS)
    document.add_root(graph.root)
    document.template = components.env.get_template("simple.html")
    document.template_variables.update(extra)
    document.theme = components.BOKEH_THEME


class StageGroups(components.TaskGroupGraph):  # type: ignore[misc]
    """Dask's drawing of task groups, with a layout of its own."""

    def update_layout(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the column and row of each group, and the arrows that end at it."""
        groups = self.scheduler.task_groups
        waits = without_circles({name: {each.name for each in group.dependencies} for name, group in groups.items()})
        places = columns_and_rows(waits)
        nodes = {name: {"x": x, "y": y} for name, (x, y) in places.items()}
        return nodes, {name: {"nstart": before, "nend": [name] * len(before)} for name, before in waits.items()}


def columns_and_rows(dependencies: Mapping[str, Collection[str]]) -> dict[str, tuple[int, int]]:
    """Place groups: each right of all that it waits for, in the first row that is free there. There is no circle among them."""
    places: dict[str, tuple[int, int]] = {}
    for name in TopologicalSorter(dependencies).static_order():
        x = max((places[before][0] + 1 for before in dependencies[name]), default=0)
        places[name] = x, sum(column == x for column, _ in places.values())
    return places


def without_circles(dependencies: Mapping[str, Collection[str]]) -> dict[str, set[str]]:
    """Leave out the edges that close a circle: first go those against the order of the work that start last.

    `dependencies`: for each group, those that it waits for.
    """

    def place(name: str) -> int:
        return PLACES.get(name, len(PLACES))

    edges = [(before, group) for group, all_before in dependencies.items() for before in all_before if before in dependencies]
    kept: dict[str, set[str]] = {group: set() for group in dependencies}
    for before, group in sorted(edges, key=lambda edge: (place(edge[0]) >= place(edge[1]), place(edge[0]), edge)):
        if group not in _all_before(before, kept):
            kept[group].add(before)
    return kept


def _all_before(group: str, dependencies: Mapping[str, Collection[str]]) -> set[str]:
    """A group and all that it waits for, however far."""
    found, left = {group}, [group]
    while left:
        new = set(dependencies[left.pop()]) - found
        found |= new
        left += new
    return found
