"""An architecture that no family is for: the families nearest to it and what differs, or the text model that it wraps.

The keys that say what a model computes are data, in `configs/formats/computations.toml`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

from pipeline.errors import Problem
from pipeline.model.config_values import lookup
from pipeline.model.runtime import runtime
from pipeline.model.table_files import load_table
from pipeline.model.tables import CONFIGS, Family, families, find_family, layout
from pipeline.planning.choose_algorithm import clean_settings
from pipeline.printed import shortened
from pipeline.tensor.tensors import Source
from stages.quantization.unread import unread_formats
from stages.read.text_part import bare_names, family_of_type
from stages.read.wrapped_names import known_names

_SHOWN = 4  # names or keys in a sentence
_LONGEST = 60  # characters of one of them
_NESTED = 2  # how deep a text model's configuration may lie in that of its wrapper
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_PLACEHOLDER = re.compile(r"\{\w+\}")
_TELLING = 4  # kinds of modules that names must show to tell a family


@dataclass(frozen=True)
class Difference:
    """The difference between a source and a family.

    Attributes
    ----------
    said
        Sentences on what its configuration has that the family does not compute.
    named
        Sentences on what differs in the names of modules; `known` is the number of its modules that the family has.
    shared, silent
        The numbers of the family's keys that its configuration has and lacks.
    """

    family: Family
    said: tuple[str, ...]
    named: tuple[str, ...]
    known: int
    shared: int
    silent: int

    @property
    def count(self) -> int:
        """How many things differ."""
        return len(self.said) + len(self.named)


def unknown_architecture(source: Source) -> Problem:
    """The one problem of a source whose architecture no family lists."""
    known = sorted(name for family in families() if family.container == source.container for name in family.architectures)
    subject, expected = f"{source.config_name}: architecture", f"one of {', '.join(known)}"
    return Problem(subject, source.architecture or "none", expected, f"{_unserved(source)}{_remedy(source)}")


def _unserved(source: Source) -> str:
    """The sentence on an architecture, or a wrapper's text, of which it is known why no family is for it; "" for any other."""
    texts = (_named_text(inner, source.container)[0] for _, inner in _text_parts(source.config, _NESTED))
    found = next((row for name in (source.architecture, *texts) if (row := runtime().unserved.get(name))), None)
    return f"{found[0][0].upper()}{found[0][1:]}. {found[1]}. " if found else ""


def _remedy(source: Source) -> str:
    if source.container != "huggingface":
        return ""
    parts = list(_text_parts(source.config, _NESTED))
    if not parts:
        return _nearest(source.config, source.tensors, source.container)
    key, inner = next((part for part in parts if _named_text(part[1], source.container)[1]), parts[0])
    name, family = _named_text(inner, source.container)
    called = f"{key}: {shortened(name, _LONGEST)}" if name else key
    if family is None:
        nearest = _nearest(inner, bare_names(source.tensors), source.container)
        return f"It wraps a text model ({called}), which no family is for either. {nearest}"
    return (
        f"It wraps a text model of the family {family.name} ({called}): save that one alone (in transformers, `save_pretrained` of "
        f"the language model inside), as a directory with {key} as its config.json, where `architectures` is "
        f'["{family.architectures[0]}"]'
    )


