"""Packed formats that are known by name and not read: one problem names the format, whatever its tensors look like.

The names are data, in `configs/formats/unread.toml`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from pipeline.errors import Problem
from pipeline.model.table_files import load_table
from pipeline.model.tables import CONFIGS
from pipeline.printed import many

_DENSE = {"weight", "bias"}


@dataclass(frozen=True)
class UnreadFormat:
    """A row of the table: how a format is told, and what is said of it.

    Attributes
    ----------
    name, title
        What tables and people call it.
    said
        By key of the quantizer's settings, the values that name it: any will do.
    config
        Keys of the model's configuration that are its own: any will do.
    parameters
        Local names of parameters of one of its modules: all of any entry.
    merged
        Places of compressed-tensors' transforms that are in the weights already: a transform in another place names it.
    overrides
        Its modules look like those of a format that is read, so that what the settings say decides.
    runs
        TensorRT-LLM 1.2's algorithm for it; "" where there is none.
    remedy
        What would do.
    """

    name: str
    title: str
    remedy: str
    said: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    config: tuple[str, ...] = ()
    parameters: tuple[frozenset[str], ...] = ()
    merged: tuple[str, ...] = ()
    overrides: bool = False
    runs: str = ""

    def named_by(self, settings: Mapping[str, Any]) -> str:
        """The key of the settings that names the format; "" where none does. Texts are compared without regard to case."""
        return next((key for key, values in self.said.items() if _plain(settings.get(key)) in map(_plain, values)), "")

    def transform(self, settings: Mapping[str, Any]) -> str:
        """The first transform in the settings that the weights do not hold, by its name and place; "" where there is none.

        What cannot be read as a transform is none that the weights hold.
        """
        said = settings.get("transform_config")
        if not said or not self.merged:
            return ""
        schemes = said.get("config_groups") if isinstance(said, Mapping) else said
        if not isinstance(schemes, Mapping):
            return f"transform_config {said}"
        for name, scheme in schemes.items():
            applied = scheme.get("apply") if isinstance(scheme, Mapping) else scheme
            for each in applied if isinstance(applied, list) else [applied]:
                place = each.get("location") if isinstance(each, Mapping) else each
                if place not in self.merged:
                    return f"transform {name} at {place}"
        return ""

    def is_in(self, parameters: Collection[str]) -> bool:
        """Whether a module's parameters, by local name, are the format's."""
        return any(names <= set(parameters) for names in self.parameters)


@cache
def unread_formats() -> tuple[UnreadFormat, ...]:
    """The rows of `configs/formats/unread.toml`, in their order."""
    return tuple(_row(name, row) for name, row in load_table(CONFIGS / "formats", "unread").items())


def decided(settings: Mapping[str, Any]) -> bool:
    """Whether the settings alone decide the format, as its modules look like those of another, or like plain weights."""
    return bool(settings.get("transform_config")) or any(row.overrides and row.named_by(settings) for row in unread_formats())


def unread(
    config: Mapping[str, Any],
    config_name: str,
    settings: Mapping[str, Any],
    modules: Mapping[str, Mapping[str, Any]],
    packed: Collection[str],
) -> list[Problem]:
    """The one problem of a source in a format that is known and not read; none for any other source.

    Parameters
    ----------
    config, config_name
        The model's configuration, and what messages call it.
    settings
        The quantizer's settings, as one flat table.
    modules
        Every module's parameters, by its name and theirs.
    packed
        The modules that are of a format that is read.
    """
    # A module of numbers alone tells nothing; skipping it keeps this quick for many experts.
    others = {name: held for name, held in modules.items() if name not in packed and not held.keys() <= _DENSE}
    for row in unread_formats():
        key = row.named_by(settings)
        if key and (row.overrides or not packed):
            return [_problem(row, f"{config_name}: quantization_config.{key}", f"{settings[key]}, which is {row.title}")]
        if transform := row.transform(settings):
            subject = f"{config_name}: quantization_config.transform_config"
            return [_problem(row, subject, f"{transform}, which is {row.title}")]
        found = next((name for name, held in others.items() if row.is_in(held)), None)
        if found is not None:
            shown = ", ".join(sorted(others[found]))
            count = sum(row.is_in(held) for held in others.values())
            return [_problem(row, found, f"{shown}, which is {row.title}, in {many(count, 'module')}")]
        own = next((name for name in row.config if isinstance(config.get(name), Mapping)), "")
        if own and not packed:
            return [_problem(row, f"{config_name}: {own}", f"settings of {row.title}")]
    return []


def _problem(row: UnreadFormat, subject: str, found: str) -> Problem:
    runs = f"TensorRT-LLM 1.2 runs it as {row.runs}" if row.runs else "TensorRT-LLM 1.2 has no algorithm for it"
    expected = "a format that headrace reads, as `headrace formats` lists them"
    return Problem(subject, found, expected, f"{runs}. {row.remedy}")


def _row(name: str, row: Mapping[str, Any]) -> UnreadFormat:
    said = {key: tuple(values) for key, values in row.get("said", {}).items()}
    parameters = tuple(map(frozenset, row.get("parameters", ())))
    config, merged = (tuple(row.get(key, ())) for key in ("config", "merged"))
    plain = {key: row[key] for key in ("title", "remedy", "overrides", "runs") if key in row}
    return UnreadFormat(name=name, said=said, config=config, parameters=parameters, merged=merged, **plain)


def _plain(value: Any) -> Any:
    """A value for comparison: text in lower case, with its type, so that `true` is no 1."""
    return (str, value.lower()) if isinstance(value, str) else (type(value), value if isinstance(value, int | float) else None)
