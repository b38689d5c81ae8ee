"""Wrong values and unknown names of options in sentences: what pydantic says of them is for programmers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pipeline.errors import Problem
from pipeline.planning.nvidia_table import nvidia_flags

FEW = 16  # names that are listed where none is near
_ALIKE = 0.7  # of 1: how like a name must be to be meant
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "a text",
    "path": "a path",
    "tuple": "a list",
    "list": "a list",
    "dict": "a table",
    "model": "a table",
    "byte": "a size such as 2GiB",
    "missing": "a value",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "{} or more"),
    "greater_than": ("gt", "more than {}"),
    "less_than_equal": ("le", "{} or less"),
    "less_than": ("lt", "less than {}"),
}


def expected(detail: Mapping[str, Any]) -> str:
    """The value that was expected, by one of pydantic's errors, as its `errors()` has it."""
    kind, context = str(detail["type"]), detail.get("ctx") or {}
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return words.format(f"{context[key]:g}" if isinstance(context[key], float) else context[key])
    if kind == "literal_error":
        return str(context["expected"]).replace("'", "")
    if kind == "value_error":
        return str(detail["msg"]).removeprefix("Value error, ")
    return _KINDS.get(kind.partition("_")[0]) or str(detail["msg"]).removeprefix("Input should be ").lower()


def wrong_value(subject: str, detail: Mapping[str, Any]) -> Problem:
    """The problem of a value that pydantic refuses, with the choice that was meant, where there is one alike."""
    found = detail.get("input")
    if detail["type"] == "missing":
        return Problem(subject, "nothing", expected(detail))
    choices = expected(detail).replace(" or ", ", ").split(", ") if detail["type"] == "literal_error" else []
    return Problem(subject, repr(found), expected(detail), meant(str(found), choices))


def unlike(details: Sequence[Any]) -> list[Any]:
    """One of pydantic's errors for each value: of those of a union, the last, which takes most."""
    by_value = {(*detail["loc"][: _depth(detail["loc"])], repr(detail.get("input"))): detail for detail in details}
    return list(by_value.values())


def place(location: Sequence[Any]) -> str:
    """The name of a value by pydantic's place of it, without the arms of unions."""
    return ".".join(map(str, location[: _depth(location)]))


def _depth(location: Sequence[Any]) -> int:
    arms = ("str", "int", "float", "path")  # behind a name: behind a number stands a key
    end = len(location)
    while (
        end > 1
        and all(isinstance(part, str) for part in location[end - 2 : end])
        and (location[end - 1] in arms or "[" in location[end - 1])
    ):
        end -= 1
    return end


def meant(name: str, names: Collection[str]) -> str:
    """The question whether a name that is alike was meant; "" where none is."""
    near = get_close_matches(name.lower().replace("-", "_"), list(names), 1, _ALIKE)
    return f"Did you mean {near[0]}?" if near else ""


def unknown_name(subject: str, name: str, names: Collection[str], found: str, where: str) -> Problem:
    """The problem of a name that is none of `names`: a flag of NVIDIA's, or one that is alike, or `where` all are listed."""
    flag = nvidia_flags().get(name.replace("-", "_"))
    if flag and flag.becomes in names:
        return Problem(subject, f"a flag of NVIDIA's, another name of {flag.becomes}", flag.becomes)
    if flag and flag.refused and "tp_size" in names:
        return Problem(subject, f"a flag of NVIDIA's that is not taken: {flag.refused}", "an option that headrace has", flag.remedy)
    if flag and flag.expects and "tp_size" in names:
        remedy = f"Leave it out, or write {flag.expects} into the table `expect`, which the model is held against"
        return Problem(subject, "a flag of NVIDIA's for the model's shape", "the shape that the model's configuration says", remedy)
    few = ", ".join(sorted(names)) if len(names) <= FEW else where
    return Problem(subject, found, few, meant(name, names))
