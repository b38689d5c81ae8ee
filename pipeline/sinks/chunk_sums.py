"""The checksums of chunks of scratch, in a journal while a run goes on and in a group's attributes when a cut is whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.tensor.blocks import Part

SUMS = "xxh3"  # the attribute of a group that says them


def chunk_parts(entries: Iterable[Mapping[str, Any]]) -> dict[str, list[Part]]:
    """The parts that were written of each chunk, by a journal's entries; of a part that was written twice, the last word counts."""
    parts: dict[str, dict[int, Part]] = {}
    for entry in entries:
        for chunk, *part in entry["sums"]:
            parts.setdefault(chunk, {})[part[0]] = _part(part)
    return {chunk: sorted(by_offset.values()) for chunk, by_offset in parts.items()}


def recorded_parts(attributes: Mapping[str, Any]) -> dict[str, list[Part]]:
    """The parts of chunks that a group's attributes say, by the chunks' names in the group; none where they say no such thing."""
    try:
        return {str(name): list(map(_part, parts)) for name, parts in attributes[SUMS].items()}
    except (KeyError, AttributeError, TypeError, ValueError):
        return {}


def sums_entry(parts: Mapping[str, Sequence[Part]]) -> dict[str, Any]:
    """A journal's entry that says the checksums of chunks."""
    return {"done": [], "sums": [[chunk, *part] for chunk, each in parts.items() for part in each]}


def _part(values: Sequence[Any]) -> Part:
    offset, nbytes, digest = values
    return int(offset), int(nbytes), str(digest)
