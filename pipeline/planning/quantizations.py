"""The names of quantizations: `--quantization NAME` says in one word what several of NVIDIA's flags say together.

QUANTIZATIONS is the one table of them. A job has both: its flags follow from the name, and its name from the flags, so that either
way of asking is the same job.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import Problem
from pipeline.model.quantization import AWQ, FP8, FP8_ROWWISE, NVFP4, SQ_KINDS

OPTION = "quantization"
WEIGHT_ONLY = "use_weight_only"
PRECISION = "weight_only_precision"
SMOOTHQUANT = "smoothquant"
ALPHA = 0.5  # of a name that says SmoothQuant, where no flag says another


@dataclass(frozen=True)
class NamedQuantization:
    """One way to quantize a target.

    Parameters
    ----------
    algorithm
        TensorRT-LLM's name of it; None for the source's own, which is none where it is not quantized.
    calibrated
        Whether its scales rest on calibration, so that only a source that is quantized so can have it.
    flags
        NVIDIA's flags that ask for it.
    measured
        Whether, of numbers, its scales rest on a calibration of headrace's (`--act_range`).
    kind_of
        The name of the quantization that this is another kind of; "" for none.
    """

    algorithm: str | None = None
    calibrated: bool = False
    flags: Mapping[str, Any] = field(default_factory=dict)
    measured: bool = False
    kind_of: str = ""


def _weight_only(algorithm: str, precision: str, calibrated: bool = False, measured: bool = False) -> NamedQuantization:
    return NamedQuantization(algorithm, calibrated, {WEIGHT_ONLY: True, PRECISION: precision}, measured)


def _smoothquant(per_channel: bool, per_token: bool) -> NamedQuantization:
    flags = {SMOOTHQUANT: ALPHA, "per_channel": per_channel, "per_token": per_token}
    kind_of = "" if per_channel and per_token else "w8a8_sq"
    return NamedQuantization(SQ_KINDS[per_channel, per_token], False, flags, measured=True, kind_of=kind_of)


QUANTIZATIONS: Mapping[str, NamedQuantization] = {
    "none": NamedQuantization(),
    "int8": _weight_only("W8A16", "int8"),
    "int4": _weight_only("W4A16", "int4"),
    "int4_gptq": _weight_only("W4A16_GPTQ", "int4_gptq", calibrated=True),
    "int8_gptq": _weight_only("W8A16_GPTQ", "int8_gptq", calibrated=True),
    "int4_awq": _weight_only(AWQ, "int4_awq", measured=True),
    "fp8": NamedQuantization(FP8, False, {"use_fp8": True}, measured=True),
    "fp8_rowwise": NamedQuantization(FP8_ROWWISE, False, {"use_fp8_rowwise": True}),
    "nvfp4": NamedQuantization(NVFP4, True, {"use_nvfp4": True}),
    "w8a8_sq": _smoothquant(per_channel=True, per_token=True),
    "w8a8_sq_per_channel": _smoothquant(per_channel=True, per_token=False),
    "w8a8_sq_per_token": _smoothquant(per_channel=False, per_token=True),
    "w8a8_sq_per_tensor": _smoothquant(per_channel=False, per_token=False),
}
# The value of each of these flags that asks for nothing.
UNASKED: Mapping[str, Any] = {
    flag: {PRECISION: "int8", SMOOTHQUANT: None}.get(flag, False) for named in QUANTIZATIONS.values() for flag in named.flags
}


def asked(values: Mapping[str, Any]) -> list[str]:
    """The names of all that the values of NVIDIA's flags ask for; more than one contradict each other."""
    given = {**UNASKED, **values}
    return [
        name
        for name, row in QUANTIZATIONS.items()
        if row.flags and all(_same(flag, given[flag], value) for flag, value in row.flags.items())
    ]


def _same(flag: str, given: Any, value: Any) -> bool:
    """Whether a flag's value asks for what a name's does: SmoothQuant's alpha, whichever it is, for SmoothQuant."""
    return (given is None) == (value is None) if flag == SMOOTHQUANT else bool(given == value)


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A job's or target's options with the flags that their `quantization` stands for, or else with the name of their flags.

    Options that contradict each other are returned as they are: `contradictions` says what is wrong with them.
    """
    name = values.get(OPTION)
    if OPTION not in values:
        names = asked(values)
        return {**values, OPTION: names[0]} if len(names) == 1 else dict(values)
    if not isinstance(name, str) or name not in QUANTIZATIONS or contradictions(values):
        return dict(values)
    flags = QUANTIZATIONS[name].flags
    alpha = {SMOOTHQUANT: values[SMOOTHQUANT]} if SMOOTHQUANT in values and SMOOTHQUANT in flags else {}
    return {**values, **flags, **alpha}


def overlaid(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the options of `over` in their place: a name replaces what flags say, and flags change what a name says."""
    kept = dict(base)
    if OPTION in over:
        kept = {name: value for name, value in kept.items() if name not in UNASKED}
    elif not UNASKED.keys().isdisjoint(over):
        kept = completed(base)
        kept.pop(OPTION, None)
        if over.get(WEIGHT_ONLY) is False and PRECISION not in base:
            kept.pop(PRECISION, None)  # it came with the name
    return {**kept, **over}


def contradictions(values: Mapping[str, Any]) -> list[Problem]:
    """Say where `quantization` and NVIDIA's flags, both given, are not the same; values that are no choices are left alone."""
    name = values.get(OPTION)
    if not isinstance(name, str) or name not in QUANTIZATIONS:
        return []
    given = {flag: values[flag] for flag in UNASKED if flag in values}
    if given.get(WEIGHT_ONLY) and PRECISION not in given:
        given[PRECISION] = UNASKED[PRECISION]  # as NVIDIA's flag alone means it
    wanted = {**UNASKED, **QUANTIZATIONS[name].flags}
    differing = {flag: value for flag, value in given.items() if not _same(flag, value, wanted[flag])}
    if not differing:
        return []
    asks = {flag: value for flag, value in QUANTIZATIONS[name].flags.items() if value is not False}
    expected = f"what {name} stands for: {words(asks) or 'none of these flags'}"
    return [Problem(f"--{OPTION} {name}", f"{words(differing)} beside it", expected, f"Give --{OPTION} alone, or the flags alone")]


def without_contradictions(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """A job's options, and what `contradictions` says of them and of its targets' tables; names that it is about are left out."""
    kept, problems = dict(values), contradictions(values)
    if problems:
        del kept[OPTION]
    tables = values.get("target")
    if isinstance(tables, list | tuple) and all(isinstance(table, Mapping) for table in tables):
        found = [contradictions(table) for table in tables]
        kept["target"] = [
            {name: value for name, value in table.items() if name != OPTION or not wrong}
            for table, wrong in zip(tables, found, strict=True)
        ]
        problems += [problem for wrong in found for problem in wrong]
    return kept, list(dict.fromkeys(problems))


def precision_alone(precision: str) -> Problem:
    """The problem of a precision of weights that nothing asks to be quantized."""
    flags = f"--{PRECISION} {precision}"
    remedy = f"Give --{WEIGHT_ONLY} too, or --{OPTION} {precision} alone; without either leave it out"
    return Problem(flags, f"no --{WEIGHT_ONLY}, without which nothing is quantized", f"--{WEIGHT_ONLY} {flags}", remedy)


def words(flags: Mapping[str, Any]) -> str:
    """Flags as a command line has them."""
    return " ".join(
        f"--{name}" if value is True else f"--no_{name}" if value in (False, None) else f"--{name} {value}"
        for name, value in flags.items()
    )
