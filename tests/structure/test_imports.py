"""Who may import whom: folders in one order, no circle of files, and which modules compute or open files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.places import ROOT

# From the top down: a folder imports from itself and from what is below it. Those of one line know nothing of each other.
FLOORS = (
    ("pipeline.cli",),
    ("pipeline",),
    ("pipeline.jobs",),
    ("pipeline.engine", "pipeline.reporting"),
    ("pipeline.run",),
    ("pipeline.watching",),
    ("pipeline.planning",),
    ("pipeline.calibration",),
    ("pipeline.sinks",),
    ("stages",),
    ("pipeline.model",),
    ("pipeline.tensor",),
    ("pipeline.extensions",),
    ("pipeline.documents",),
    ("pipeline.native",),
    ("pipeline.version",),
    ("pipeline.errors",),
    ("pipeline.printed",),
    ("pipeline.urls",),
)
# The order of verification: each level may use those before it.
VERIFY = (("stages.verify.forward",), ("stages.verify.roundtrip",), ("stages.verify.contract",))
# stage -> what else of `stages` it may import, beside its own folder.
SHARED_STAGES = {
    "cast": {"quantization"},
    "unpack": {"quantization"},
    "quantize": {"quantization"},
    "calibrate": {"verify"},  # transformers' model, and a source's weights as numbers
}

COMPUTE = {"pipeline/run/execute.py", "pipeline/run/schedulers.py"}
OPEN_FILES = (
    "stages/read/",
    "stages/write/open_files.py",
    "stages/build/",  # the builder's log, and the lock on it
    "pipeline/sinks/",
    "pipeline/tensor/chunk_files.py",  # made and renamed
    "pipeline/documents.py",  # JSON and TOML, bounded
    "pipeline/tensor/mapping.py",  # maps what others have opened
    "pipeline/cli/streams.py",  # the null device, in the place of streams that are closed
    "pipeline/engine/log.py",
    "pipeline/engine/output.py",
)
# Small text files: the tables, a job file, and what stands beside the ranks.
OPEN_TEXT = (
    "pipeline/model/table_files.py",
    "pipeline/model/tables.py",  # of which family a text is, before it is parsed
    "pipeline/planning/builder_options.py",
    "pipeline/reporting/html/",
    "pipeline/reporting/graph_drawing.py",
    "pipeline/engine/check.py",
    "pipeline/run/schedulers.py",  # Dask's performance report
    "pipeline/run/looking.py",  # probes of file systems
    "pipeline/run/workers.py",
    "pipeline/watching/live.py",
    "pipeline/watching/look.py",
    "pipeline/tensor/process.py",
    "pipeline/jobs/",
)
TEXT_ONLY = ("pipeline/jobs/history.py", "pipeline/run/looking.py")  # a database for its owner, and its lock; probes


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, of the product."""
    files = [path for folder in ("pipeline", "stages") for path in sorted((ROOT / folder).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


@cache
def imports(module: str) -> frozenset[str]:
    """The modules of the product that a module imports: inside functions and for type checkers alone, too."""
    return frozenset(imported(ast.parse(modules()[module].read_text())))


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules())
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                target = name if name in modules() else str(node.module)
                if target in modules():
                    yield target


def floor(module: str, floors: tuple[tuple[str, ...], ...]) -> int | None:
    """The number of a module's folder in an order, from the top; the longest name that fits counts."""
    fits = [(len(name), n) for n, names in enumerate(floors) for name in names if module == name or module.startswith(f"{name}.")]
    return max(fits)[1] if fits else None


def upward(edges: dict[str, frozenset[str]], floors: tuple[tuple[str, ...], ...]) -> list[str]:
    """The imports that go up, or across to another folder of the same floor."""
    wrong = []
    for module, targets in edges.items():
        here = floor(module, floors)
        for target in targets:
            there = floor(target, floors)
            if here is None or there is None:
                continue
            beside = here == there and len(floors[here]) > 1 and module.split(".")[:2] != target.split(".")[:2]
            if there < here or beside:
                wrong.append(f"{module} -> {target}")
    return sorted(wrong)


def name_of(module: str) -> str:
    return str(modules()[module].relative_to(ROOT))


def calls(module: str) -> set[str]:
    """The last name of each call: `.open` of os.open, `.read_text` of path.read_text, `open`."""
    found = set()
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                found.add(node.func.id)
            elif isinstance(node.func, ast.Attribute):
                found.add(f".{node.func.attr}")
    return found


def edges() -> dict[str, frozenset[str]]:
    return {module: imports(module) for module in modules()}


def test_every_module_has_a_floor_and_there_is_something_to_check() -> None:
    assert all(floor(module, FLOORS) is not None for module in modules())
    assert "stages.shard" in imports("pipeline.planning.compose")
    assert ".open" in calls("stages.write.open_files")
    assert len(modules()) > 150


def test_no_import_goes_up() -> None:
    assert upward(edges(), FLOORS) == []


def test_an_import_that_goes_up_or_across_is_seen() -> None:
    made = {
        "pipeline.tensor.placement": frozenset({"pipeline.model.tables"}),
        "pipeline.engine.run": frozenset({"pipeline.reporting.terminal", "pipeline.run.execute"}),
    }
    assert upward(made, FLOORS) == [
        "pipeline.engine.run -> pipeline.reporting.terminal",
        "pipeline.tensor.placement -> pipeline.model.tables",
    ]


def test_the_levels_of_verification_build_on_one_another() -> None:
    assert upward(edges(), VERIFY) == []


def test_no_circle_of_files() -> None:
    # A package's own __init__ stands for its folder: what it imports of it is no circle.
    graph = {m: {t for t in targets if t != m and not t.startswith(f"{m}.")} for m, targets in edges().items()}
    tuple(TopologicalSorter(graph).static_order())


def test_a_circle_is_seen() -> None:
    with pytest.raises(CycleError):
        tuple(TopologicalSorter({"a": {"b"}, "b": {"c"}, "c": {"a"}}).static_order())


def test_stages_do_not_import_one_another() -> None:
    wrong = []
    for module in modules():
        if module.startswith("stages."):
            stage = module.split(".")[1]
            tree = without_type_checking(ast.parse(modules()[module].read_text()))
            others = {name.split(".")[1] for name in imported(tree) if name.startswith("stages.")}
            wrong += [f"{module} -> stages.{other}" for other in others - {stage} - SHARED_STAGES.get(stage, set())]
    assert wrong == []


def without_type_checking(tree: ast.Module) -> ast.Module:
    body = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))]
    return ast.Module(body, tree.type_ignores)


