"""The data files: each loads, and says only what the code and the other files understand."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.model import tables
from pipeline.model.family_rows import RenameRow
from pipeline.model.model_config import ModelConfig
from pipeline.model.operations import OPERATIONS
from pipeline.model.patterns import PatternTable
from pipeline.model.table_files import merge
from pipeline.model.tables import CONFIGS, Family, Layout, families, find_family, layout, slot_names
from stages.verify.contract.class_values import QWEN_TYPES

NUMBERS = {"layer": 7, "expert": 3}
FAMILIES = families()
LAYOUTS = [layout(path.stem) for path in sorted((CONFIGS / "layouts").glob("*.toml"))]
FIELDS = {field.name for field in fields(ModelConfig)}
KNOWN = FIELDS | {name for name in dir(ModelConfig) if isinstance(getattr(ModelConfig, name), property)}

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
each_layout = pytest.mark.parametrize("target", LAYOUTS, ids=lambda target: target.name)


def placeholders(pattern: str) -> set[str]:
    return {name for name in NUMBERS if f"{{{name}}}" in pattern}


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
def test_every_row_leads_to_modules_of_the_layout(family: Family) -> None:
    target = layout(family.layout)
    for pattern, row in family.rename.items():
        for to in row.to:
            slot = target.find(to.format(**NUMBERS))
            assert slot is not None, pattern
            numbers = {name: number for name, number in (("layer", slot.layer), ("expert", slot.expert)) if number is not None}
            assert numbers == {name: NUMBERS[name] for name in placeholders(to)}
            assert placeholders(to) <= placeholders(pattern)


@each_family
def test_every_module_of_the_layout_has_its_rows(family: Family) -> None:
    reached = {to for row in family.rename.values() for to in row.to} | set(family.ties)
    for module in layout(family.layout).modules.values():
        # A fused module's own name is for what its parts have in common, which no source has a tensor of.
        names = [name for name, part in slot_names(module) if part or not module.parts]
        if module.when and module.when not in family.fields and not family.defaults.get(module.when):
            assert reached.isdisjoint(names), f"a model of this family has no {module.name}"
            continue
        # A stack of experts may come whole or one by one: all parts of it, the one way or the other.
        forms = [{name for name in names if ("{expert}" in name) is single} for single in (True, False)]
        assert any(form and form <= reached for form in forms), module.name
        assert all(form <= reached or form.isdisjoint(reached) for form in forms), module.name


# The modules for which a family knows several names of which a checkpoint has one; its other rows are a bijection.
ALIASES = {
    "transformer.layers.{layer}.mlp.router",
    "transformer.layers.{layer}.mlp.fc.gate",
    "transformer.layers.{layer}.mlp.fc.up",
    "transformer.layers.{layer}.mlp.proj",
}


@each_family
def test_rows_are_a_bijection_of_patterns(family: Family) -> None:
    targets = [to for row in family.rename.values() for to in row.to]
    assert {to for to in targets if targets.count(to) > 1} <= ALIASES
    assert set(family.rename).isdisjoint(family.ignore)


@each_family
def test_the_way_back_is_that_of_the_first_row(family: Family) -> None:
    sources = family.sources()
    for pattern, row in family.rename.items():
        for to in row.to:
            found = sources.find(to.format(**NUMBERS))
            assert found is not None
            first, numbers = found
            assert to in family.rename[first].to
            assert numbers == {name: NUMBERS[name] for name in placeholders(to)}
            assert first == pattern or (to in ALIASES and list(family.rename).index(first) < list(family.rename).index(pattern))


@each_family
def test_a_fused_source_has_each_part_of_one_module(family: Family) -> None:
    target = layout(family.layout)
    for row in family.rename.values():
        if len(row.to) == 1:
            assert not row.groups
            continue
        slots = [target.find(to.format(**NUMBERS)) for to in row.to]
        modules = {slot.module.name for slot in slots if slot}
        parts = [slot.part for slot in slots if slot]
        assert len(modules) == 1
        assert sorted(parts, key=str) == sorted(target.modules[modules.pop()].parts, key=str)
        assert not row.groups or row.groups in KNOWN
        assert not row.operation, "an operation counts its periods from a tensor's first row"


@each_family
def test_a_family_names_what_exists(family: Family) -> None:
    modules = {to for row in family.rename.values() for to in row.to}
    assert set(family.fields) <= FIELDS
    assert set(family.defaults) <= FIELDS | set(family.settings)
    assert set(family.expect) <= KNOWN | set(family.settings)
    # A setting of a field's name would hide the field.
    assert KNOWN.isdisjoint(family.settings)
    for tied, original in family.ties.items():
        assert {tied, original} <= modules
    for row in family.rename.values():
        assert not row.operation or row.operation in OPERATIONS
        assert not row.period or (row.operation and row.period in KNOWN)
    for omission in family.omit:
        assert omission.flag in FIELDS
        assert omission.reason


@each_family
def test_every_required_field_has_a_key_or_a_default(family: Family) -> None:
    required = {field.name for field in fields(ModelConfig) if field.default is MISSING and field.default_factory is MISSING}
    assert required - {"architecture"} <= {name for name, keys in family.fields.items() if keys} | set(family.defaults)


@each_family
def test_the_qwen_class_is_told_its_kind_by_the_architecture_alone(family: Family) -> None:
    """No key of a source can tell it another one, by which it would build another model."""
    written = family.architecture or family.architectures[0]
    if "$qwen_type" in {**layout(family.layout).config, **family.config}.values():
        assert (family.settings["qwen_type"], family.defaults["qwen_type"]) == ((), QWEN_TYPES[written])
    else:
        assert written not in QWEN_TYPES


@each_family
def test_a_key_that_says_of_modules_is_read_where_there_are_such(family: Family) -> None:
    """Elsewhere what it says would be written, and the class would ask for them."""
    modules = layout(family.layout).modules
    biases = {module.bias for module in modules.values()}
    assert {name for name, keys in family.fields.items() if name.endswith("_bias") and keys} <= biases
    assert not family.fields.get("residual_mlp") or any(".residual_mlp." in name for name in modules)


@each_layout
def test_a_layout_names_what_exists(target: Layout) -> None:
    for module in target.modules.values():
        sizes = [module.out, module.in_, *(part.out for part in module.parts), *(part.heads for part in module.parts)]
        assert {name for name in sizes if name and not name.isdigit()} <= KNOWN, module.name
        assert {name for name in (module.bias, module.when) if name} <= FIELDS, module.name
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
"e" = { to = ["E", "F"], groups = "g" }
"f" = "D"
[model_config]
vocab_size = ["n", "m"]
hidden_act = []
[settings]
one = "x"
two = ["y", "z"]
[defaults]
one = 1
[expect]
hidden_act = ["silu"]
two = [[]]
[config]
k = "$one"
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
nested = { a = 1 }
"""
CHILD_LAYOUT = """
extends = "base"
remove = ["b"]
[modules.a]
out = "other"
when = "flag"
[modules.c]
split = "replicate"
out = "1"
[config]
j = 2
nested = { b = 2 }
"""
GRANDCHILD_LAYOUT = """
extends = "child"
[modules.c]
out = "2"
"""


