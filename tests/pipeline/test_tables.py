"""The data files: each loads, and says only what the code and the other files understand."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import tables
from pipeline.model_config import ModelConfig
from pipeline.operations import OPERATIONS
from pipeline.tables import CONFIGS, Family, Layout, PatternTable, RenameRow, families, find_family, layout, merge, slot_names

NUMBERS = {"layer": 7, "expert": 3}
FAMILIES = families()
LAYOUTS = [layout(path.stem) for path in sorted((CONFIGS / "layouts").glob("*.toml"))]
FIELDS = {field.name for field in fields(ModelConfig)}
KNOWN = FIELDS | {name for name, value in vars(ModelConfig).items() if isinstance(value, property)}

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
each_layout = pytest.mark.parametrize("target", LAYOUTS, ids=lambda target: target.name)


def test_every_file_is_loaded() -> None:
    assert {family.name for family in FAMILIES} == {path.stem for path in (CONFIGS / "families").glob("*.toml")}
    assert len(LAYOUTS) == len(list((CONFIGS / "layouts").glob("*.toml")))


def test_an_architecture_has_one_family() -> None:
    pairs = [(family.container, name) for family in FAMILIES for name in family.architectures]
    assert len(pairs) == len(set(pairs))
    for container, name in pairs:
        found = find_family(container, name)
        assert found is not None
        assert name in found.architectures


@each_family
def test_every_row_leads_to_a_module_of_the_layout(family: Family) -> None:
    target = layout(family.layout)
    for pattern, row in family.rename.items():
        slot = target.find(row.to.format(**NUMBERS))
        assert slot is not None, pattern
        assert slot.layer == (7 if "{layer}" in row.to else None)
        assert slot.expert == (3 if "{expert}" in row.to else None)


@each_family
def test_every_module_of_the_layout_has_a_row(family: Family) -> None:
    reached = {row.to for row in family.rename.values()} | set(family.ties)
    for module in layout(family.layout).modules.values():
        names = [name for name, _ in slot_names(module)]
        parts = len(module.parts) or 1
        # A stack of experts may come whole or one by one.
        assert len(reached.intersection(names)) >= parts, module.name


@each_family
def test_rows_are_a_bijection_of_patterns(family: Family) -> None:
    targets = [row.to for row in family.rename.values()]
    assert len(targets) == len(set(targets))
    assert set(family.rename).isdisjoint(family.ignore)


@each_family
def test_a_family_names_what_exists(family: Family) -> None:
    modules = {row.to for row in family.rename.values()}
    assert set(family.fields) <= FIELDS
    assert set(family.defaults) <= FIELDS
    for tied, original in family.ties.items():
        assert {tied, original} <= modules
    for row in family.rename.values():
        assert not row.operation or (row.operation in OPERATIONS and row.period in KNOWN)
    for omission in family.omit:
        assert omission.flag in FIELDS
        assert omission.reason


@each_layout
def test_a_layout_names_what_exists(target: Layout) -> None:
    for module in target.modules.values():
        sizes = [module.out, module.in_, *(part.out for part in module.parts), *(part.heads for part in module.parts)]
        assert {name for name in (*sizes, module.bias) if name} <= KNOWN, module.name
        assert module.split in ("column", "row", "replicate", "embedding")
        assert module.ranks in ("first", "last", "all")
        assert module.out or module.parts


@each_layout
def test_slots_find_their_parts(target: Layout) -> None:
    for module in target.modules.values():
        for name, part in slot_names(module):
            slot = target.find(name.format(**NUMBERS))
            assert slot is not None
            assert (slot.module, slot.part) == (module, part)
            assert slot.out == (part.out if part else module.out)


def test_names_outside_the_layout_are_not_found() -> None:
    target = layout("decoder")
    for name in ("", "transformer", "transformer.layers.0", "transformer.layers.x.mlp.fc", "transformer.layers.0.mlp.fc.1"):
        assert target.find(name) is None


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_patterns_give_their_numbers_back(layer: int, expert: int) -> None:
    table = PatternTable([("a.{layer}.b.{expert}.c", 1), ("a.{layer}.b.c", 2), ("a.b", 3)])
    assert table.find(f"a.{layer}.b.{expert}.c") == (1, {"layer": layer, "expert": expert})
    assert table.find(f"a.{layer}.b.c") == (2, {"layer": layer})
    assert table.find("a.b") == (3, {})
    assert table.find(f"a.{layer}.b") is None


def test_a_name_that_looks_like_a_pattern_is_only_a_name() -> None:
    assert PatternTable([("a.{layer}.b", 1)]).find("a.{}.b") is None


def test_merge_goes_table_by_table() -> None:
    base = {"a": 1, "b": {"c": 2, "d": 3}}
    assert merge(base, {"b": {"c": 5, "e": 6}, "f": 7}) == {"a": 1, "b": {"c": 5, "d": 3, "e": 6}, "f": 7}
    assert base == {"a": 1, "b": {"c": 2, "d": 3}}


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for folder in ("families", "layouts"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(tables, "CONFIGS", tmp_path)
    return tmp_path


BASE_FAMILY = """
container = "x"
architectures = ["Base"]
layout = "old"
ignore = ["i"]
[rename]
"a" = "A"
"b" = "B"
"""
CHILD_FAMILY = """
extends = "base"
architectures = ["Child"]
remove = ["a"]
[rename]
"b" = { to = "C", operation = "o", period = "p" }
"d" = "D"
"""
BASE_LAYOUT = """
[modules.a]
split = "row"
out = "o"
in = "i"
[modules.b]
split = "column"
out = "o"
[config]
k = 1
"""
CHILD_LAYOUT = """
extends = "base"
remove = ["b"]
[modules.a]
out = "other"
[config]
j = 2
"""


def test_a_family_extends_another_less_what_it_removes(configs: Path) -> None:
    (configs / "families" / "base.toml").write_text(BASE_FAMILY)
    (configs / "families" / "child.toml").write_text(CHILD_FAMILY)
    # The list is kept once loaded: ask beside it, so that the other tests keep theirs.
    base, child = families.__wrapped__()
    assert base.rename == {"a": RenameRow("A"), "b": RenameRow("B")}
    assert child.rename == {"b": RenameRow("C", "o", "p"), "d": RenameRow("D")}
    assert (child.container, child.layout, child.ignore, child.architectures) == ("x", "old", ("i",), ("Child",))


def test_a_layout_extends_another_less_what_it_removes(configs: Path) -> None:
    (configs / "layouts" / "base.toml").write_text(BASE_LAYOUT)
    (configs / "layouts" / "child.toml").write_text(CHILD_LAYOUT)
    child = layout.__wrapped__("child")
    assert list(child.modules) == ["a"]
    assert (child.modules["a"].split, child.modules["a"].out, child.modules["a"].in_) == ("row", "other", "i")
    assert child.config == {"k": 1, "j": 2}
    assert child.find("b") is None
