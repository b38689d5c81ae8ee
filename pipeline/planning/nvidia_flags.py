"""The meaning of NVIDIA's flags for a job, and whether the model is what they say it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.errors import Problem
from pipeline.model.target_config import target_config
from pipeline.planning.nvidia_table import nvidia_flags

if TYPE_CHECKING:
    from pipeline.planning.opening import OpenedSource


@dataclass(frozen=True)
class Understood:
    """The meaning of the flags that were given: options of the job, whether to be quiet, and what is wrong with them."""

    options: Mapping[str, Any]
    quiet: bool
    problems: tuple[Problem, ...]


def understood(given: Mapping[str, Any], options: Mapping[str, Any]) -> Understood:
    """Turn flags with their values into options of a job. `options`: those that were given by headrace's own names."""
    made: dict[str, Any] = {}
    expect: dict[str, Any] = {}
    problems, quiet = [], False
    for name, value in given.items():
        flag = nvidia_flags()[name]
        subject = f"--{name}" if value is True else f"--{name} {value}"
        if flag.refused:
            found = f"a flag of NVIDIA's that is not taken: {flag.refused}"
            problems.append(Problem(subject, found, "an option that headrace has", flag.remedy))
        elif flag.accepts and value not in flag.accepts:
            problems.append(Problem(f"--{name}", repr(value), " or ".join(flag.accepts), flag.remedy))
        elif flag.becomes:
            own = options.get(flag.becomes, value)
            if str(own) != str(value):
                problems.append(Problem(subject, f"--{flag.becomes} {own} beside it", "one of the two: they are one option"))
            made[flag.becomes] = value
        elif flag.expects:
            expect[flag.expects] = value
        quiet = quiet or value in flag.quiet
    return Understood({**made, **({"expect": expect} if expect else {})}, quiet, tuple(problems))


def check_expected(opened: OpenedSource) -> list[Problem]:
    """Hold the values that the job expects of the model against those that config.json will have; returns the problems."""
    by_key = {flag.expects: flag for flag in nvidia_flags().values() if flag.expects}
    expect: Mapping[str, Any] = opened.job.expect
    problems = [
        Problem(f"expect.{key}", "a value that headrace does not know of a model", ", ".join(by_key))
        for key in expect
        if key not in by_key
    ]
    config = target_config(opened.shardings[0].layout.config, opened.family.config, opened.model, {})
    for key, value in expect.items():
        if key not in by_key:
            continue
        flag = by_key[key]
        table, _, inner = flag.config.rpartition(".")
        written = (config.get(table) or {}).get(inner) if table else config.get(key)
        own = opened.model.value(key)
        found = own if written is None else written
        if value == found or (flag.source and value == own):
            continue
        remedy = f"Leave --{flag.name} out: the model's shape is what its configuration says"
        if key in opened.job.unsaid() and opened.family.known:
            remedy = f"Leave --{flag.name} out, or give --{key} {value} where {found} is not the model's"
        problems.append(Problem(f"--{flag.name} {value}", f"{key} {found} in {opened.source.config_name}", f"{value}", remedy))
    return problems
