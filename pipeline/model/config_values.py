"""Look up single values in a model's configuration, by the keys that a family's table lists, and check their types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import Problem
from pipeline.model.family_rows import Remark
from pipeline.model.tables import Family


def lookup(config: Mapping[str, Any], key: str) -> Any:
    """Return `config[key]`; a key `a.b` that is not there itself means `config["a"]["b"]`. None where there is no value.

    A key `#a` means the number of entries of the object `config["a"]`.
    """
    if key.startswith("#"):
        counted = config.get(key[1:])
        return len(counted) if isinstance(counted, Mapping) else None
    if config.get(key) is not None:
        return config[key]
    head, _, rest = key.partition(".")
    inner = config.get(head)
    return lookup(inner, rest) if rest and isinstance(inner, Mapping) else None


def typed_value(config: Mapping[str, Any], keys: tuple[str, ...], kind: str) -> Any:
    """Return the value of the first of `keys` that has one, as `kind` ("int", "float", "str" or "bool"); None where none has.

    Of several booleans one that is true is enough. Raises TypeError for a value of another type, ValueError for a string that is
    empty, ValueError or OverflowError for a number that is not whole where `kind` is "int".
    """
    values = [value for value in (lookup(config, key) for key in keys) if value is not None]
    if not values:
        return None
    if kind == "bool":
        if not all(isinstance(value, bool) for value in values):
            raise TypeError
        return any(values)
    value = values[0]
    if kind == "str":
        if not isinstance(value, str):
            raise TypeError
        if not value:
            raise ValueError
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    if kind == "int" and value != int(value):
        raise ValueError
    # A float keeps the type that the file gave it (10000 or 10000.0): TensorRT-LLM compares values, not spellings.
    return int(value) if kind == "int" else value


def wrong_type(file: str, keys: tuple[str, ...], config: Mapping[str, Any], kind: str) -> Problem:
    """Return the problem of the first of `keys` that has a value, which is not of `kind`."""
    expected = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a string, not empty"}[kind]
    key = next(key for key in keys if lookup(config, key) is not None)
    return Problem(f"{file}: {key}", repr(lookup(config, key)), expected)


def family_settings(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return each of the family's settings: its value in the configuration, None for null, the default where no key is there."""
    result = {}
    for name, keys in family.settings.items():
        values = [value for key in keys if (value := lookup(config, key)) is not None]
        absent = not values and not any(key in config for key in keys)
        default = family.defaults.get(name, family.assumed.get(name))
        result[name] = values[0] if values else default if absent else None
    return result


def assumed(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return the fields and settings whose keys a configuration lacks, with transformers' values for them; null is a value."""
    return {
        name: value
        for name, value in family.assumed.items()
        if name not in family.defaults and not any(key in config for key in family.keys(name))
    }


def refusals(config: Mapping[str, Any], family: Family, file: str) -> list[Problem]:
    """Return why the family's remarks refuse a configuration; [] where none does."""
    problems = []
    for remark in family.remarks:
        if remark.refused and _fits(config, remark):
            told = [f"{key} {lookup(config, key)}" for key in remark.when]
            has = next((key for key in remark.has if lookup(config, key)), "")
            told += ["a value"] if has else ["values that differ"] if remark.unlike else []
            key = next(iter(remark.when), has or remark.unlike)
            problems.append(Problem(f"{file}: {key}", ", ".join(told), remark.refused, remark.remedy))
    return problems


def remark_notes(config: Mapping[str, Any], family: Family) -> tuple[str, ...]:
    """Return what the family's remarks say of a configuration that they do not refuse."""
    return tuple(remark.note for remark in family.remarks if remark.note and _fits(config, remark))


def _fits(config: Mapping[str, Any], remark: Remark) -> bool:
    if not all(type(found := lookup(config, key)) is type(value) and found == value for key, value in remark.when.items()):
        return False
    if remark.unlike:
        values = lookup(config, remark.unlike)
        return isinstance(values, list) and any(value != values[0] for value in values)
    return not remark.has or any(lookup(config, key) for key in remark.has)


def assumed_notes(config: Mapping[str, Any], family: Family, file: str) -> tuple[str, ...]:
    """Say which values were taken from the family's `assumed`, as the configuration has none."""
    name = file.rpartition("/")[2]
    whose = "the default of its own code" if "modelling code" in family.proof else "transformers' default"
    return tuple(
        f"{field} {value}: {name} has no {' or '.join(family.keys(field))}, and {whose} is this"
        for field, value in assumed(config, family).items()
    )
