"""The Grafana dashboard and the list of metrics in docs/monitoring.md: they name what is exported, and all of it."""

from __future__ import annotations

import json
import re
from itertools import combinations
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline.watching.metrics import DURATIONS, METRICS, Durations, Metrics, Reading, Running
from pipeline.watching.state import Share
from tests.support.places import DOCS, ROOT

FULL = Reading(
    stages={"read": {"bytes": 1.0, "seconds": 1.0}},
    states={"running": 1},
    durations={"done": Durations().plus(3.0)},
    running=(Running("a", 1, 2, 3.0, 4.0, 5.0, 6, 7, 8, 9, (Share("t", 0, 1, 2),)),),
)
INTERNAL = {"$__rate_interval", "$instance", "${datasource}"}


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """{name of a sample: its labels} of everything that there is to export."""
    families = text_string_to_metric_families(Metrics(lambda: FULL).text().decode())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return dict(json.loads((DOCS / "monitoring/grafana.json").read_text()))


def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_a_full_reading_exports_every_metric(exported: dict[str, set[str]]) -> None:
    for row in METRICS:
        assert exported[f"{row.name}_total" if row.kind == "counter" else row.name] == set(row.labels)
    assert {f"{DURATIONS}_bucket", f"{DURATIONS}_count", f"{DURATIONS}_sum"} <= exported.keys()


def test_the_dashboard_asks_for_what_is_exported(dashboard: dict[str, Any], exported: dict[str, set[str]]) -> None:
    asked = expressions(dashboard)
    assert len(asked) > 15
    names = {name for text in asked for name in re.findall(r"\bheadrace_\w+", text)}
    assert names <= exported.keys()
    for text in asked:
        for name, selector in re.findall(r"(headrace_\w+)\{([^}]*)\}", text):
            labels = set(re.findall(r"(\w+)=", selector)) - {"instance"}  # which Prometheus adds itself
            assert labels <= exported[name], text
        assert not re.search(r"headrace_\w+(?![\w{])", text), f"without an instance: {text}"
        assert set(re.findall(r"\$\{?\w+\}?", text)) <= INTERNAL


def test_the_dashboard_shows_all_that_is_exported(dashboard: dict[str, Any], exported: dict[str, set[str]]) -> None:
    text = " ".join(expressions(dashboard))
    assert {name for name in exported if not re.search(rf"\b{name}\b", text)} <= {f"{DURATIONS}_sum"}


def test_legends_name_labels_that_there_are(dashboard: dict[str, Any], exported: dict[str, set[str]]) -> None:
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            (first, *_) = re.findall(r"headrace_\w+", target["expr"])
            grouped = re.search(r"by \(([^)]*)\)", target["expr"])
            there = {word.strip() for word in grouped[1].split(",")} if grouped else exported[first] | {"instance"}
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= there, target


def test_panels_have_their_places(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for a, b in combinations([panel["gridPos"] for panel in panels], 2):
        apart = any(p[at] + p[size] <= q[at] for at, size in (("x", "w"), ("y", "h")) for p, q in ((a, b), (b, a)))
        assert apart, (a, b)
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource", "instance"]


def test_the_text_names_every_metric_and_no_other(exported: dict[str, set[str]]) -> None:
    text = (DOCS / "monitoring.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `headrace_")]
    named = {name for row in rows for name in re.findall(r"`(headrace_\w+)`", row.split("|")[1])}
    families = {name for name in exported if not name.startswith(DURATIONS)} | {DURATIONS}
    assert named == families


def test_the_text_names_every_stage_that_is_metered() -> None:
    """Those that `meter` is given, in its own words or by the tensor or block that it is about."""
    given = re.compile(r'(?:\bmeter\(|\bderive\(|\bstage=|\bstage: str = |\b(?:STAGE|READ_SCRATCH) = )"(\w+)"')
    files = [file for folder in ("pipeline", "stages") for file in (ROOT / folder).rglob("*.py")]
    metered = {name for file in files for name in given.findall(file.read_text())}
    (row,) = (line for line in (DOCS / "monitoring.md").read_text().splitlines() if "`headrace_stage_bytes_total`" in line)
    assert set(row.split("|")[3].partition(";")[0].replace(" ", "").split(",")) == metered
