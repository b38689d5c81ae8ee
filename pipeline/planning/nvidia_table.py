"""The flags of NVIDIA's scripts that people paste and that are no options of headrace's own.

`configs/flags/convert_checkpoint.toml` has them all. Each is another name of an option, a value that the model must have, accepted,
or refused with what to do instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from pipeline.model.table_files import load_table
from pipeline.model.tables import CONFIGS


@dataclass(frozen=True)
class NvidiaFlag:
    """One flag, with the keys of its row in the file as it explains them; `words` are more spellings."""

    name: str
    takes: Literal["nothing", "integer", "number", "text"] = "nothing"
    words: tuple[str, ...] = ()
    becomes: str = ""
    expects: str = ""
    config: str = ""
    source: bool = False
    accepts: tuple[str, ...] = ()
    quiet: tuple[str, ...] = ()
    refused: str = ""
    remedy: str = ""
    help: str = ""


@cache
def nvidia_flags() -> Mapping[str, NvidiaFlag]:
    """Load the flags, by name without the leading dashes."""
    data = load_table(CONFIGS / "flags", "convert_checkpoint")
    return {name: _flag(name, row) for name, row in data.items()}


def _flag(name: str, row: Mapping[str, Any]) -> NvidiaFlag:
    lists = ("words", "accepts", "quiet")
    values: dict[str, Any] = {key: tuple(value) if key in lists else value for key, value in row.items()}
    return NvidiaFlag(name, **values)
