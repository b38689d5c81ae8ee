"""Habits of the text itself: a class's name means one thing, docstrings say it plainly, imports stand at the top of a module."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from tests.support.places import ROOT

FOLDERS = ("pipeline", "stages")

# Imports inside functions, by module: the first name of another package, the whole name of a module of ours.
LATE_IMPORTS: Mapping[str, set[str]] = {
    # `import headrace` loads neither numpy nor pydantic: a call of the API does.
    "pipeline/api.py": {
        "pipeline.engine.log",
        "pipeline.engine.requests",
        "pipeline.engine.run",
        "pipeline.planning.engine_options",
        "pipeline.planning.inspected",
        "pipeline.planning.inspection",
        "pipeline.planning.job",
        "pipeline.planning.make_plan",
        "pipeline.reporting.report",
        "pipeline.run.execute",
        "pipeline.run.workers",
        "pipeline.watching.shown",
        "pipeline.watching.state",
    },
    # Help, completion and refusals of the command line stay quick: a command loads its own work when it is called.
    "pipeline/cli/__init__.py": {"pipeline"},  # the version: importlib.metadata
    "pipeline/cli/build.py": {"pipeline.engine.run"},
    "pipeline/cli/usage.py": {"pipeline.planning.builder_options"},
    "pipeline/cli/convert.py": {
        "numpy",
        "pipeline.engine.run",
        "pipeline.planning.make_plan",
        "pipeline.reporting.graph_drawing",
        "pipeline.reporting.plan_tables",
        "pipeline.reporting.terminal",
        "pipeline.run.execute",
        "pipeline.run.foresee",
        "pipeline.run.workers",
    },
    "pipeline/cli/calibrate.py": {
        "pipeline.calibration.plan",
        "pipeline.calibration.tokens",
        "pipeline.planning.job_file",
        "pipeline.run.calibrations",
    },
    "pipeline/cli/facts.py": {"pipeline.planning.family_table", "pipeline.planning.inspection", "pipeline.reporting"},
    "pipeline/cli/batch.py": {
        "pipeline.jobs.batch",
        "pipeline.jobs.files",
        "pipeline.jobs.fleet",
        "pipeline.jobs.log",
        "pipeline.jobs.requests",
        "pipeline.jobs.units",
    },
    "pipeline/cli/jobs.py": {"pipeline.jobs.history", "pipeline.jobs.runs", "sqlite3"},
    "pipeline/cli/many.py": {"pipeline.jobs", "pipeline.reporting.terminal"},
    "pipeline/cli/levels.py": {"pipeline.watching.consoles", "rich"},
    "pipeline/watching/nodes.py": {"pipeline.planning.bind"},
    "pipeline/cli/report.py": {"pipeline.reporting.report"},
    "pipeline/cli/scratch.py": {
        "pipeline.jobs.history",
        "pipeline.reporting.terminal",
        "pipeline.sinks.bucket_listing",
        "pipeline.sinks.scratch_listing",
    },
    "pipeline/cli/serve.py": {
        "pipeline.jobs.files",
        "pipeline.jobs.log",
        "pipeline.jobs.schedule",
        "pipeline.jobs.serve",
    },
    "pipeline/cli/verify.py": {
        "pipeline.reporting.generation",
        "pipeline.reporting.html",
        "pipeline.reporting.report",
        "pipeline.reporting.terminal",
        "pipeline.reporting.verification",
    },
    "pipeline/cli/unlock.py": {"pipeline.sinks"},
    # A child ties itself to its parent before it loads anything.
    "pipeline/cli/child.py": {"pipeline.cli"},
    # A report is made when somebody asks for it.
    "pipeline/jobs/overview.py": {"pipeline.reporting.report"},
    # An extra that need not be installed.
    "pipeline/jobs/notify.py": {"apprise"},
    # A cluster is loaded where there is something to do.
    "pipeline/jobs/attempt.py": {"distributed"},
    "pipeline/jobs/batch.py": {"pipeline.run.cluster", "pipeline.run.schedulers", "stages.build.builders"},
    "stages/read/texts.py": {"pyarrow"},
    "stages/read/tokenizer.py": {"transformers"},
    # Dask is slow to import, and nothing that only opens headers needs it.
    "pipeline/planning/dask_graph.py": {"dask"},
    "pipeline/run/sealed.py": {"dask", "distributed", "pipeline.run.admission"},
    "pipeline/run/workers.py": {"pipeline.run.admission"},
    "pipeline/run/schedulers.py": {"dask", "distributed", "pipeline.run.named_cluster"},
    "pipeline/run/threads.py": {"dask"},
    "pipeline/run/named_cluster.py": {"distributed"},
    "pipeline/run/cluster.py": {"distributed", "tornado", "pipeline.watching.dashboard"},
    # Where a file of its settings is malformed, Dask cannot be imported: that is checked first.
    "pipeline/planning/dask_settings.py": {"dask"},
    # Only logits need torch.
    "pipeline/reporting/verification.py": {"stages.verify.forward.logits"},
    # Only a calibration needs torch and transformers.
    "pipeline/calibration/layer_task.py": {"stages.calibrate.layers", "stages.verify.roundtrip.original"},
    "pipeline/planning/calibrating.py": {
        "pipeline.calibration.layer_task",
        "pipeline.calibration.plan",
        "pipeline.calibration.tokens",
    },
    "pipeline/engine/engines.py": {"dask"},
    "pipeline/run/loaders.py": {"pipeline.planning.make_plan", "pipeline.tensor.blocks", "torch"},
    "pipeline/tensor/arrays.py": {"dask"},
    # Only outputs in object storage need what asks it.
    "pipeline/tensor/bucket.py": {"obstore"},
    "pipeline/tensor/store_requests.py": {"botocore", "obstore"},
    # Only some sources need the library that reads them (torch, gguf, huggingface_hub, zarr), or the module that does.
    "stages/quantization/kernels/gguf_blocks.py": {"gguf"},
    "stages/quantization/sources/gguf.py": {"gguf"},
    "stages/read/__init__.py": {"stages.read"},
    "stages/read/gguf.py": {"gguf"},
    "stages/read/gguf_header.py": {"gguf"},
    "stages/read/hub.py": {"huggingface_hub"},
    "stages/read/live_model.py": {"torch"},
    "stages/read/object_store.py": {"huggingface_hub", "obstore"},
    "stages/read/remote.py": {"huggingface_hub", "obstore"},
    "stages/read/zarr_store.py": {"zarr"},
    "stages/verify/roundtrip/original/numbers.py": {"gguf"},
    # Only scratch and object storage need zarr and fsspec.
    "pipeline/sinks/remote.py": {"fsspec", "zarr"},
    "stages/write/__init__.py": {"zarr"},
    # Only pages need tornado, only dashboards distributed, only a terminal rich.
    "pipeline/watching/conversion.py": {
        "pipeline.watching",
        "pipeline.watching.live",
        "pipeline.watching.metrics",
        "pipeline.watching.page",
    },
    "pipeline/watching/dashboard.py": {"distributed", "pipeline.watching.groups"},
    "pipeline/watching/bar.py": {"pipeline.watching.consoles", "rich"},
}


def texts() -> dict[str, str]:
    """Path -> text, of every module of the product."""
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in files}


def repeated_classes(modules: Mapping[str, str]) -> list[str]:
    """Public names of classes that two modules have, or one module twice."""
    places: dict[str, list[str]] = defaultdict(list)
    for name, text in modules.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(name)
    return [f"{name}: {', '.join(found)}" for name, found in sorted(places.items()) if len(found) > 1]


def riddles(modules: Mapping[str, str]) -> list[str]:
    """Docstrings that begin with "What": they circle round a thing where a noun or a verb would name it."""
    result = []
    for name, text in modules.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                said = (ast.get_docstring(node) or "").partition("\n")[0]
                result += [f"{name}: {said}"] if said.startswith("What ") else []
    return result


def late_imports(text: str) -> set[str]:
    """The imports inside functions, as LATE_IMPORTS names them."""
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {name for function in functions for node in ast.walk(function) for name in imported(node)}


def imported(node: ast.AST) -> Iterator[str]:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
    for name in names:
        root = name.partition(".")[0]
        yield name if root in FOLDERS else root


def unlisted(modules: Mapping[str, str], listed: Mapping[str, set[str]]) -> list[str]:
    """Imports inside functions that are not listed, and listed ones that are gone: "+" and "-"."""
    found = {name: late_imports(text) for name, text in modules.items()}
    every: Sequence[str] = sorted({*found, *listed})
    result = []
    for name in every:
        has, may = found.get(name, set()), listed.get(name, set())
        result += [f"+ {name}: {each}" for each in sorted(has - may)] + [f"- {name}: {each}" for each in sorted(may - has)]
    return result


def test_a_public_name_of_a_class_means_one_thing() -> None:
    assert repeated_classes(texts()) == []


def test_a_docstring_says_what_a_thing_is_or_does() -> None:
    assert riddles(texts()) == []


def test_imports_stand_at_the_top_but_for_those_with_a_reason() -> None:
    assert unlisted(texts(), LATE_IMPORTS) == []


def test_every_module_is_looked_at() -> None:
    assert len(texts()) > 140
    assert "pipeline/jobs/history.py" in texts()


def test_a_repeated_class_is_seen() -> None:
    made = {
        "a.py": "class Store: ...\nclass _Row: ...",
        "b.py": "def make():\n    class Store: ...",
        "c.py": "class _Row: ...\nclass Other: ...",
    }
    assert repeated_classes(made) == ["Store: a.py, b.py"]


def test_a_riddle_is_seen() -> None:
    made = {
        "a.py": '"""What is kept."""',
        "b.py": '"""Keeps things."""\nclass A:\n    """What all have."""\n    async def b(self):\n        """What it gives."""',
        "c.py": 'def c():\n    """Whatever comes.\n\n    What is left.\n    """',
    }
    assert riddles(made) == ["a.py: What is kept.", "b.py: What all have.", "b.py: What it gives."]


def test_a_late_import_that_is_not_listed_is_seen_and_a_listed_one_that_is_gone() -> None:
    text = "import json\nclass A:\n    async def b(self):\n"
    text += "        if self:\n            import dask.array as da\n        from stages.read import hub"
    listed = {"a.py": {"dask", "stages.read"}}
    assert unlisted({"a.py": text}, listed) == []
    assert unlisted({"a.py": f"{text}\n        import zarr"}, listed) == ["+ a.py: zarr"]
    assert unlisted({"a.py": text, "b.py": "def b():\n    from rich.table import Table"}, listed) == ["+ b.py: rich"]
    assert unlisted({"a.py": text.replace("import dask.array as da", "pass")}, listed) == ["- a.py: dask"]
    assert unlisted({}, {"gone.py": {"rich"}}) == ["- gone.py: rich"]
