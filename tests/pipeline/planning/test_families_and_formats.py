"""`headrace families` and `headrace formats`: all that headrace knows, as tables and as JSON."""

from __future__ import annotations

import importlib
import itertools
import json
import tomllib
from pathlib import Path
from typing import Any

import stages.quantization.sources
import stages.read
from pipeline.model.runtime import runtime
from pipeline.model.tables import CONFIGS
from pipeline.planning.family_table import list_texts
from tests.support.commands import headrace


def tables() -> dict[str, dict[str, Any]]:
    """Every family's file, whose keys a file that extends another may leave to it."""
    found = {path.stem: tomllib.loads(path.read_text()) for path in (CONFIGS / "families").glob("*.toml")}

    def whole(name: str) -> dict[str, Any]:
        own = found[name]
        return {**(whole(own["extends"]) if "extends" in own else {}), **own}

    return {name: whole(name) for name in found}


def test_families_lists_every_file() -> None:
    rows = json.loads(headrace("families", "--json").out)
    expected = tables()
    assert [row["family"] for row in rows] == sorted(expected)
    for row in rows:
        own = expected[row["family"]]
        assert (row["source"], row["architectures"], row["layout"]) == (own["container"], own["architectures"], own["layout"])
        assert (own.get("architecture") or own["architectures"][0]) in runtime().classes
        assert row["class"] in ("llama", "qwen", "phi", "gemma")
        assert row["pipeline_stages"] is (row["class"] != "phi")
        assert row["targets"][:3] == ["none", "int8", "int4"]
        assert row["proof"]
        assert (CONFIGS / "layouts" / f"{row['layout']}.toml").is_file()
    # No two families claim one architecture of one kind of source.
    claims = [(row["source"], architecture) for row in rows for architecture in row["architectures"]]
    assert len(claims) == len(set(claims))


def test_families_as_a_table() -> None:
    ran = headrace("families")
    assert (ran.code, ran.err) == (0, "")
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in ran.out.splitlines() if line.startswith("│")]
    begins = [number for number, row in enumerate(cells) if row[0]]
    rows = [["".join(cell) for cell in zip(*cells[a:b], strict=True)] for a, b in itertools.pairwise([*begins, len(cells)])]
    said = {row[0]: row[1:] for row in rows}
    assert said.keys() == tables().keys()
    for name, own in tables().items():
        assert said[name][:2] == [own["container"], ",".join(own["architectures"])]
        assert said[name][3].startswith("none, int8, int4")
    assert all(wrapper in ran.out for wrapper in list_texts())


def names_of(package: Any, constant: str) -> set[str]:
    """What the files of a package call what they have under a name."""
    files = [Path(path) for folder in package.__path__ for path in Path(folder).glob("*.py")]
    modules = [
        importlib.import_module(f"{package.__name__}.{path.stem}") for path in files if f"\n{constant} = " in path.read_text()
    ]
    return {getattr(module, constant).name for module in modules}


def test_formats_lists_every_module() -> None:
    said = json.loads(headrace("formats", "--json").out)
    assert list(said) == ["sources", "quantized", "not read"]
    names = {kind: [row["name"] for row in rows] for kind, rows in said.items()}
    assert set(names["sources"]) == names_of(stages.read, "READER")
    assert {"huggingface", "gguf", "meta"} <= set(names["sources"])
    assert set(names["quantized"]) == names_of(stages.quantization.sources, "FORMAT")
    assert all(len(rows) == len(set(rows)) for rows in names.values())
    assert all(row["is"] and not row["is"].endswith(".") for rows in said.values() for row in rows)


def test_formats_as_a_table() -> None:
    ran = headrace("formats")
    assert (ran.code, ran.err) == (0, "")
    for kind, rows in json.loads(headrace("formats", "--json").out).items():
        for row in rows:
            assert any(f"│ {kind} " in line and f"│ {row['name']} " in line for line in ran.out.splitlines()), row
