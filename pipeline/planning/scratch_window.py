"""How far scratch is written ahead of what reads it: edges of a graph by which a group waits for the readers of an earlier one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pipeline.planning.bind import BoundGroup

Key = tuple[str, Any]


def last_stage(group: BoundGroup) -> str:
    """The stage of a group's last task."""
    return "write" if group.is_last else "scratch"


def window_edges(groups: Sequence[BoundGroup], window: int | None, name: Callable[[int], Any]) -> dict[int, list[Key]]:
    """For each group that writes scratch, the readers of chunks some groups before it: it waits for them."""
    if window is None:
        return {}
    result: dict[int, list[Key]] = {}
    position = {group.number: n for n, group in enumerate(groups)}
    maker = {chunk: group.number for group in groups for chunk in group.writes}
    readers: dict[int, list[BoundGroup]] = {}
    for group in groups:
        for number in {maker[chunk] for chunk in group.reads if chunk in maker}:
            readers.setdefault(number, []).append(group)
    phases = {group.phase for group in groups if not group.is_last}
    needs = {group.number: {maker[chunk] for chunk in group.reads if chunk in maker} for group in groups}
    for phase in sorted(phases):
        writing = [group for group in groups if group.phase == phase]
        for earlier, group in zip(writing, writing[window:], strict=False):
            waits = [
                reader
                for reader in readers.get(earlier.number, ())
                # A reader that needs what this group or a later one writes cannot be waited for.
                if all(position[made] < position[group.number] for made in needs[reader.number])
                # Of one cut that is all that it can need; behind another one, it may need it by way of others.
                and (len(phases) == 1 or not _comes_before(group.number, reader.number, needs))
            ]
            if waits:
                result[group.number] = [(last_stage(reader), name(reader.number)) for reader in waits]
                needs[group.number] |= {reader.number for reader in waits}
    return result


def _comes_before(first: int, group: int, needs: Mapping[int, Iterable[int]]) -> bool:
    """Whether a group needs another one, however far. `needs`: what each one needs at once."""
    left, seen = [group], {group}
    while left:
        new = set(needs[left.pop()]) - seen
        if first in new:
            return True
        seen |= new
        left += new
    return False
