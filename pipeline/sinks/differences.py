"""The difference between a conversion that is in a directory and the one that is asked for, in words: which option, old and new."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

SHOWN = 4  # options in a sentence


def differences(said: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """The difference of two provenances (headrace.json's values): `with tp_size 3 (asked: 1)`. "" where they say of none.

    `said`: of the conversion that is there, of which parts may be missing or of any type.
    """
    there, here = _table(said, "source"), _table(asked, "source")
    other = f"of another source, {there['path']}" if "path" in there and there["path"] != here.get("path") else ""
    options = list(_options(_table(said, "options"), _table(asked, "options")))
    if options:
        more = f" and {len(options) - SHOWN} more" if len(options) > SHOWN else ""
        return f"{other}{', ' if other else ''}with {', '.join(options[:SHOWN])}{more}"
    if other:
        return other
    if "files" in there and there["files"] != here.get("files"):
        return "of this source as it was before its files changed"
    if "headrace" in said and said.get("headrace") != asked.get("headrace"):
        return f"by headrace {said['headrace']}, not {asked.get('headrace')}"
    return ""


def _options(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """`name old (asked: new)` of each option that both say and that differs, or that one alone says."""
    if not there:
        return
    for name in dict.fromkeys((*here, *there)):
        if there.get(name) != here.get(name):
            yield f"{name} {_word(there.get(name))} (asked: {_word(here.get(name))})"


def _word(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _table(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = values.get(key)
    return found if isinstance(found, Mapping) else {}
