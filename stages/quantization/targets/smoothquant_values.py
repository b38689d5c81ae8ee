"""The values of SmoothQuant's arrays, region by region, out of whole inputs that are read in pieces.

Factors are float64, smoothed weights are rounded to float16, and 127 is divided by their magnitudes in float16.
Facts: docs/format/quantized-layouts.md, section 4d.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from pipeline.errors import BadInput
from pipeline.tensor.metering import meter
from pipeline.tensor.placement import Region, extent, whole
from pipeline.tensor.tensors import Block
from stages.quantization.finite import not_finite
from stages.quantization.kernels.dispatch import kernels
from stages.quantization.kernels.smoothed import Product as Product

INT8, FLOAT16, FLOAT32, FLOAT64 = (np.dtype(kind) for kind in (np.int8, np.float16, np.float32, np.float64))
LARGEST = np.float32(127)
LEAST = 1e-5  # of a factor, and of a column's magnitude
INFINITE = np.uint16(0x7C00)  # the bits of a float16
_ELEMENTS = 1 << 18  # of a weight that are smoothed at once


def factors_of(region: Region, activations: Block, alpha: float, names: Sequence[str], **weights: Block) -> np.ndarray:
    """float64: activations ** alpha / columns ** (1 - alpha), the largest magnitudes of each."""
    columns = np.zeros(activations.shape, dtype=np.uint16)
    for name, weight in zip(names, weights.values(), strict=True):
        for rows in _pieces(weight):
            values = np.asarray(weight.read((rows, (0, weight.shape[1]))))
            with meter("quantize", values.nbytes):
                np.maximum(columns, kernels().column_magnitudes(values), out=columns)
        _refuse_infinite(columns, name)
    held = np.maximum(columns.view(FLOAT16), FLOAT16.type(LEAST)).astype(FLOAT64)
    inputs = np.asarray(activations.read(whole(activations.shape))).astype(FLOAT64)
    return np.maximum(inputs**alpha / held ** (1 - alpha), LEAST)[slice(*region[0])]


def steps_of(region: Region, smooth: Block, activations: Block, **outputs: Block) -> np.ndarray:
    """float64 [2]. 127 / x is 127 times the reciprocal, both rounded, as torch has it."""
    inputs = np.asarray(activations.read(whole(activations.shape))).astype(FLOAT64)
    highest = (inputs / np.asarray(smooth.read(whole(smooth.shape)))).max()
    both = (1 / highest) * 127, np.float32(1) / _highest(outputs) * LARGEST
    return np.array(both, dtype=FLOAT64)[slice(*region[0])]


def largest_of(region: Region, smooth: Block, names: Sequence[str], **weights: Block) -> np.ndarray:  # noqa: ARG001
    """float16 [1]: the largest magnitude of some smoothed weights."""
    bits = np.zeros((), dtype=np.uint16)
    for name, weight in zip(names, weights.values(), strict=True):
        for rows in _pieces(weight):
            bits = np.maximum(bits, _magnitudes(weight, rows, smooth).max())
        _refuse_infinite(bits, name)
    return bits.reshape(1).view(FLOAT16)


def channel_codes(
    region: Region, weight: Block, smooth: Block, steps: Block, per_token: bool, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """int8 of the region, and float32 [rows, 1]: the scales of its rows."""
    (first, last), columns = region
    codes, scales = np.empty(extent(region), dtype=INT8), np.empty((last - first, 1), dtype=FLOAT32)
    own = np.asarray(steps.read(((0, 2),)))
    for rows in _pieces(weight, first, last):
        values, largest = _smoothed(weight, rows, smooth)
        to = slice(rows[0] - first, rows[1] - first)
        factor, scales[to] = _of_rows(largest, own, per_token, name)
        with meter("quantize", values.nbytes):
            kernels().smoothed_codes(values[:, slice(*columns)], _held(factor).reshape(-1), "float", codes[to])
    return codes, scales


def channel_scales(region: Region, weight: Block, smooth: Block, steps: Block, per_token: bool, name: str) -> np.ndarray:
    """float32 [rows, 1] of the region, without the codes."""
    own = np.asarray(steps.read(((0, 2),)))
    parts = [_of_rows(_magnitudes(weight, rows, smooth), own, per_token, name)[1] for rows in _pieces(weight, *region[0])]
    return np.concatenate(parts) if parts else np.empty((0, 1), dtype=FLOAT32)


def tensor_codes(region: Region, weight: Block, smooth: Block, largest: Block, product: Product, name: str) -> np.ndarray:  # noqa: ARG001
    """int8 of the region."""
    (first, last), columns = region
    codes = np.empty(extent(region), dtype=INT8)
    factor, inverse = _inverted(np.asarray(largest.read(((0, 1),))))
    if not factor.max() <= np.finfo(np.float16).max:
        product = "float"
    scale = inverse if product == "divided" else _held(factor)
    for rows in _pieces(weight, first, last):
        values, _ = _smoothed(weight, rows, smooth, columns)
        with meter("quantize", values.nbytes):
            kernels().smoothed_codes(values, np.repeat(scale, len(values)), product, codes[rows[0] - first : rows[1] - first])
    return codes


def tensor_scale(region: Region, largest: Block, steps: Block, per_token: bool, wide: bool) -> np.ndarray:
    """float32 [1, n]: one scale, as often as asked. `wide`: it is divided in float64."""
    factor, inverse = _inverted(np.asarray(largest.read(((0, 1),))))
    inputs, outputs = np.asarray(steps.read(((0, 2),)))
    scale = inverse if per_token else outputs / (inputs * factor.astype(FLOAT64)) if wide else _scaled(factor, inputs, outputs)
    return np.broadcast_to(scale.astype(FLOAT32).reshape(1, 1), extent(region))


def largest_output(region: Region, **outputs: Block) -> np.ndarray:
    """float32: the largest output by 127."""
    return np.full(extent(region), _highest(outputs) / LARGEST, dtype=FLOAT32)


def first_step(region: Region, steps: Block) -> np.ndarray:
    """float32 of the region."""
    return np.asarray(steps.read(region)).astype(FLOAT32)


def as_row(region: Region, smooth: Block) -> np.ndarray:
    """float32 [1, n] of factors [in]."""
    return np.asarray(smooth.read((region[1],))).astype(FLOAT32)[None]


def gain_of(region: Region, gain: Block, smooth: Block, name: str) -> np.ndarray:
    """float16 of the region. Raises BadInput naming the norm where float16 cannot hold a quotient."""
    with np.errstate(over="ignore"):
        values = np.asarray(gain.read(region)).astype(FLOAT64) / np.asarray(smooth.read(region))
        result: np.ndarray = values.astype(FLOAT32).astype(FLOAT16)
    if not np.isfinite(result).all():
        raise BadInput([not_finite(f"{name}, divided by the factors of SmoothQuant,")])
    return result


def _smoothed(
    weight: Block, rows: tuple[int, int], smooth: Block, columns: tuple[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """float16 of some rows times their factors, and uint16: the bits of each row's largest magnitude."""
    columns = columns or (0, weight.shape[1])
    values = np.asarray(weight.read((rows, columns)))
    with meter("quantize", values.nbytes):
        return kernels().smoothed(values, np.asarray(smooth.read((columns,))))


