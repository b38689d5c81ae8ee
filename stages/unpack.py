"""unpack: the inverse of the format's packing; leaves dense modules alone.

Works module by module on local parameter names, so that it knows no family. `PackedFormat` says what a format is
(stages/quantization/packed_format.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.errors import Problem
from pipeline.tensor.names import TensorName, by_module
from pipeline.tensor.placement import whole
from pipeline.tensor.tensors import LazyTensor, TensorMap
from stages.quantization.packed_format import PackedFormat
from stages.quantization.sources import format_named, formats


def format_of(parameters: Mapping[str, Any]) -> PackedFormat | None:
    """The format whose parameters (by local name; anything with a shape and a dtype) a module's are; None for a dense module."""
    return next((each for each in formats() if each.accepts(parameters)), None)


class _Formats:
    """The format of modules one after another: modules of equal names, shapes and types of parameters are of one format."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], PackedFormat | None] = {}

    def of(self, parameters: Mapping[str, Any]) -> PackedFormat | None:
        key = tuple((name, tuple(each.shape), each.dtype) for name, each in parameters.items())
        if key not in self._known:
            self._known[key] = format_of(parameters)
        return self._known[key]


def unpack(tensors: TensorMap, settings: Mapping[str, Any]) -> TensorMap:
    """Turn every packed module into canonical parameters (`AXES` in pipeline/tensor/tensors.py).

    `settings`: what its quantizer says.
    """
    result, known = {}, _Formats()
    for module, parameters in by_module(tensors).items():
        packing = known.of(parameters)
        for parameter, array in (packing.unpack(parameters, settings) if packing else parameters).items():
            result[TensorName(module, parameter)] = array
    return result


def axes(formats_: Mapping[str, str]) -> dict[str, dict[str, tuple[str, ...]]]:
    """The axes of packed modules' parameters, by module (`formats_`: module -> its format) and local name."""
    known = {name: {key: packed.axes for key, packed in format_named(name).parameters.items()} for name in set(formats_.values())}
    return {module: known[name] for module, name in formats_.items()}


def zero_biases(tensors: Mapping[TensorName, LazyTensor], formats_: Mapping[str, str]) -> list[TensorName]:
    """The biases of packed modules that hold nothing but zeros: some quantizers give one to every linear. Reads them."""
    names = [TensorName(module, "bias") for module in formats_]
    return [name for name in names if name in tensors and not np.any(np.asarray(tensors[name].block(whole(tensors[name].shape))))]


def check(tensors: Mapping[TensorName, LazyTensor], settings: Mapping[str, Any]) -> tuple[dict[str, str], list[str], list[Problem]]:
    """Examine the packed modules of a source, by the source's own names.

    Returns each packed module's format, the modules whose groups follow the activations (these can only be dequantized), and a
    problem for each module that cannot be unpacked. Reads the small tensors that decide it.
    """
    formats_, ordered, problems, known = {}, [], [], _Formats()
    for module, parameters in by_module(tensors).items():
        packing = known.of(parameters)
        if packing is None:
            continue
        formats_[module] = packing.name
        wrong = packing.check(module, parameters, settings)
        problems += wrong
        if not wrong and packing.act_order(parameters):
            ordered.append(module)
    return formats_, ordered, problems