def test_verification_shares_nothing_with_the_stages_that_write() -> None:
    wrong = [
        f"{module} -> {target}"
        for module in modules()
        if module.startswith("stages.verify")
        for target in imports(module)
        if target.startswith("stages.") and not target.startswith(("stages.verify", "stages.read"))
    ]
    assert wrong == []


def test_of_verification_the_forward_pass_alone_knows_torch() -> None:
    torch = [m for m, path in modules().items() if m.startswith("stages.verify") and "torch" in outside(path.read_text())]
    assert torch
    assert all(module.startswith("stages.verify.forward.") for module in torch)
    reading = [m for m in modules() if m.startswith("stages.verify") and not m.startswith("stages.verify.forward")]
    assert [f"{m} -> {t}" for m in reading for t in imports(m) if t.startswith("stages.verify.forward")] == []


def test_of_the_rest_a_calibration_alone_knows_torch() -> None:
    """What a conversion runs must not import it: the loaders do when they give tensors, a live model when it is one."""
    torch = {m for m, path in modules().items() if "torch" in outside(path.read_text()) and not m.startswith("stages.verify")}
    own = {"awq_inputs", "awq_search", "devices", "experts", "layers", "magnitudes", "speed"}
    assert torch == {*(f"stages.calibrate.{name}" for name in own), "pipeline.run.loaders", "stages.read.live_model"}
    users = {
        m for m in modules() if any(t.startswith("stages.calibrate") for t in imports(m)) and not m.startswith("stages.calibrate")
    }
    assert users == {"pipeline.calibration.awq", "pipeline.calibration.layer_task", "pipeline.calibration.plan"}
    assert {m for m in modules() if "pipeline.calibration.plan" in imports(m)} == {
        "pipeline.cli.calibrate",
        "pipeline.planning.calibrating",
        "pipeline.run.calibrations",
    }


def outside(text: str) -> set[str]:
    """The first names of the packages that a module imports."""
    nodes = list(ast.walk(ast.parse(text)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def test_only_execution_computes() -> None:
    wrong = [m for m in modules() if name_of(m) not in COMPUTE and calls(m) & {".compute", "compute", ".persist", "persist"}]
    assert wrong == []


def test_few_modules_open_files() -> None:
    opening = {"open", ".open", ".mmap", ".memmap", ".fromfile"}
    text = {".read_text", ".read_bytes", ".write_text", ".write_bytes"}
    wrong = [m for m in modules() if not name_of(m).startswith((*OPEN_FILES, *TEXT_ONLY)) and calls(m) & opening]
    wrong += [m for m in modules() if not name_of(m).startswith((*OPEN_FILES, *OPEN_TEXT)) and calls(m) & text]
    assert wrong == []


def test_only_sources_know_their_libraries() -> None:
    known = (
        "stages/read/",
        "stages/quantization/",
        "stages/verify/",
        "stages/calibrate/",
        "pipeline/run/loaders.py",
    )
    wrong = []
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            roots = {name.split(".")[0] for name in names}
            if roots & {"safetensors", "gguf", "torch"} and not name_of(module).startswith(known):
                wrong.append(module)
    assert wrong == []
