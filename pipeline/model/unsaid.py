"""Fill in what a configuration does not say of a model but its other values tell, by the rows of the family's table.

Meta's params.json is the case of the rows `known`: it has neither the length that a model was trained for nor the factor of its
scaled positions (facts: docs/format/checkpoint.md, section 13). GGUF is that of the rows `published`: it has no key for Gemma's
`query_pre_attn_scalar`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import Problem
from pipeline.model.config_values import lookup
from pipeline.model.family_rows import KnownModel
from pipeline.model.tables import Family

WINDOW = "sliding_window"
POSITIONS, SCALING, FACTOR, SCALAR = "max_position_embeddings", "rope_scaling", "rope_scaling_factor", "query_pre_attn_scalar"

# Options by which a conversion is told what a container has no key for, by the container; those that a forward pass depends on.
TOLD: Mapping[str, tuple[str, ...]] = {"meta": (FACTOR,), "gguf": (SCALAR,)}


@dataclass(frozen=True)
class FilledIn:
    """A configuration with what it did not say; `notes` say where each such value is from, `problems` are those of the options."""

    config: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()


def fill_in(config: Mapping[str, Any], family: Family, file: str, options: Mapping[str, Any]) -> FilledIn:
    """Fill in a configuration's length and factor, and what goes with the size of a model.

    Parameters
    ----------
    config
        The container's metadata. What it says itself is kept.
    family
        The family; one without rows `known` has configurations that say everything, so that only equal options are taken.
    file
        The name of the configuration in messages.
    options
        `rope_scaling_factor`, `max_position_embeddings` and `query_pre_attn_scalar` where the job gives them; they go before all
        else.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if family.published:
        return _by_size(config, family, file, given)
    if not family.known:
        return FilledIn(config, problems=tuple(_differing(config, family, file, given)))
    row = next(row for row in family.known if all(config.get(key) == value for key, value in row.when.items()))
    filled, notes, problems = dict(config), [], []
    if POSITIONS in given:
        filled[POSITIONS] = given[POSITIONS]
    elif config.get(POSITIONS) is None:
        filled[POSITIONS] = row.max_position_embeddings
        notes.append(_note(f"{POSITIONS} {row.max_position_embeddings}", row, file, POSITIONS))
        problems += _lost_window(config, family, row, file)
    if not config.get(SCALING):
        expected = "a model whose positions are scaled, as use_scaled_rope says"
        if FACTOR in given:
            problems.append(Problem(f"--{FACTOR} {given[FACTOR]}", f"no scaling in {file}", expected, "Leave it out"))
        return FilledIn(filled, tuple(notes), tuple(problems))
    factor = given.get(FACTOR, config.get(FACTOR))
    if factor is None:
        factor = row.rope_scaling_factor
        shown = f"{FACTOR} {factor}" if factor else f"no {FACTOR}, which TensorRT-LLM takes for 8"
        notes.append(_note(shown, row, file, FACTOR))
    if isinstance(factor, bool) or not isinstance(factor, int | float) or factor < 0:
        problems.append(Problem(f"{file}: {FACTOR}", repr(factor), "a number greater than 0"))
        return FilledIn(filled, tuple(notes), tuple(problems))
    if factor:
        filled[SCALING] = {**family.scaling, "factor": float(factor)}
    return FilledIn(filled, tuple(notes), tuple(problems))


def _lost_window(config: Mapping[str, Any], family: Family, row: KnownModel, file: str) -> list[Problem]:
    """A window of a model of unknown length: one that is as long as the length that is taken would pass for none."""
    key = next((key for key in family.settings.get(WINDOW, ()) if isinstance(lookup(config, key), int)), "")
    if row.name or not key or lookup(config, key) < row.max_position_embeddings:
        return []
    expected = f"a model whose length is known, as its window is not within {row.max_position_embeddings} tokens"
    return [Problem(f"{file}: {key}", str(lookup(config, key)), expected, f"Give --{POSITIONS}, as its config.json has it")]


def _by_size(config: Mapping[str, Any], family: Family, file: str, given: Mapping[str, Any]) -> FilledIn:
    """A configuration with the keys of the rows `published`: as the options say, or else as its size tells."""
    keys = dict.fromkeys(key for row in family.published for key in row.values)
    told = {key: value for key, value in given.items() if key in keys}
    row = next((row for row in family.published if all(config.get(key) == value for key, value in row.when.items())), None)
    problems = _differing(config, family, file, {key: value for key, value in given.items() if key not in keys})
    filled, notes = {**config, **told}, []
    for key in keys:
        if filled.get(key) is not None:
            continue
        if row is not None:
            filled[key] = row.values[key]
            shown = ", ".join(f"{name} {value}" for name, value in row.when.items())
            notes.append(f"{key} {row.values[key]}: {row.name}'s, by {shown} in {file.rpartition('/')[2]}; --{key} says another")
        else:
            sizes = ", ".join(each.name for each in family.published)
            expected = f"the size of {sizes}: no other has a {key} that is known, and {file.rpartition('/')[2]} cannot say it"
            found = ", ".join(f"{name} {config.get(name)}" for name in family.published[0].when)
            remedy = f"Give --{key}, as config.json of the model that the file was made of has it"
            problems.append(Problem(f"{file}: {key}", f"none, and {found}", expected, remedy))
    return FilledIn(filled, tuple(notes), tuple(problems))


def _note(value: str, row: KnownModel, file: str, option: str) -> str:
    """One line: the value that was taken, why, and the option that says another."""
    name = file.rpartition("/")[2]
    told = ", ".join(f"{key} {str(value).lower() if isinstance(value, bool) else value}" for key, value in row.when.items())
    why = f"{row.name}'s, by {told} in {name}" if row.name else f"{name} says neither it nor which model this is"
    return f"{value}: {why}; --{option} says another"


def _differing(config: Mapping[str, Any], family: Family, file: str, given: Mapping[str, Any]) -> list[Problem]:
    """The options that say another thing than a configuration that says everything itself."""
    keys = {
        FACTOR: (f"{SCALING}.factor", "rope_parameters.factor"),
        POSITIONS: family.fields.get(POSITIONS, ()),
        SCALAR: family.settings.get(SCALAR, ()),
    }
    problems = []
    for name, value in given.items():
        found = next((each for key in keys[name] if (each := lookup(config, key)) is not None), None)
        if value != found:
            whose = "a GGUF file of Gemma's" if name == SCALAR else "Meta's params.json"
            expected = f"no option: it is for {whose}, which does not say it"
            shown = f"{found} in {file}" if found is not None else f"none in {file}"
            problems.append(
                Problem(f"--{name} {value}", shown, expected, "Leave it out, or mend the configuration if that is wrong")
            )
    return problems
