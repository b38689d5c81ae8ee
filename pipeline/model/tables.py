"""Load the tables of `configs/`: families (a source's names and sizes) and layouts (a target's modules and how they are split).

Tables map modules, not tensors: `weight`, `bias` and every quantized parameter of a module follow its one row. Patterns have
`{layer}` and `{expert}` in the place of numbers. A file may extend another of its folder with the key `extends`: their tables are
merged key by key, and `remove` lists the parent's rows that do not apply.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.model.family_rows import KnownModel, Omission, Remark, RenameRow
from pipeline.model.patterns import PatternTable
from pipeline.model.published import PublishedSize
from pipeline.model.table_files import load_table, tables_with

_PACKAGE = Path(__file__).resolve().parents[1]
# In the wheel a folder of the package, in the repository a folder beside it.
CONFIGS = next((folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir()), _PACKAGE / "configs")


@dataclass(frozen=True)
class Family:
    """A model family: the names of modules and the keys of sizes in its checkpoints.

    Parameters
    ----------
    name
        The stem of its file in `configs/families`.
    container, architectures
        The container and the architectures in it that the family applies to.
    architecture
        TensorRT-LLM's architecture; "" for the source's own.
    layout
        The name of the target's layout.
    rename
        The row of each source module, by pattern.
    ignore
        Patterns of source modules that hold nothing to convert.
    omit
        Parameters that are left out, with the reason.
    ties
        Renamed modules and, for each, the one whose weight it shares in a model with tied embeddings.
    fields
        The configuration keys of each field of ModelConfig; the first that is present counts.
    settings
        The configuration keys of each value that ModelConfig.settings takes as it is.
    defaults
        The value of a field or setting that the configuration does not have.
    assumed
        The value of a field or setting that transformers has where config.json lacks its key; a plan says which it took.
    expect
        The values that a field or setting may have where TensorRT-LLM's model class supports no others.
    numbers
        Settings that are numbers in every model, also where a null could be written; each with "greater than 0" or "of 0 or more".
    config
        Rows that are laid over the layout's config.json template.
    scaling
        The parameters of the scaling of positions that go with a factor, where the configuration has neither.
    published
        The sizes by which keys are told that no configuration has; a model of another size needs the option of that name.
    known
        Models whose configurations do not say everything; the first row that fits counts, and the last fits always.
    left_out
        The beginnings of the names of tensors that are not converted, each with the reason.
    told
        The tensor whose number of rows a field is, where the configuration does not say it.
    divisors
        The number that a field's value in the configuration is to be divided by.
    remarks
        What a plan says of models whose configuration has some values, or why it refuses them.
    proof
        What the ranks of the family were compared with, words of `pipeline.planning.family_table`.
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
    numbers: Mapping[str, str] = field(default_factory=dict)
    scaling: Mapping[str, Any] = field(default_factory=dict)
    published: tuple[PublishedSize, ...] = ()
    known: tuple[KnownModel, ...] = ()
    assumed: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    told: Mapping[str, str] = field(default_factory=dict)
    divisors: Mapping[str, int] = field(default_factory=dict)
    remarks: tuple[Remark, ...] = ()
    proof: tuple[str, ...] = ()

    def keys(self, name: str) -> tuple[str, ...]:
        """Return the configuration's keys of a field or setting; () where none says it."""
        return self.fields.get(name, self.settings.get(name, ()))

    def rows(self) -> PatternTable[RenameRow]:
        """Return the rename rows by pattern."""
        return PatternTable(self.rename.items())

    def ignored(self) -> PatternTable[None]:
        """Return the patterns of ignored modules."""
        return PatternTable((pattern, None) for pattern in self.ignore)

    def sources(self) -> PatternTable[str]:
        """Return the reverse mapping: for each renamed module, the pattern of the source module that it comes from."""
        # Where two rows lead to one target, the first counts: it is the name that checkpoints on disk have.
        return PatternTable((to, pattern) for pattern, row in reversed(list(self.rename.items())) for to in row.to)


@dataclass(frozen=True)
class FusedPart:
    """One of the sources whose rows make up a fused target module, in order.

    `out`: the ModelConfig size that is its number of rows. `heads`: the ModelConfig size that is the number of heads it is split
    by, "" where it is split by rows.
    """

    name: str
    out: str
    heads: str = ""


