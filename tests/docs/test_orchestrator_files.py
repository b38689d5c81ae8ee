"""The examples for Prefect, Dagster and Airflow: their commands are ours, and they do a batch, whoever calls their functions."""

from __future__ import annotations

import ast
import os
import runpy
import subprocess
import sys
import types
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli.commands import load
from tests.support import checkpoints, quantized_checkpoints
from tests.support.places import DOCS, ROOT

FOLDER = DOCS / "scheduling"
FILES = ("prefect_flow.py", "dagster_job.py", "airflow_dag.py")
# What an example imports of others, by module.
IMPORTED = {
    "prefect": ("flow", "task"),
    "dagster": (
        "Definitions", "DynamicOut", "DynamicOutput", "Failure", "RetryRequested", "ScheduleDefinition", "job", "op",
    ),
    "airflow.sdk": ("dag", "task"),
    "airflow.sdk.exceptions": ("AirflowFailException",),
}  # fmt: skip


def commands(text: str) -> Iterator[list[str]]:
    """The words of each list that begins with "headrace"; what is no constant is "x"."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.List):
            words = [each.value if isinstance(each, ast.Constant) else "x" for each in node.elts]
            if words[:1] == ["headrace"]:
                yield [str(word) for word in words[1:]]


@pytest.mark.parametrize("name", FILES)
def test_their_commands_are_ours(name: str) -> None:
    found = list(commands((FOLDER / name).read_text()))
    assert [each[0] for each in found] == ["batch", "convert"]
    for name_of, *words in found:
        context = load(name_of).make_context(name_of, words)  # which raises what is wrong with them
        assert (context.args, "x" in str(context.params)) == ([], True)


class Passed(Exception):
    """Stands for what they raise; `options` are its keywords."""

    def __init__(self, *said: object, **options: object) -> None:
        super().__init__(*said)
        self.options = options


def as_it_is(*given: Any, **_: Any) -> Any:
    """A decorator with options or without, which leaves a function as it is."""
    if len(given) == 1 and callable(given[0]):
        return given[0]
    return lambda function: function


class Anything:
    """Stands for what they make and call."""

    def __init__(self, *values: Any, **options: Any) -> None:
        self.value, self.options = (values or (None,))[0], options


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """The names of an example, loaded without its orchestrator; `headrace` is on PATH."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/headrace"
    program.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec {sys.executable} -P -m pipeline.cli "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    for module, names in IMPORTED.items():
        made: Any = types.ModuleType(module)
        for name in names:
            raised = name.endswith(("Failure", "Requested", "Exception"))
            setattr(made, name, Passed if raised else Anything if name[0].isupper() else as_it_is)
        monkeypatch.setitem(sys.modules, module, made)
    monkeypatch.setitem(sys.modules, "airflow", types.ModuleType("airflow"))

    def load(name: str) -> dict[str, Any]:
        # Of the lines of a module those that make a job or a flow of the functions are the orchestrator's.
        tree = ast.parse((FOLDER / name).read_text())
        tree.body = [node for node in tree.body if not isinstance(node, ast.Expr | ast.If) or node is tree.body[0]]
        path = tmp_path / name
        path.write_text(ast.unparse(tree))
        return runpy.run_path(str(path))

    return load


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    """Two conversions of a packed source, which share a cut, one of another, and one that is refused."""
    quantized_checkpoints.write(tmp_path / "packed", quantized_checkpoints.LLAMA, quantized_checkpoints.gptq())
    checkpoints.write(tmp_path / "dense", checkpoints.LLAMA)
    jobs = {"a": "packed", "b": "packed", "c": "dense", "d": "dense"}
    more = {"b": "workers = 1", "d": "tp_size = 3"}
    text = "".join(f'[[job]]\nmodel_dir = "{model}"\noutput_dir = "out/{n}"\n{more.get(n, "")}\n' for n, model in jobs.items())
    (tmp_path / "night.toml").write_text(text)
    return tmp_path / "night.toml"


def rows(names: dict[str, Any], name: str, batch: Path, folder: Path) -> list[list[str]]:
    """What its `plan` gives."""
    plan = names["plan"]
    if name == "prefect_flow.py":
        return list(plan(str(batch), str(folder)))
    plan.__globals__.update(BATCH=str(batch), FOLDER=str(folder))
    made = plan()
    return [each.value for each in made] if name == "dagster_job.py" else list(made)


@pytest.mark.nightly
@pytest.mark.parametrize("name", FILES)
def test_they_do_a_batch(name: str, example: Callable[[str], dict[str, Any]], batch: Path, tmp_path: Path) -> None:
    names, folder = example(name), tmp_path / "jobs"
    planned = rows(names, name, batch, folder)
    assert [[Path(file).name for file in row] for row in planned] == [["000-a.toml", "001-b.toml"], ["002-c.toml"]]
    for row in planned:
        names["convert"](row)
    assert all((tmp_path / f"out/{each}/config.json").exists() for each in "abc")
    assert not list(tmp_path.rglob(".headrace-scratch"))
    with pytest.raises((Passed, subprocess.CalledProcessError)):  # nothing is left but what is refused
        rows(names, name, batch, folder)
    (tmp_path / "broken.toml").write_text("?")
    with pytest.raises((Passed, subprocess.CalledProcessError)) as raised:
        names["convert"]([str(tmp_path / "broken.toml")])
    assert "max_retries" not in getattr(raised.value, "options", {})


@pytest.mark.parametrize("name", ["dagster_job.py", "airflow_dag.py"])
@pytest.mark.parametrize("code", [1, 2, 3, 4])
def test_only_what_may_pass_is_tried_again(name: str, code: int, example: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    names = example(name)
    (tmp_path / "bin/headrace").write_text(f"#!/bin/sh\nexit {code}\n")
    with pytest.raises((Passed, RuntimeError)) as raised:
        names["convert"](["x.toml"])
    again = isinstance(raised.value, RuntimeError) or "max_retries" in getattr(raised.value, "options", {})
    assert again == (code == 3)


def test_prefect_tries_again_what_may_pass(example: Callable[[str], dict[str, Any]]) -> None:
    names = example("prefect_flow.py")

    class State:
        def __init__(self, error: Exception) -> None:
            self.error = error

        def result(self, raise_on_failure: bool) -> Exception:
            assert not raise_on_failure
            return self.error

    for error, again in ((3, True), (2, False), (1, False)):
        assert names["may_pass"](None, None, State(subprocess.CalledProcessError(error, "headrace"))) is again
    assert names["may_pass"](None, None, State(ValueError())) is False


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("example")  # which puts `headrace` on PATH
def test_the_flow_in_prefect_itself(batch: Path, tmp_path: Path) -> None:
    """In an environment of its own."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    installed = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "prefect>=3"], capture_output=True, text=True, check=False
    )
    if installed.returncode:
        pytest.skip(f"prefect cannot be installed here: {installed.stderr.strip().splitlines()[-1:]}")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PREFECT_HOME": str(tmp_path / "prefect"), "DO_NOT_TRACK": "1"}
    environment |= {"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300"}
    command = [python, FOLDER / "prefect_flow.py", batch, tmp_path / "jobs"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert all((tmp_path / f"out/{each}/config.json").exists() for each in "abc")
