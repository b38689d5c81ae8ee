"""Sets of files: the shards of one checkpoint by their names, and two checkpoints that lie in one directory."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from pipeline.errors import Problem
from pipeline.printed import many

_SHARD = re.compile(r"(.+)-(\d{1,6})-of-(\d{1,6})(\.\w+)")
_ONE = "one set of files"
_REMEDY = "Move the set that is not the model to another directory"


def set_of(name: str) -> str:
    """The set that a file belongs to: `model-*-of-00003.safetensors`, or its own name."""
    match = _SHARD.fullmatch(name)
    return f"{match[1]}-*-of-{match[3]}{match[4]}" if match else name


def sets_of(names: Iterable[str]) -> str:
    """The sets of some files, each with their number, as messages have them."""
    counts = Counter(map(set_of, names))
    shown = [f"{name} ({many(count, 'file')})" for name, count in sorted(counts.items())]
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


def unfinished(paths: Sequence[Path]) -> list[Problem]:
    """The shards that are missing by the numbers in the others' names, where no index lists them."""
    there: dict[tuple[str, str, str], set[int]] = {}
    for path in paths:
        if match := _SHARD.fullmatch(path.name):
            there.setdefault((match[1], match[3], match[4]), set()).add(int(match[2]))
    problems = []
    for (stem, count, suffix), numbers in there.items():
        absent = int(count) - len(numbers)
        first = next((number for number in range(1, int(count) + 1) if number not in numbers), None)
        if absent > 0 and first is not None:
            name = f"{stem}-{first:0{len(count)}}-of-{count}{suffix}"
            found = f"no such file{f', nor {absent - 1} others of its set' if absent > 1 else ''}"
            problems.append(
                Problem(str(paths[0].parent / name), found, f"all {int(count)} files, as their names say", "Fetch them")
            )
    return problems


def stale_index(index: Path, missing: Collection[str], others: Collection[str]) -> Problem:
    """The problem of an index that names files which are not there, beside files that it does not name."""
    found = f"an index of {sets_of(missing)}, not there, beside {sets_of(others)}, which it does not name"
    return Problem(
        str(index), found, "an index of the files beside it", "Fetch the files that it names, or move a stale index away"
    )


def two_sets(location: Path, read: Collection[str], others: Collection[str]) -> Problem:
    """The problem of two sets each of which could be the model."""
    return Problem(str(location), f"two sets of weights: {sets_of(read)}, and {sets_of(others)}", _ONE, _REMEDY)


def repeated(location: Path, twice: Mapping[str, tuple[Path, Path]]) -> list[Problem]:
    """The problems of tensors that stand in two files each: one for each two sets of files."""
    pairs: dict[tuple[str, str], list[str]] = {}
    for name, (first, second) in twice.items():
        pairs.setdefault((set_of(first.name), set_of(second.name)), []).append(name)
    problems = []
    for (one, other), names in pairs.items():
        if len(names) == 1:
            first, second = twice[names[0]]
            remedy = "Remove one of the files, or the tensor from one of them"
            problems.append(Problem(names[0], f"the tensor in both {first.name} and {second.name}", "one home", remedy))
            continue
        where = f"in both {one} and {other}" if one != other else f"in two files of {one}"
        found = f"{many(len(names), 'tensor')} {where}, such as {names[0]}"
        problems.append(Problem(str(location), found, _ONE, _REMEDY))
    return problems


def left_alone(read: Collection[str], others: Collection[str]) -> tuple[str, ...]:
    """The note on weights beside those that are read; none where there are none."""
    return (f"files: {sets_of(others)} beside {sets_of(read)} are not read",) if others and read else ()