@dataclass(frozen=True)
class Module:
    """A module of the target. Sizes are names of ModelConfig's attributes, or numbers as text.

    Parameters
    ----------
    name
        TensorRT-LLM's name, with `{layer}` for a module of every layer.
    split
        "column" (splits axis `out`), "row" (splits axis `in`), "replicate", or "embedding" (as the parallel-embedding options say).
    out, in_
        The sizes of a weight's axes, [out_features, in_features].
    parts
        The sources of a fused module.
    bias
        The ModelConfig flag that says whether the module has a bias; "" for never.
    when
        The ModelConfig flag that says whether there is such a module; "" for always.
    dtype
        The type of its values where that is not the target's.
    ranks
        The pipeline stages that have a module outside the layers: "first", "last" or "all".
    pad
        Add zero rows at the end of `out` until tp_size divides it.
    experts
        The module is a stack with one matrix for each expert.
    """

    name: str
    split: str
    out: str = ""
    in_: str = ""
    parts: tuple[FusedPart, ...] = ()
    bias: str = ""
    when: str = ""
    dtype: str = ""
    ranks: str = "all"
    pad: bool = False
    experts: bool = False

    @property
    def in_layer(self) -> bool:
        """Whether every layer has such a module."""
        return "{layer}" in self.name

    def stored_dtype(self, dtype: str) -> str:
        """The type of the module's values in a target of type `dtype`: its own where it has one (a router is float32)."""
        return self.dtype or dtype


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of a renamed source module in the target.

    `module`: the target module. `part`: the part of a fused one that it is; None for all of it. `layer`: None outside the layers.
    `expert`: None outside experts, and for an array of all experts.
    """

    module: Module
    part: FusedPart | None
    layer: int | None
    expert: int | None

    @property
    def out(self) -> str:
        """The size of axis `out`, as tables name it: the part's own, else the module's."""
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
    _slots: PatternTable[tuple[Module, FusedPart | None]] = field(repr=False, compare=False)

    def find(self, name: str) -> Slot | None:
        """Return the slot of a renamed module such as `transformer.layers.3.attention.qkv.q`; None where the layout has none."""
        match = self._slots.find(name)
        if match is None:
            return None
        (module, part), numbers = match
        return Slot(module, part, numbers.get("layer"), numbers.get("expert"))


def slot_names(module: Module) -> Iterable[tuple[str, FusedPart | None]]:
    """Yield the names that the sources of `module` have after renaming, each with its part: experts stacked and one by one."""
    if module.parts:
        yield module.name, None  # for parameters that all parts share, such as a common scale
    for part in module.parts or (None,):
        suffix = f".{part.name}" if part else ""
        yield module.name + suffix, part
        if module.experts:
            yield f"{module.name}.{{expert}}{suffix}", part


@cache
def layout(name: str) -> Layout:
    """Load `configs/layouts/{name}.toml`. Raises FileNotFoundError where there is no such layout."""
    data = load_table(CONFIGS / "layouts", name)
    modules = {}
    for module_name, row in data["modules"].items():
        parts = tuple(FusedPart(**part) for part in row.get("parts", ()))
        rest = {("in_" if key == "in" else key): value for key, value in row.items() if key != "parts"}
        modules[module_name] = Module(module_name, parts=parts, **rest)
    slots = PatternTable((slot, (module, part)) for module in modules.values() for slot, part in slot_names(module))
    return Layout(name, modules, data["config"], slots)


@cache
def families() -> tuple[Family, ...]:
    """Load all families of `configs/families`, in the order of their file names."""
    return tuple(map(_family, tables_with(CONFIGS / "families", "")))


@cache
def find_family(container: str, architecture: str) -> Family | None:
    """Return the family that lists `architecture` for this kind of container; None where there is none."""
    for name in tables_with(CONFIGS / "families", architecture):
        family = _family(name)
        if family.container == container and architecture in family.architectures:
            return family
    return None


def _family(name: str) -> Family:
    data = load_table(CONFIGS / "families", name)
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
        numbers=data.get("numbers", {}),
        published=tuple(PublishedSize(**row) for row in data.get("published", ())),
        scaling=data.get("scaling", {}),
        assumed=data.get("assumed", {}),
        known=tuple(KnownModel(**row) for row in data.get("known", ())),
        left_out=data.get("left_out", {}),
        told=data.get("told", {}),
        divisors=data.get("divisors", {}),
        remarks=tuple(Remark(**{**row, "has": _names(row.get("has", ()))}) for row in data.get("remarks", ())),
        proof=tuple(data.get("proof", ())),
    )


def _rename_row(row: str | Mapping[str, Any]) -> RenameRow:
    return RenameRow((row,)) if isinstance(row, str) else RenameRow(**{**row, "to": _names(row["to"])})


def _names(value: str | Iterable[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)
