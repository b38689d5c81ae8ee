"""The data files of `configs/`: families (how a source names things) and layouts (what a target module is and how it is split).

Tables map modules, not tensors: `weight`, `bias` and every quantized parameter follow their module's one row. Patterns hold
`{layer}` and `{expert}` where names hold numbers. A file may `extends` another of its folder: tables merge key by key, and
`remove` lists rows of the parent that do not apply.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.|$)")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")

T = TypeVar("T")


class PatternTable(Generic[T]):
    """Rows by pattern, found by a concrete name in one dictionary look-up."""

    def __init__(self, rows: Iterable[tuple[str, T]]) -> None:
        self._rows = {_PLACEHOLDER.sub("{}", pattern): (tuple(_PLACEHOLDER.findall(pattern)), row) for pattern, row in rows}

    def find(self, name: str) -> tuple[T, dict[str, int]] | None:
        """The row whose pattern `name` fits and the numbers at its placeholders, or None."""
        found = self._rows.get(_NUMBER.sub("{}", name))
        if found is None:
            return None
        names, row = found
        numbers = _NUMBER.findall(name)
        # A name may hold the braces themselves.
        if len(names) != len(numbers) or max(map(len, numbers), default=0) > 9:
            return None
        return row, dict(zip(names, map(int, numbers), strict=True))


@dataclass(frozen=True)
class RenameRow:
    """One source module's new names, and the operation of `pipeline/model/operations.py` that its rows go through ("" for none).

    Several names: a fused module, whose rows are those of each in turn; in `groups` repetitions (a ModelConfig size) where the
    source interleaves them.
    """

    to: tuple[str, ...]
    operation: str = ""
    period: str = ""
    groups: str = ""


@dataclass(frozen=True)
class Omission:
    """Source parameters that a layout has no place for and the reference leaves out, under the flag that says so."""

    modules: tuple[str, ...]
    parameter: str
    flag: str
    reason: str


@dataclass(frozen=True)
class Family:
    """A model family: how its checkpoints name things, and where they keep their sizes.

    `settings`: values of the configuration that go to the target's as they are: name -> keys to look for, `defaults` otherwise.
    `expect`: what a field of ModelConfig may be where TensorRT-LLM's model class has no choice.
    """

    name: str
    container: str
    architectures: tuple[str, ...]
    architecture: str
    layout: str
    rename: Mapping[str, RenameRow]
    ignore: tuple[str, ...]
    omit: tuple[Omission, ...]
    ties: Mapping[str, str]
    fields: Mapping[str, tuple[str, ...]]
    settings: Mapping[str, tuple[str, ...]]
    defaults: Mapping[str, Any]
    expect: Mapping[str, tuple[Any, ...]]
    config: Mapping[str, Any]

    def rows(self) -> PatternTable[RenameRow]:
        return PatternTable(self.rename.items())

    def ignored(self) -> PatternTable[None]:
        return PatternTable((pattern, None) for pattern in self.ignore)

    def sources(self) -> PatternTable[str]:
        """The way back: target modules to the patterns of the source modules that they come from."""
        # Of two rows to one target the first counts, which is what checkpoints on disk have.
        return PatternTable((to, pattern) for pattern, row in reversed(list(self.rename.items())) for to in row.to)


@dataclass(frozen=True)
class Part:
    """One of the sources that a fused module is made of, in the order of its rows. `heads` names the unit it is split by."""

    name: str
    out: str
    heads: str = ""


@dataclass(frozen=True)
class Module:
    """A target module. Sizes are names of ModelConfig's attributes, or numbers.

    `split`: "column" (splits `out`), "row" (splits `in`), "replicate", or "embedding" (as the parallel-embedding options say).
    `pad`: zero rows at the end of `out` until tp_size divides it. `ranks`: "first", "last" or "all" stages, for a module
    outside the layers. `bias`: the ModelConfig flag under which the module has one; `when`: under which there is a module at all.
    `experts`: a stack, one matrix an expert.
    """

    name: str
    split: str
    out: str = ""
    in_: str = ""
    parts: tuple[Part, ...] = ()
    bias: str = ""
    when: str = ""
    dtype: str = ""
    ranks: str = "all"
    pad: bool = False
    experts: bool = False

    @property
    def in_layer(self) -> bool:
        return "{layer}" in self.name


@dataclass(frozen=True)
class Slot:
    """Where a renamed module belongs: the target module, which part of it, which layer and expert (None: all in one stack)."""

    module: Module
    part: Part | None
    layer: int | None
    expert: int | None

    @property
    def out(self) -> str:
        return self.part.out if self.part else self.module.out

    @property
    def stacked(self) -> bool:
        """Whether the source is one array of all experts."""
        return self.module.experts and self.expert is None


@dataclass(frozen=True)
class Layout:
    """A target model class: its modules, and config.json's keys in order ("$name": a value of the model or the target)."""

    name: str
    modules: Mapping[str, Module]
    config: Mapping[str, Any]
    _slots: PatternTable[tuple[Module, Part | None]] = field(repr=False, compare=False)

    def find(self, name: str) -> Slot | None:
        """The slot of a renamed module, e.g. `transformer.layers.3.attention.qkv.q`; None where the layout has no such module."""
        found = self._slots.find(name)
        if found is None:
            return None
        (module, part), numbers = found
        return Slot(module, part, numbers.get("layer"), numbers.get("expert"))


