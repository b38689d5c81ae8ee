"""SmoothQuant backwards: the factors of a module's in-features, and the error that its format allows.

A module without a `smoother` has the factors that the norm before it was divided by, so that they are told from the rank's norm and
the source's. Facts: docs/format/quantized-layouts.md, section 4d.
"""

from __future__ import annotations

import numpy as np

from pipeline.tensor.checkpoint import Checkpoint
from stages.verify.matrices import Matrix, vector
from stages.verify.named_weights import SourceWeights
from stages.verify.roundtrip.origin import GEMMA, Origin
from stages.verify.values import to_float32

# The norm before a module, on the rank and in the source.
NORMS = {"attention": ("input_layernorm", "input_layernorm"), "mlp": ("post_layernorm", "post_attention_layernorm")}
HALF_STEP = 2.0**-11  # of float16
LEAST = 2.0**-25  # half of the least step of float16
LARGEST = 120  # of a row's codes at least, but for roundings


def is_smoothed(checkpoint: Checkpoint, tensor: str) -> bool:
    """Whether a tensor is the weight of a norm that SmoothQuant divides."""
    algorithm = str(checkpoint.config.get("quantization", {}).get("quant_algo"))
    return algorithm.startswith("W8A8_SQ") and tensor.endswith(tuple(f".{ours}.weight" for ours, _ in NORMS.values()))


def norm_factors(checkpoint: Checkpoint, source: SourceWeights, origin: Origin) -> np.ndarray:
    """float32 [in_features]: what a module's numbers are multiplied by to be the source's; NaN where its norm hides them."""
    layer, around, _ = origin.module.rsplit(".", 2)
    ours, theirs = NORMS[around]
    place = "self_attn" if around == "attention" else "mlp"
    name = f"{origin.source[: origin.source.index(f'.{place}.')]}.{theirs}.weight"
    gain = to_float32(source.rows(name, 0, source.shape(name)[0]))
    gain = gain + np.float32(1.0 if checkpoint.config["architecture"] in GEMMA else 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        factors: np.ndarray = vector(checkpoint, origin.rank, f"{layer}.{ours}.weight") / gain
    return np.where(gain == 0, np.float32(np.nan), factors)


def allowed_error(
    matrix: Matrix, expected: np.ndarray, start: int, factors: np.ndarray, codes: np.ndarray | None = None
) -> np.ndarray:
    """float32 [n, in_features], for rows [start, start + n) of a matrix, whose numbers times `factors` are compared.

    Half a step of a code, and some of the float16 product that is rounded to it; roundings of the smoothed weight, of the norm and
    of the scale; scales below float16's normal numbers. `codes`: int8 [n, in_features], of rows that are whole and have a scale
    each, by which their largest value has the code 127: a scale that is larger allows no more.
    """
    step = np.abs(matrix.scales(start, start + len(expected))) * np.abs(factors)
    if codes is not None:
        largest = np.maximum(codes.max(axis=1), -codes.min(axis=1).astype(np.int16))
        step = step * np.minimum(largest / np.float32(LARGEST), np.float32(1))[:, None]
    bound: np.ndarray = np.abs(expected) * np.float32(5 * HALF_STEP)
    bound += step * np.float32(0.65) + np.abs(factors) * np.float32(128 * 2 * LEAST) + np.float32(1e-38)
    return bound
