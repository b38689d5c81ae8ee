"""unpack: the inverse of the format's packing; leaves dense modules alone.

Works module by module on local parameter names, so that it knows no family. `PackedFormat` says what a format is
(stages/quantization/packed_format.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from pipeline.errors import Problem
from pipeline.tensor.names import TensorName, by_module, split_names
from pipeline.tensor.placement import whole
from pipeline.tensor.tensors import MEASURED, LazyTensor, TensorMap
from stages.quantization import cache_scales
from stages.quantization.packed_format import PackedFormat
from stages.quantization.sources import format_named, formats

FEW = 3  # problems of one cause that are still said one by one
Names = Callable[[str], Iterable[str]]  # those by which settings may call a module
NO_SETTINGS: Mapping[str, Mapping[str, Any]] = MappingProxyType({})


@dataclass(frozen=True)
class Examined:
    """The packed modules of a source, by the source's own names.

    `formats`: packed module -> its format. `ordered`: modules whose groups follow the activations, which can only be dequantized.
    `own`: the settings of modules of which the source says something else than of all. `problems`: of those that cannot be
    unpacked. `cache`: of the scales of a cache, which matter to a target that has some alone.
    """

    formats: Mapping[str, str]
    ordered: Sequence[str]
    own: Mapping[str, Mapping[str, Any]]
    problems: Sequence[Problem]
    cache: Sequence[Problem]


def format_of(parameters: Mapping[str, Any]) -> PackedFormat | None:
    """The format whose parameters (by local name; anything with a shape and a dtype) a module's are; None for a dense module."""
    return next((each for each in formats() if each.accepts(parameters)), None)


def _itself(module: str) -> Iterable[str]:
    return (module,)


class _Formats:
    """The format of modules one after another: modules of equal names, shapes and types of parameters are of one format."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], PackedFormat | None] = {}

    def of(self, parameters: Mapping[str, Any]) -> PackedFormat | None:
        key = tuple((name, tuple(each.shape), each.dtype) for name, each in parameters.items())
        if key not in self._known:
            self._known[key] = format_of(parameters)
        return self._known[key]


def unpack(tensors: TensorMap, settings: Mapping[str, Any], own: Mapping[str, Mapping[str, Any]] = NO_SETTINGS) -> TensorMap:
    """Turn every packed module into canonical parameters (`AXES` in pipeline/tensor/tensors.py).

    `settings`: what the quantizer says; `own`: what it says of single modules, by their names here.
    """
    result, known = {}, _Formats()
    for module, parameters in by_module(tensors).items():
        ranges = {name: array for name, array in parameters.items() if name in MEASURED}
        rest, scales = cache_scales.divided({name: array for name, array in parameters.items() if name not in ranges})
        packing = known.of(rest)
        unpacked = packing.unpack(rest, own.get(module, settings)) if packing else rest
        for parameter, array in {**unpacked, **cache_scales.unpack(scales, settings), **ranges}.items():
            result[TensorName(module, parameter)] = array
    return result


def arranged(tensors: Mapping[str, LazyTensor]) -> Mapping[str, LazyTensor]:
    """The tensors of a source by name, those of packed modules in shapes that have the axes of their format.

    Reads the small tensors that say them; the same mapping where nothing is stored flat.
    """
    result = dict(tensors)
    for module, parameters in by_module(split_names(tensors)).items():
        if parameters.keys() <= {"weight", "bias"}:
            continue
        packing = format_of(parameters)
        made = packing.arrange(parameters) if packing else parameters
        if made is not parameters:
            result |= {str(TensorName(module, parameter)): tensor for parameter, tensor in made.items()}
    return result


def axes(
    formats_: Mapping[str, str], tensors: Mapping[TensorName, LazyTensor] = MappingProxyType({})
) -> dict[str, dict[str, tuple[str, ...]]]:
    """The axes of packed modules' parameters, by module (`formats_`: module -> its format) and local name.

    And those of the scales of a cache, on whichever modules of `tensors` these are.
    """
    known = {name: {key: packed.axes for key, packed in format_named(name).parameters.items()} for name in set(formats_.values())}
    result = {module: known[name] for module, name in formats_.items()}
    for module, parameter in tensors:
        if parameter in cache_scales.PARAMETERS:
            result[module] = {**result.get(module, {}), parameter: cache_scales.PARAMETERS[parameter].axes}
    return result


def zero_biases(tensors: Mapping[TensorName, LazyTensor], formats_: Mapping[str, str]) -> list[TensorName]:
    """The biases of packed modules that hold nothing but zeros: some quantizers give one to every linear. Reads them."""
    names = [TensorName(module, "bias") for module in formats_]
    return [name for name in names if name in tensors and not np.any(np.asarray(tensors[name].block(whole(tensors[name].shape))))]


def check(tensors: Mapping[TensorName, LazyTensor], settings: Mapping[str, Any], names: Names = _itself) -> Examined:
    """Examine the packed modules of a source, by the source's own names. Reads the small tensors that decide what they are.

    Where one thing is wrong in many modules, one problem stands for all. `names`: those by which the settings may call a module.
    """
    formats_, ordered, problems, known = dict[str, str](), list[str](), list[tuple[str, Problem]](), _Formats()
    own, cache = dict[str, Mapping[str, Any]](), list[tuple[str, Problem]]()
    for module, parameters in by_module(tensors).items():
        parameters, scales = cache_scales.divided(parameters)
        cache += [(module, problem) for problem in cache_scales.check(module, scales, alone=not parameters)]
        packing = known.of(parameters)
        if packing is None:
            continue
        formats_[module] = packing.name
        each = (packing.module_settings(name, parameters, settings) for name in names(module))
        said = next((found for found in each if found is not settings), settings)
        if said is not settings:
            own[module] = said
        wrong = packing.check(module, parameters, said)
        problems += [(module, problem) for problem in wrong]
        if not wrong and packing.act_order(parameters):
            ordered.append(module)
    return Examined(formats_, ordered, own, _by_cause(problems), _by_cause(cache))


def _by_cause(problems: Sequence[tuple[str, Problem]]) -> list[Problem]:
    """One problem for all modules in which one parameter is wrong in one way; a few modules are named one by one."""
    causes: dict[tuple[str, str], list[Problem]] = {}
    for module, problem in problems:
        # Sizes differ from module to module, but not what is wrong with them.
        cause = re.sub(r"\d+", "0", f"{problem.found}; {problem.expected}")
        causes.setdefault((problem.subject.removeprefix(module), cause), []).append(problem)
    result = []
    for alike in causes.values():
        if len(alike) <= FEW:
            result += alike
        else:
            result.append(replace(alike[0], found=f"{alike[0].found}, and the like in {len(alike) - 1} more modules"))
    return result