def slot_names(module: Module) -> Iterable[tuple[str, Part | None]]:
    """The names under which the sources of `module` are known after renaming: one a part, experts one by one or stacked."""
    if module.parts:
        yield module.name, None  # what all parts have in common, such as one scale
    for part in module.parts or (None,):
        suffix = f".{part.name}" if part else ""
        yield module.name + suffix, part
        if module.experts:
            yield f"{module.name}.{{expert}}{suffix}", part


@cache
def layout(name: str) -> Layout:
    """Load `configs/layouts/{name}.toml`."""
    data = _load("layouts", name)
    modules = {}
    for module_name, row in data["modules"].items():
        parts = tuple(Part(**part) for part in row.get("parts", ()))
        rest = {("in_" if key == "in" else key): value for key, value in row.items() if key != "parts"}
        modules[module_name] = Module(module_name, parts=parts, **rest)
    slots = PatternTable((slot, (module, part)) for module in modules.values() for slot, part in slot_names(module))
    return Layout(name, modules, data["config"], slots)


@cache
def families() -> tuple[Family, ...]:
    """Every family of `configs/families`, in the order of their file names."""
    return tuple(_family(path.stem) for path in sorted((CONFIGS / "families").glob("*.toml")))


def find_family(container: str, architecture: str) -> Family | None:
    """The family that lists `architecture` for this kind of container."""
    for family in families():
        if family.container == container and architecture in family.architectures:
            return family
    return None


def _family(name: str) -> Family:
    data = _load("families", name)
    return Family(
        name=name,
        container=data["container"],
        architectures=tuple(data["architectures"]),
        architecture=data.get("architecture", ""),
        layout=data["layout"],
        rename={pattern: _rename_row(row) for pattern, row in data["rename"].items()},
        ignore=tuple(data.get("ignore", ())),
        omit=tuple(Omission(**{**row, "modules": tuple(row["modules"])}) for row in data.get("omit", ())),
        ties=data.get("ties", {}),
        fields={key: _names(value) for key, value in data.get("model_config", {}).items()},
        settings={key: _names(value) for key, value in data.get("settings", {}).items()},
        defaults=data.get("defaults", {}),
        expect={key: tuple(values) for key, values in data.get("expect", {}).items()},
        config=data.get("config", {}),
    )


def _rename_row(row: str | Mapping[str, Any]) -> RenameRow:
    return RenameRow((row,)) if isinstance(row, str) else RenameRow(**{**row, "to": _names(row["to"])})


def _names(value: str | Iterable[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _load(folder: str, name: str) -> dict[str, Any]:
    data = tomllib.loads((CONFIGS / folder / f"{name}.toml").read_text())
    parent_name = data.pop("extends", None)
    if parent_name is None:
        return data
    parent = _load(folder, parent_name)
    if folder == "layouts" and "config" in data:
        parent.pop("config")  # a layout's template is whole: the order of its keys is the reference's
    merged = merge(parent, data)
    for pattern in merged.pop("remove", ()):
        merged["modules" if folder == "layouts" else "rename"].pop(pattern)
    return merged


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid upon it, tables key by key; new keys come last."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(value, Mapping) and isinstance(old, Mapping) else value
    return result