def _magnitudes(weight: Block, rows: tuple[int, int], smooth: Block) -> np.ndarray:
    """uint16: the second of these alone."""
    columns = (0, weight.shape[1])
    values = np.asarray(weight.read((rows, columns)))
    with meter("quantize", values.nbytes):
        return kernels().smoothed_magnitudes(values, np.asarray(smooth.read((columns,))))


def _of_rows(largest: np.ndarray, steps: np.ndarray, per_token: bool, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The factor of each row by the bits of its largest magnitude [n], and its scale: both float32 [n, 1]."""
    _refuse_infinite(largest, name)
    factor, inverse = _inverted(largest.view(FLOAT16)[:, None])
    return factor, inverse if per_token else _scaled(factor, *steps)


def _inverted(largest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """127 by float16 magnitudes, and the inverse of that, both as float16 has them, in float32.

    The reference has infinity where float16 does not hold them, and so loses rows of small weights; here they are float32's then.
    """
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        half = (FLOAT16.type(1) / largest) * FLOAT16.type(127)
        inverse = (FLOAT16.type(1) / half).astype(FLOAT32)
        held, exact = np.isfinite(half), largest.astype(FLOAT32)
        return np.where(held, half.astype(FLOAT32), LARGEST / exact), np.where(held, inverse, exact / LARGEST)


def _scaled(factor: np.ndarray, inputs: np.float64, outputs: np.float64) -> np.ndarray:
    """float32: what a product of codes is multiplied by, where activations have one scale."""
    return np.asarray(np.float32(outputs) / (np.float32(inputs) * factor))


def _held(factor: np.ndarray) -> np.ndarray:
    """The same, with 0 where all weights of a scale are 0, so that there is no factor."""
    return np.where(np.isfinite(factor), factor, np.float32(0))


def _refuse_infinite(bits: np.ndarray, name: str) -> None:
    if (bits >= INFINITE).any():
        raise BadInput([not_finite(name)])


def _highest(arrays: Mapping[str, Block]) -> np.float32:
    return np.float32(max(np.asarray(each.read(whole(each.shape))).max() for each in arrays.values()))


def _pieces(weight: Block, first: int = 0, last: int | None = None) -> Iterator[tuple[int, int]]:
    """Intervals of rows that are worked on at once."""
    last = weight.shape[0] if last is None else last
    count = max(_ELEMENTS // weight.shape[1], 1)
    for start in range(first, last, count):
        yield start, min(start + count, last)
