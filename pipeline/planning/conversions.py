"""Say what a source becomes by which options, and at which tp_sizes: a line for each, for `headrace inspect`.

The first is asked of a plan. So are the others where that one is refused; where it works, only what options change is asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.errors import BadInput, Problem
from pipeline.planning.compose import choose_all
from pipeline.planning.job import Job, make_job
from pipeline.planning.make_plan import plan_opened
from pipeline.planning.opening import OpenedSource
from pipeline.planning.quantizations import words
from pipeline.planning.runtime_fit import check_runtime, fit
from pipeline.printed import shortened
from stages.quantization.alignment import aligned, alignment
from stages.shard import tp_sizes

# Of a source of numbers, and of one of codes, which are kept where no option is given.
OF_NUMBERS: tuple[Mapping[str, Any], ...] = ({"quantization": "int8"}, {"quantization": "int4"}, {"quantization": "fp8_rowwise"})
OF_CODES: tuple[Mapping[str, Any], ...] = (
    {"dequantize": True},
    *({"dequantize": True, **options} for options in OF_NUMBERS),
    {"requantize": True, "quantization": "int4_gptq", "group_size": 128},
)
_LONGEST = 400  # characters of a reason


def conversions(opened: OpenedSource, refused: tuple[Problem, ...]) -> list[dict[str, Any]]:
    """Every way to convert a source: its `options`, what it `becomes`, its `tp_sizes`, and `says`, which is all of it in words.

    `refused`: the problems of a plan without options. What has problems becomes nothing (None) and has no sizes.
    """
    ways = [_way(opened, {}, refused)]
    for options in OF_CODES if opened.packing.format else OF_NUMBERS:
        ways.append(_way(opened, options, _refusals(opened, options) if refused else ()))
    return ways


def _refusals(opened: OpenedSource, options: Mapping[str, Any]) -> tuple[Problem, ...]:
    try:
        plan_opened(replace(opened, job=_job(opened.job, options)))
    except BadInput as error:
        return tuple(error.problems)
    return ()


def _job(job: Job, options: Mapping[str, Any]) -> Job:
    where = {"model_dir": job.model_dir, "revision": job.revision, "output_dir": Path(job.targets[0].output_dir)}
    return make_job({**where, "scratch_after": "none", **options})


def _way(opened: OpenedSource, options: Mapping[str, Any], problems: tuple[Problem, ...]) -> dict[str, Any]:
    asked = replace(opened, job=_job(opened.job, options))
    chosen, contradictions = choose_all(asked.job.targets, opened.packing, opened.source.named)
    if not problems and not contradictions:
        chosen = fit(asked, chosen)
        problems = tuple(check_runtime(asked, chosen)[0])
    problems = (*problems, *contradictions)[:1]
    result: dict[str, Any] = {"options": words(options), "becomes": None, "tp_sizes": []}
    if problems:
        return {**result, "says": f"no: {shortened(str(problems[0]), _LONGEST)}"}
    (sharding,), (quantization,) = opened.shardings, chosen
    dividing = tp_sizes(sharding.model, sharding)
    sizes = aligned(sharding, quantization, dividing)
    result |= {"becomes": quantization.algorithm or opened.auto_dtype, "tp_sizes": sizes}
    left = [size for size in dividing if size not in sizes]
    if not left:
        return {**result, "says": f"converts at every --tp_size that divides: {_listed(sizes)}"}
    cut = replace(sharding, parallelism=type(sharding.parallelism).resolve(left[0], 1, 1, -1, -1))
    reason = next(iter(alignment(cut, quantization, sizes)))
    why = f"not at {_listed(left)}: at {left[0]} {reason.found}, where the kernels need {reason.expected}"
    return {**result, "says": f"converts at --tp_size {_listed(sizes) or 'none'}, {why}"}


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))