def _text_parts(config: Mapping[str, Any], depth: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the configurations of text models inside another, the nearest to the top first, each with its key."""
    inner = [(key, value) for key, value in config.items() if isinstance(value, Mapping)]
    for key, value in inner:
        # Towers of other inputs have no vocabulary, and a part that is all of its type's defaults has no sizes.
        if {"vocab_size", "num_hidden_layers"} <= value.keys() or family_of_type(value):
            yield key, value
    if depth > 1:
        for key, value in inner:
            yield from ((f"{key}.{name}", found) for name, found in _text_parts(value, depth - 1))


def _named_text(config: Mapping[str, Any], container: str) -> tuple[str, Family | None]:
    """A text model's name, by its architecture or its type, and its family."""
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    if isinstance(first, str) and (family := find_family(container, first)):
        return first, family
    kind = config.get("model_type")
    return str(first or kind or ""), None if isinstance(first, str) else family_of_type(config)


def _nearest(config: Mapping[str, Any], names: Collection[str], container: str) -> str:
    """Say which families are nearest to a configuration and the names of its tensors, and what differs from each."""
    kind = str(config.get("model_type", ""))
    modules = Counter(_NUMBER.sub("{}", name) for name in names)
    apart = [_difference(family, config, modules) for family in families() if family.container == container]

    def rank(each: Difference) -> tuple[Any, ...]:
        changed = sum(bool(row.operation) for row in each.family.rename.values())  # values that are not kept as they are
        other = not kind.startswith(each.family.name)
        borrowed = bool(each.family.architecture)  # written as another family's
        return (-each.known, each.count, other, borrowed, -each.shared, changed, each.silent, each.family.name)

    first, second = sorted(apart, key=rank)[:2]
    if not (first.said or first.named):
        looked = "its configuration and its tensors' names" if first.known else "its configuration"
        return (
            f"Nothing in {looked} differs from the family {first.family.name}. Only its own code tells whether it computes the "
            f'same: if so, set `architectures` to ["{first.family.architectures[0]}"] in a copy'
        )
    further = second.known < first.known or second.count > first.count
    nearest = [first] if further or (second.said, second.named) == (first.said, first.named) else [first, second]
    told = "; ".join(f"{each.family.name}, but for {', '.join((*each.said, *each.named))}" for each in nearest)
    names_ = "families are" if len(nearest) > 1 else "family is"
    return f"The nearest {names_} {told}: an engine of that would compute something else"


def _difference(family: Family, config: Mapping[str, Any], modules: Collection[str]) -> Difference:
    experts = any(module.experts for module in layout(family.layout).modules.values())
    fields = {name: keys for name, keys in family.fields.items() if experts or name not in ("num_experts", "experts_per_token")}
    read = {key for keys in (*fields.values(), *family.settings.values()) for key in keys}
    said = list(_activation(family, config))
    if experts and all(lookup(config, key) is None for key in fields.get("num_experts", ())):
        said.append("the lack of experts")
    for row in _computations().values():
        keys = [key for key in row["keys"] if _says(lookup(config, key), row.get("plain", ())) and key not in read]
        if keys:
            said.append(f"{row['title']} ({_some(keys)})")
    settings = clean_settings(config)
    said += [f"weights of {row.title}" for row in unread_formats() if row.named_by(settings)]
    known, named = _names(family, modules)
    shared = sum(lookup(config, key) is not None for key in read)
    return Difference(family, tuple(said), named, known, shared, len(read) - shared)


@cache
def _computations() -> dict[str, Any]:
    return load_table(CONFIGS / "formats", "computations")


def _says(value: Any, plain: Collection[Any]) -> bool:
    """Whether a value of the configuration says something: the empty values of all types do not."""
    return bool(value) and not any(type(value) is type(each) and value == each for each in plain)


def _activation(family: Family, config: Mapping[str, Any]) -> Iterator[str]:
    keys = (*family.fields.get("hidden_act", ()), "hidden_act", "hidden_activation", "activation_function", "activation")
    found = next((value for key in keys if isinstance(value := lookup(config, key), str)), None)
    default = family.defaults.get("hidden_act", family.assumed.get("hidden_act"))
    usual = set(family.expect.get("hidden_act", (default,) if default else ()))
    same = {"swiglu": "silu", "swish": "silu"}
    if found and usual and same.get(found, found) not in usual:
        yield f"the activation ({shortened(found, _LONGEST)})"


def _names(family: Family, names: Collection[str]) -> tuple[int, tuple[str, ...]]:
    """How many kinds of a source's modules a family has, and what differs: tensors without a place in it, modules not there.

    `names`: with `{}` in the place of each number.
    """
    known, target, rows = known_names(family), layout(family.layout), family.rows()
    strange, found = [], set[str]()
    for name in names:
        module, _, parameter = (concrete := name.replace("{}", "0")).rpartition(".")
        row = rows.find(module)
        slot = target.find(row[0].to[0].format(**row[1])) if row else None
        if known(concrete) and not (parameter == "bias" and slot and not slot.module.bias):
            found.add(name.rpartition(".")[0])
        else:
            strange.append(name)
    own = {_PLACEHOLDER.sub("{}", row) for row in family.rename}
    if 2 * len(found) < len(own & found) + len(strange) or len(found) < _TELLING:
        return 0, ()  # too few that the names could tell anything
    tied = {_PLACEHOLDER.sub("{}", tie[0]) for name in family.ties if (tie := family.sources().find(name))}
    # Experts have names of two kinds, and a checkpoint those of one.
    lacking = sorted(each for each in own - found - tied if ".experts." not in each)
    told = [f"tensors that it does not have ({_some(_shortest(strange, own))})"] if strange else []
    told += [f"the lack of {_some(lacking)}"] if lacking else []
    return len(found), tuple(told)


def _shortest(names: Sequence[str], own: Collection[str]) -> list[str]:
    """The beginnings of names, each as long as it takes to be of no module of a family."""
    inside = {part for row in own for part in accumulate(row.split("."), "{}.{}".format)}
    beginnings = {
        next((part for part in accumulate(name.split("."), "{}.{}".format) if part not in inside), name) for name in names
    }
    return sorted(beginnings)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(shortened(name, 240) for name in names[:_SHOWN]) + more
