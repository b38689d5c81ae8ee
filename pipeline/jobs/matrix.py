"""A matrix: tables of options with lists in them become one job for each combination.

[[matrix]]
model_dir = ["/models/llama-*", "/models/mistral-7b"]     # patterns are looked up
tp_size = [1, 2]
quantization = ["none", "int8"]
output_dir = "/ranks/{model}-tp{tp_size}-{quantization}"
exclude = [{tp_size = 2, quantization = "int8"}]
"""

from __future__ import annotations

import glob
import itertools
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import BadInput, Problem
from pipeline.planning.home import from_folder
from pipeline.planning.job import Job
from pipeline.planning.job_file import anchored
from pipeline.planning.quantizations import QUANTIZATIONS

SOURCES = ("model_dir", "meta_ckpt_dir")
# An option of these is a list by nature.
_LISTS = {"scratch_after"}


def expand(table: Mapping[str, Any], folder: Path, where: str, patterns: bool = True) -> list[dict[str, Any]]:
    """The options of each combination, in the order of the table's keys, the last one running fastest; paths are absolute.

    `folder`: what relative paths are relative to; `where`: the table's place, for the report; `patterns`: whether sources are
    looked up as such. Raises BadInput.
    """
    axes, problems = _axes(table, folder if patterns else None, where)
    excluded = table.get("exclude", [])
    if not isinstance(excluded, list) or not all(isinstance(each, Mapping) for each in excluded):
        problems.append(Problem(f"{where}.exclude", repr(excluded), "a list of tables"))
    if not isinstance(table.get("output_dir"), str):
        problems.append(Problem(f"{where}.output_dir", repr(table.get("output_dir")), "a text such as /ranks/{model}-tp{tp_size}"))
    if problems:
        raise BadInput(problems)
    jobs: list[dict[str, Any]] = []
    directories: dict[str, dict[str, Any]] = {}
    for combination in itertools.product(*axes.values()):
        chosen = dict(zip(axes, combination, strict=True))
        if any(all(_same(chosen.get(key), value) for key, value in each.items()) for each in excluded):
            continue
        output = filled(table["output_dir"], placeholders(chosen), f"{where}.output_dir")
        if output in directories:
            differing = [key for key in chosen if chosen[key] != directories[output][key]]
            expected = f"a directory for each combination: name {{{differing[0] if differing else 'model'}}} in it"
            raise BadInput([Problem(f"{where}.output_dir", f"{output} for two of them", expected)])
        directories[output] = chosen
        jobs.append(anchored({**chosen, "output_dir": output}, folder))
    if not jobs:
        raise BadInput([Problem(where, "no combination that is not excluded", "one at least")])
    return jobs


def placeholders(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Values for the braces in an output directory's name: every option, and `model`, the last part of the source's path."""
    source = next((str(chosen[key]) for key in SOURCES if key in chosen), "")
    path = source.rstrip("/").rpartition("/")[2]
    return {**chosen, "model": path.removesuffix(".gguf")}


def filled(template: str, values: Mapping[str, Any], where: str) -> str:
    """A text with its braces filled. Raises BadInput where it names what is not there."""
    try:
        names = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
        unknown = sorted(names - set(values))
        if unknown:
            raise BadInput([Problem(where, f"{{{unknown[0]}}}", f"one of {', '.join(sorted(values))}")])
        return template.format_map(values)
    except (ValueError, IndexError, AttributeError) as error:
        raise BadInput([Problem(where, f"{template!r} ({error})", "a text with names in braces")]) from None


def _axes(table: Mapping[str, Any], folder: Path | None, where: str) -> tuple[dict[str, Sequence[Any]], list[Problem]]:
    """Every option with its choices."""
    known = [*Job.model_fields, "exclude"]
    axes: dict[str, Sequence[Any]] = {}
    problems = []
    for key, value in table.items():
        if key in ("exclude", "output_dir"):
            continue
        choices = value if isinstance(value, list) and key not in _LISTS else [value]
        if key not in known or key == "target":
            problems.append(Problem(f"{where}.{key}", "an option that headrace does not have", ", ".join(known)))
        elif not choices:
            problems.append(Problem(f"{where}.{key}", "an empty list", "a value, or a list of values"))
        elif key == "quantization" and (unknown := [each for each in choices if each not in QUANTIZATIONS]):
            problems.append(Problem(f"{where}.{key}", repr(unknown[0]), f"of {', '.join(QUANTIZATIONS)}"))
        elif key in SOURCES and folder:
            axes[key], missing = _found(choices, folder, f"{where}.{key}")
            problems += missing
        else:
            axes[key] = choices
    return axes, problems


def _found(choices: Sequence[Any], folder: Path, where: str) -> tuple[list[Any], list[Problem]]:
    """Sources, with what patterns among them stand for."""
    found: list[Any] = []
    problems = []
    for choice in choices:
        if not isinstance(choice, str) or not glob.has_magic(choice) or "://" in choice:
            found.append(choice)
            continue
        paths = sorted(glob.glob(str(from_folder(choice, folder))))  # noqa: PTH207 (takes absolute patterns)
        found += paths
        if not paths:
            problems.append(Problem(where, f"nothing at {choice}", "a pattern that some checkpoint's path fits"))
    return list(dict.fromkeys(found)), problems


def _same(found: Any, wanted: Any) -> bool:
    return bool(found in wanted if isinstance(wanted, list) else found == wanted)
