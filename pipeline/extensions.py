"""Loads the objects that other packages add to headrace: each fulfils a protocol, and an entry point names it."""

from __future__ import annotations

from collections.abc import Collection
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pipeline.errors import BadInput, Problem


def extensions(group: str, protocol: type, taken: Collection[str]) -> tuple[Any, ...]:
    """The objects that the entry points of a group name, in the order of their names.

    `taken`: the names (`name` of the protocol) that objects of our own have. Raises BadInput with every entry point that cannot be
    loaded, lacks something of the protocol, or has a name that is taken.
    """
    result: list[Any] = []
    problems = []
    names = dict.fromkeys(taken, "headrace's own")
    for point in sorted(entry_points(group=group), key=lambda point: (point.name, point.value)):
        found = _loaded(point, protocol)
        if isinstance(found, str):
            problems.append(_refused(point, found, f"an object with {', '.join(members(protocol))}"))
        elif found.name in names:
            problems.append(_refused(point, f"the name {found.name!r} again", f"another than {names[found.name]}"))
        else:
            names[found.name] = f"that of {point.value}"
            result.append(found)
    if problems:
        raise BadInput(problems)
    return tuple(result)


def members(protocol: type) -> list[str]:
    """The names of what a protocol asks for: attributes first, then methods."""
    return [*protocol.__annotations__, *_methods(protocol)]


def _methods(protocol: type) -> list[str]:
    return [name for name, value in vars(protocol).items() if not name.startswith("_") and callable(value)]


def _loaded(point: EntryPoint, protocol: type) -> Any:
    """The object that an entry point names; or, as text, the reason why it is not one of the protocol."""
    try:
        found = point.load()
    except Exception as error:  # whatever the other package's import raises
        return f"{point.value}, which cannot be loaded ({type(error).__name__}: {error})"
    if isinstance(found, type):
        return f"{point.value}, which is a class"
    missing = [name for name in members(protocol) if not hasattr(found, name)]
    missing += [name for name in _methods(protocol) if not callable(getattr(found, name, str))]
    if missing:
        return f"{point.value} without {', '.join(missing)}"
    return found if isinstance(found.name, str) and found.name else f"{point.value} of the name {found.name!r}"


def _refused(point: EntryPoint, found: str, expected: str) -> Problem:
    package = f" of the package {point.dist.name}" if point.dist else ""
    remedy = "Mend or uninstall that package" if point.dist else ""
    return Problem(f"entry point {point.name} of {point.group}{package}", found, expected, remedy)