def test_a_family_extends_another_less_what_it_removes(configs: Path) -> None:
    (configs / "families" / "base.toml").write_text(BASE_FAMILY)
    (configs / "families" / "child.toml").write_text(CHILD_FAMILY)
    # The list is kept once loaded: ask beside it, so that the other tests keep theirs.
    base, child = families.__wrapped__()
    assert base.rename == {"a": RenameRow(("A",)), "b": RenameRow(("B",))}
    assert child.rename == {
        "b": RenameRow(("C",), "o", "p"),
        "d": RenameRow(("D",)),
        "e": RenameRow(("E", "F"), groups="g"),
        "f": RenameRow(("D",)),
    }
    assert (child.container, child.layout, child.ignore, child.architectures) == ("x", "old", ("i",), ("Child",))


def test_a_familys_values(configs: Path) -> None:
    (configs / "families" / "base.toml").write_text(BASE_FAMILY)
    (configs / "families" / "child.toml").write_text(CHILD_FAMILY)
    base, child = families.__wrapped__()
    assert child.fields == {"vocab_size": ("n", "m"), "hidden_act": ()}
    assert child.settings == {"one": ("x",), "two": ("y", "z")}
    assert child.expect == {"hidden_act": ("silu",), "two": ([],)}
    assert (child.defaults, child.config) == ({"one": 1}, {"k": "$one"})
    assert (base.settings, base.expect, base.defaults, base.config, base.omit) == ({}, {}, {}, {}, ())


def test_the_way_back_from_a_target(configs: Path) -> None:
    (configs / "families" / "base.toml").write_text(BASE_FAMILY)
    (configs / "families" / "child.toml").write_text(CHILD_FAMILY)
    sources = families.__wrapped__()[1].sources()
    assert {name: sources.find(name) for name in "CDEFG"} == {
        "C": ("b", {}),
        "D": ("d", {}),  # the first of two rows, which is what files on disk have
        "E": ("e", {}),
        "F": ("e", {}),
        "G": None,
    }


def test_a_layout_extends_another_less_what_it_removes(configs: Path) -> None:
    (configs / "layouts" / "base.toml").write_text(BASE_LAYOUT)
    (configs / "layouts" / "child.toml").write_text(CHILD_LAYOUT)
    child = layout.__wrapped__("child")
    assert list(child.modules) == ["a", "c"]
    assert (child.modules["a"].split, child.modules["a"].out, child.modules["a"].in_) == ("row", "other", "i")
    assert (child.modules["a"].when, child.modules["c"].when, child.modules["c"].out) == ("flag", "", "1")
    assert child.find("b") is None


def test_a_layouts_template_is_its_own_or_its_parents(configs: Path) -> None:
    for name, text in (("base", BASE_LAYOUT), ("child", CHILD_LAYOUT), ("grandchild", GRANDCHILD_LAYOUT)):
        (configs / "layouts" / f"{name}.toml").write_text(text)
    assert layout.__wrapped__("base").config == {"k": 1, "nested": {"a": 1}}
    # Nothing of the parent's: the order of the keys is the reference's.
    assert layout.__wrapped__("child").config == {"j": 2, "nested": {"b": 2}}
    assert layout.__wrapped__("grandchild").config == {"j": 2, "nested": {"b": 2}}
    assert layout.__wrapped__("grandchild").modules["c"].out == "2"
