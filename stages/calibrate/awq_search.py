"""AWQ's search: how far the weights of in-features whose activations are large are scaled up before they are rounded to 4 bits.

The search as it was published (AWQ, by Lin and others, arXiv 2306.00978): an in-feature's scale is the mean
magnitude of its activations to the power of a ratio, and of 20 ratios from 0 (round-to-nearest) to 0.95 the one is taken whose
outputs are nearest to those of the weights themselves, on the calibration's activations. Weights are rounded as the conversion
does (stages/quantization/targets/awq_numbers.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.model.awq_settings import BLOCK_ELEMENTS, RATIOS

LEAST = 1e-4  # of a scale before it is brought to the middle, as the authors' code has it
WIDEST = 2.0**12  # of a scale: it and its inverse are float16's normal numbers

OutputError = Callable[[Tensor], float]  # the sum of squares of the outputs of float32 [rows, in], over tokens and rows


@dataclass(frozen=True)
class Found:
    """The result for weights that take the same activations.

    `ratio`: the power, 0 to 0.95. `scale`: float32 [in], what weights are multiplied by and activations divided by. `nearest`,
    `searched`: of each weight, the mean square by which an output is off, rounded to the nearest and with the scale.
    """

    ratio: float
    scale: Tensor
    nearest: tuple[float, ...]
    searched: tuple[float, ...]


def scale_of(magnitudes: Tensor, ratio: float) -> Tensor:
    """float32 [in]: the mean magnitudes [in] to the power of a ratio, with the geometric mean of the extremes at 1."""
    powers = magnitudes.float().pow(ratio).clamp(min=LEAST)
    scale = powers / (powers.max() * powers.min()).sqrt()
    return scale.clamp(1 / WIDEST, WIDEST)


def rounded(weight: Tensor, scale: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """float32 [rows, in]: the numbers that 4-bit codes of a weight's rows stand for. `scale`: float32 [in]. `dtype`: the target's.

    Each group of a row has the step with which -8 to 7 hold its largest value, of whichever sign.
    """
    inverse = (1 / scale).to(dtype).float()
    groups = (weight.float() / inverse).reshape(len(weight), -1, group_size)
    step = torch.maximum(groups.amax(2) / 7, -groups.amin(2) / 8).to(dtype).float()[:, :, None]
    codes = (groups / torch.where(step == 0, 1, step)).round().clamp(-8, 7)
    return (codes * step).reshape(weight.shape) * inverse


def search(
    magnitudes: Tensor, error_of: OutputError, tokens: int, weights: Sequence[Tensor], group_size: int, dtype: torch.dtype
) -> Found:
    """Search the scale of weights [out, in] of one input. `magnitudes`: float32 [in], the mean of each in-feature's activations.

    `error_of`: the error of the outputs on `tokens` tokens of the calibration. Of ratios that are as good the least is taken.
    """
    sums: list[list[float]] = []
    for number in range(RATIOS):
        scale = scale_of(magnitudes, number / RATIOS)
        sums.append([sum(map(error_of, _differences(weight, scale, group_size, dtype))) for weight in weights])
    best = min(range(RATIOS), key=lambda number: (sum(sums[number]), number))
    nearest, searched = (
        tuple(total / (tokens * len(weight)) for total, weight in zip(sums[number], weights, strict=True)) for number in (0, best)
    )
    return Found(best / RATIOS, scale_of(magnitudes, best / RATIOS), nearest, searched)


def _differences(weight: Tensor, scale: Tensor, group_size: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """The change that rounding makes to a weight, float32, some rows at a time."""
    rows = max(BLOCK_ELEMENTS // weight.shape[1], 1)
    for start in range(0, len(weight), rows):
        some = weight[start : start + rows].detach().float()
        yield rounded(some, scale, group_size, dtype) - some
