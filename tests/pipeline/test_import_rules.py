"""Who may import whom, who computes, and who opens files: the structure of the code, checked on its syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipeline
import stages

ROOTS = [Path(module.__file__ or "").parent for module in (pipeline, stages)]
FILES = {str(path.relative_to(root.parent)): path for root in ROOTS for path in sorted(root.rglob("*.py"))}

VALUES = {
    "derived",
    "quantization",
    "rotary",
    "tensors",
    "dtypes",
    "parallelism",
    "model_config",
    "operations",
    "placement",
    "tables",
    "errors",
    "metering",
    "reserve",
    "checkpoint",
}
IMPORT_STAGES = {
    "pipeline/planning.py",
    "pipeline/lower.py",
    "pipeline/inspection.py",
    "pipeline/verification.py",
    "pipeline/engine/check.py",
    "pipeline/engine/run.py",
}
COMPUTE = {"pipeline/execute.py", "pipeline/schedulers.py"}
OPEN_FILES = (
    "stages/read/",
    "stages/write.py",
    "stages/rank_file.py",
    "pipeline/reserve.py",
    "pipeline/journal.py",
    "pipeline/scratch.py",
    # The builder's log, and the lock on it.
    "stages/build.py",
    "pipeline/engine/log.py",
    "pipeline/engine/output.py",
)
# Small text files: the tables, a job file, and what stands beside the ranks.
OPEN_TEXT = (
    "pipeline/tables.py",
    "pipeline/execute.py",
    "pipeline/job.py",
    "pipeline/output.py",
    "pipeline/page/",
    "pipeline/engine/options.py",
    "pipeline/engine/check.py",
    "pipeline/watching/process.py",
    "pipeline/jobs/files.py",
    "pipeline/jobs/secret.py",
    "pipeline/jobs/process.py",
    "pipeline/jobs/lock.py",
)
TEXT_ONLY = (
    "pipeline/output.py",  # headrace.json and config.json, and the directory itself, to have them on disk
    "pipeline/jobs/lock.py",  # the pid of who holds it
)

each_file = pytest.mark.parametrize("name", FILES)


def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(), name)


def imports(node: ast.AST, *, typing: bool = False) -> Iterator[str]:
    """Modules imported at run time, in functions too; with `typing`, also those for type checkers alone."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and not typing:
        for child in node.orelse:
            yield from imports(child)
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        for alias in node.names:
            # `from pipeline import tables` imports a module too.
            yield f"{node.module}.{alias.name}" if node.module in ("pipeline", "stages") else str(node.module)
    for child in ast.iter_child_nodes(node):
        yield from imports(child, typing=typing)


def calls(name: str) -> Iterator[str]:
    """The last name of each call, with the one before it: `os.open`, `path.read_text` as `.read_text`, `open`."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                yield node.func.id
            elif isinstance(node.func, ast.Attribute):
                yield f".{node.func.attr}"


def test_there_is_something_to_check() -> None:
    assert {"pipeline/planning.py", "stages/shard.py", "stages/read/mapped.py"} <= FILES.keys()
    assert "stages.shard" in set(imports(tree("pipeline/planning.py")))
    assert ".open" in set(calls("stages/write.py"))


@each_file
def test_stages_import_only_values_from_pipeline(name: str) -> None:
    if name.startswith("stages"):
        found = {module.split(".")[1] for module in imports(tree(name), typing=True) if module.startswith("pipeline.")}
        assert found <= VALUES


@each_file
def test_stages_do_not_import_one_another(name: str) -> None:
    package = name.removesuffix(".py").split("/")[1]
    if name.startswith("stages"):
        found = {module.split(".")[1] for module in imports(tree(name)) if module.startswith("stages.")}
        # unpack and quantize find their formats in the folder.
        assert found <= {package} | ({"quantization"} if package in ("unpack", "quantize") else set())


@each_file
def test_only_planning_and_lowering_import_stages(name: str) -> None:
    if name.startswith("pipeline") and name not in IMPORT_STAGES:
        assert not [module for module in imports(tree(name)) if module.split(".")[0] == "stages"]


@each_file
def test_values_know_nothing_of_how_work_is_run(name: str) -> None:
    if name.removeprefix("pipeline/").removesuffix(".py") in VALUES:
        found = {module.split(".")[1] for module in imports(tree(name)) if module.startswith("pipeline.")}
        assert found <= VALUES


@each_file
def test_only_execution_computes(name: str) -> None:
    if name not in COMPUTE:
        assert {".compute", "compute", ".persist", "persist"}.isdisjoint(calls(name))


@each_file
def test_only_read_and_write_open_files(name: str) -> None:
    if not name.startswith((*OPEN_FILES, *OPEN_TEXT)):
        opening = {"open", ".open", ".read_text", ".read_bytes", ".write_text", ".write_bytes", ".mmap", ".memmap", ".fromfile"}
        assert opening.isdisjoint(calls(name))
    if not name.startswith((*OPEN_FILES, *TEXT_ONLY)):
        assert {"open", ".open", ".mmap", ".memmap", ".fromfile"}.isdisjoint(calls(name))


@each_file
def test_only_sources_know_their_libraries(name: str) -> None:
    if not name.startswith(("stages/read/", "stages/quantization/", "stages/verify/")):
        # What loaders give is torch's, and so is what is verified with.
        known = {"torch"} if name in ("pipeline/loaders.py", "pipeline/verification.py") else set()
        assert ({"safetensors", "gguf", "torch"} - known).isdisjoint(module.split(".")[0] for module in imports(tree(name)))
