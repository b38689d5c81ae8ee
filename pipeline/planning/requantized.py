"""Notes on `--requantize`: the algorithm that a packed source is quantized again in, and the error in a part of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.model.quantization import GROUPWISE, Quantization
from pipeline.planning.compose import unpacked
from pipeline.planning.opening import OpenedSource
from pipeline.tensor.blocks import read_block
from pipeline.tensor.names import TensorName, by_module
from pipeline.tensor.tensors import CODES
from stages.quantization import numbers
from stages.quantization.modules import linear
from stages.read import read
from stages.rename import rename

if TYPE_CHECKING:
    from pipeline.tensor.arrays import BlockArray

ROWS = 64  # of one matrix, of which the error is measured


def requantization_notes(opened: OpenedSource, chosen: Sequence[Quantization], block_bytes: int) -> tuple[str, ...]:
    """Note that targets are quantized again, each once; where by groups, with the error that this adds in the first rows of one
    matrix, which are read of the source itself.
    """
    targets = [each for options, each in zip(opened.job.targets, chosen, strict=True) if options.requantize]
    if not targets:
        return ()
    module, weight = next(_matrices(opened, block_bytes), ("", None))
    notes = []
    for each in targets:
        grouped = each.algorithm in GROUPWISE
        note = f"quantized again as {each.algorithm}{f' in groups of {each.group_size}' if grouped else ''}, by round-to-nearest"
        if grouped and weight is not None:
            name = str(opened.matches.origin(TensorName(module, "weight")))
            error = f"{_error(name, weight, each):.1f} dB of signal to noise against the source's own weights"
            note += f": {error}, in the first rows of {module}"
        notes.append(note)
    return tuple(dict.fromkeys(notes))


def _matrices(opened: OpenedSource, block_bytes: int) -> Iterator[tuple[str, BlockArray]]:
    """The source's linear modules, as numbers. Scratch is still empty: these come from the source itself."""
    named = read(opened.source.named, block_bytes, 1)
    tensors = unpacked(opened, rename(named, opened.matches, opened.model))
    for module, parameters in by_module(tensors).items():
        slot, weight = opened.shardings[0].layout.find(module), _numbers(parameters)
        if slot is not None and linear(slot.module) and weight is not None and weight.ndim == 2:
            yield module, weight


def _numbers(parameters: Mapping[str, BlockArray]) -> BlockArray | None:
    return parameters.get("weight") if parameters.keys().isdisjoint(CODES) else numbers.dequantize(parameters)


def _error(name: str, weight: BlockArray, quantization: Quantization) -> float:
    """Decibels of signal to noise of the first rows, quantized and made numbers again. `name`: for what is wrong with them."""
    again = numbers.dequantize(numbers.requantize(weight, quantization.group_size, name, quantization.bits))
    rows = ((0, min(ROWS, weight.shape[0])), (0, weight.shape[1]))
    before, after = (np.asarray(read_block(array, (0, 0)).read(rows)) for array in (weight, again))
    return signal_to_noise(after, before)


def signal_to_noise(values: np.ndarray, reference: np.ndarray) -> float:
    """Decibels of a reference's power over that of what values differ from it by; infinite where they do not."""
    wide = reference.astype(np.float64)
    noise = float(np.mean((values - wide) ** 2))
    return float("inf") if noise == 0 else 10 * float(np.log10(float(np.mean(wide**2)) / noise))
