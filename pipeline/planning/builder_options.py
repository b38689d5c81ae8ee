"""The options of trtllm-build: their names, the values that they take, and the words of a command line that give them.

The options are those that the builder's own --help lists, where there is a builder; otherwise those of
`configs/engine/trtllm-build-{VERSION}.toml`.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from pipeline.errors import Problem
from pipeline.model.tables import CONFIGS
from pipeline.planning.home import UNKNOWN

VERSION = "1.2.1"
SWITCH = {"enable", "disable"}
LEAST = 10  # a text that lists fewer options is not trtllm-build's help

_LISTED = re.compile(r"\s{1,8}(-\w, )?--\w")
_NAME = re.compile(r"--([\w-]+)")
_CHOICES = re.compile(r"\{([^}]*)\}")


@dataclass(frozen=True)
class BuilderOption:
    """One option of the builder.

    `values`: how many it takes. `choices`: the values that it accepts; empty for any. `refused`: why headrace does not pass it on;
    "" where it does. `inert`: the engine is the same whatever its value.
    """

    values: Literal["none", "one", "many"] = "one"
    type: Literal["text", "int", "path"] = "text"
    choices: tuple[str, ...] = ()
    refused: str = ""
    inert: bool = False


OptionTable = Mapping[str, BuilderOption]
Arguments = Mapping[str, tuple[str, ...]]  # the words that follow each option


@cache
def known_options() -> OptionTable:
    """Load the options of trtllm-build 1.2.1, by name without the leading dashes."""
    data = tomllib.loads((CONFIGS / "engine" / f"trtllm-build-{VERSION}.toml").read_text())
    return {name: BuilderOption(**{**row, "choices": tuple(row.get("choices", ()))}) for name, row in data.items()}


def parse_help(text: str) -> OptionTable:
    """Parse the options that an argparse --help lists; return none where the text is something else.

    What the help does not say (that a value is a number or a path, that headrace refuses it) is taken from `known_options`.
    """
    options: dict[str, BuilderOption] = {}
    for line in text.splitlines():
        if not _LISTED.match(line):
            continue
        # Two or more spaces separate the option and its values from its description.
        invocation = re.split(r"\s{2,}", line.strip())[0]
        names = [name.replace("-", "_") for name in _NAME.findall(invocation)]
        rest = _NAME.sub("", invocation).strip(" ,-h")
        listed = _CHOICES.search(rest)
        choices = tuple(dict.fromkeys(listed[1].split(","))) if listed else ()
        values: Literal["none", "one", "many"] = "none" if not rest else "many" if "..." in rest else "one"
        for name in names:
            known = known_options().get(name, BuilderOption())
            options[name] = replace(known, values=values, choices=choices)
    return options if len(options) >= LEAST else {}


def arguments(values: Mapping[str, Any], table: OptionTable) -> Arguments:
    """Return the words that follow each option on a command line, for values as a job file or a command line has them.

    Numbers become text; true and false become `enable` and `disable` where the option accepts these. Flags that are false are left
    out.
    """
    words = {}
    for name, value in values.items():
        option = table.get(name, BuilderOption("none" if isinstance(value, bool) else "one"))
        if isinstance(value, bool) and set(option.choices) >= SWITCH:
            value = "enable" if value else "disable"
        if value is False and option.values == "none":
            continue
        items = () if value is True else value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
        words[name] = tuple(map(str, items))
    return words


def command_words(given: Arguments) -> list[str]:
    """Return the words of a command line, in the order of `given`."""
    return [word for name, values in given.items() for word in (f"--{name}", *values)]


def check_options(given: Arguments, table: OptionTable, prefix: str = "--") -> list[Problem]:
    """Check options against those that the builder knows: return a problem for each unknown name, refused option and wrong value.

    `prefix`: the text before an option's name in messages.
    """
    problems = []
    for name, values in given.items():
        option, subject = table.get(name), f"{prefix}{name}"
        if option is None:
            near = difflib.get_close_matches(name, [each for each in table if not table[each].refused], 3)
            expected = f"one of its options, such as {', '.join(near)}" if near else "one of those that trtllm-build --help lists"
            problems.append(Problem(subject, "an option that trtllm-build does not have", expected))
        elif option.refused:
            problems.append(Problem(subject, "an option that headrace does not pass on", "a request without it", option.refused))
        else:
            problems += [Problem(subject, found, expected) for found, expected in _values(values, option)]
    return problems


def _values(values: tuple[str, ...], option: BuilderOption) -> list[tuple[str, str]]:
    """Return (what was found, what was expected) for each wrong value or wrong number of values."""
    counts = {"none": (0, "no value"), "one": (1, "one value")}
    if option.values in counts:
        count, expected = counts[option.values]
        if len(values) != count:
            return [(" ".join(values) or "no value", expected)]
    elif not values:
        return [("no value", "one value or more")]
    wrong = [value for value in values if option.choices and value not in option.choices]
    problems = [(value, f"one of {', '.join(option.choices)}") for value in wrong]
    if option.type == "path":  # others are absolute by now
        problems += [(value, UNKNOWN) for value in values if value.startswith("~")]
    if option.type == "int":
        problems += [(value, "a whole number") for value in values if not re.fullmatch(r"[+-]?\d+", value)]
    return problems
