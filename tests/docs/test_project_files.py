"""The files that people and services begin with: workflows, hooks, forms for issues, make's targets, links of the pages."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.places import DOCS, ROOT

MAKEFILE = (ROOT / "Makefile").read_text()
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
PAGES = [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]


def phony() -> set[str]:
    return {name for line in re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE) for name in line.split()}


def jobs(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())["jobs"]
    return found


def test_make_help_lists_every_target() -> None:
    make = shutil.which("make")
    assert make
    ran = subprocess.run([make, "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = dict(re.findall(r"^make (\w+) +(.+)$", ran.stdout, re.MULTILINE))
    assert set(listed) == phony()
    assert len(listed) >= 6


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_asks_for_what_there_is(path: Path) -> None:
    for job in jobs(path).values():
        called = job.get("uses")
        assert called is None or (ROOT / called).is_file()
        for step in job.get("steps", []):
            assert ("uses" in step) != ("run" in step)
            assert set(re.findall(r"\bmake ([a-z]+)", step.get("run", ""))) <= phony()
        assert set([job["needs"]] if isinstance(job.get("needs"), str) else job.get("needs", [])) <= set(jobs(path))


def test_only_publishing_may_ask_for_a_token() -> None:
    for path in WORKFLOWS:
        whole = yaml.safe_load(path.read_text())
        assert whole["permissions"] == {"contents": "read"}
        asking = [name for name, job in whole["jobs"].items() if "permissions" in job]
        assert asking == (["publish"] if path.name == "release.yml" else [])


def test_a_release_is_a_version_that_the_changelog_knows() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.search(rf"^## \[?{re.escape(version)}(\]| |$)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_hooks_run_what_make_check_runs() -> None:
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    tools = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in local["hooks"]}
    assert tools == set(re.findall(r"\$\(BIN\)/(ruff|mypy)", MAKEFILE))


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_a_form_can_be_filled_in(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    assert form["name"]
    assert form["description"]
    questions = [item for item in form["body"] if item["type"] != "markdown"]
    names = [item["id"] for item in questions]
    assert len(names) == len(set(names)) >= 4
    assert all(item["attributes"]["label"] for item in questions)
    assert any(item.get("validations", {}).get("required") for item in questions)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", text):
        target = path.parent / link if link else path
        assert target.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}, anchor


def test_the_licence_is_the_one_that_the_package_names() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert "Apache-2.0" in str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"])
