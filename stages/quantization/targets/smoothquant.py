"""SmoothQuant: int8 weights and activations, with what is hard to quantize in activations moved into weights beforehand.

In-features are multiplied by factors in the weights, which the norm before them, or a `smoother`, divides the activations by. The
factors are those of all matrices that take the same activations; each matrix is quantized whole, then split. Arithmetic is the
reference's to the bit: factors in float64, smoothed weights rounded to float16, 127 divided by float16 magnitudes in float16.
Facts: docs/format/quantized-layouts.md, section 4d.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from pipeline.tensor.derived import derive
from pipeline.tensor.noted import Notes, derive_noting
from pipeline.tensor.reduced import reduce
from pipeline.tensor.tensors import Parameter
from stages.quantization.targets import smoothquant_values as made
from stages.quantization.targets.smoothquant_values import FLOAT16, FLOAT32, FLOAT64, INT8, Product

if TYPE_CHECKING:
    from pipeline.tensor.arrays import BlockArray

Packed = dict[str, tuple["BlockArray", Parameter]]
Named = tuple[str, "BlockArray"]  # a float16 matrix [out, in] with its name in the source
ONE = Fraction(1)

MATRIX = Parameter(axes=(("out", ONE), ("in", ONE)), working_bytes=8)
SCALAR = Parameter(axes=(("one", ONE),))
SQUARE = Parameter(axes=(("one", ONE), ("one", ONE)))  # [1, 1]
BY_ROW = Parameter(axes=(("one", ONE), ("out", ONE)))  # [1, out]
BY_COLUMN = Parameter(axes=(("one", ONE), ("in", ONE)))  # [1, in]


def factors(weights: Sequence[Named], activations: BlockArray, alpha: float) -> BlockArray:
    """float64 [in]: what the in-features of some float16 matrices are multiplied by. `weights`: with their names in the source.

    `activations`: float32 [in], the largest magnitude of each in-feature.
    """
    inputs = {"activations": activations, **_numbered([weight for _, weight in weights])}
    names = tuple(name for name, _ in weights)
    return reduce("smooth", made.factors_of, inputs, shape=activations.shape, dtype=FLOAT64, alpha=alpha, names=names)


def steps(smooth: BlockArray, activations: BlockArray, outputs: Sequence[BlockArray]) -> BlockArray:
    """float64 [2]: 127 by the largest smoothed activation, and 127 by the largest output, in float32.

    `activations`: float32 [in]. `outputs`: float32 [out] of each part of the module.
    """
    inputs = {"smooth": smooth, "activations": activations, **_numbered(outputs)}
    return reduce("smooth", made.steps_of, inputs, shape=(2,), dtype=FLOAT64)


def by_channel(name: str, weight: BlockArray, smooth: BlockArray, steps: BlockArray, per_token: bool) -> Packed:
    """`weight` int8 [out, in] and `per_channel_scale` float32 [1, out] of a float16 matrix, a scale for each out-feature.

    `per_token`: activations get a scale for each token where the engine runs.
    """
    inputs = {"weight": weight, "smooth": smooth, "steps": steps}
    notes = Notes(made.channel_scales, FLOAT32, 1, 1)
    arguments: dict[str, Any] = {
        "shape": weight.shape,
        "dtype": INT8,
        "rows": weight.chunks[0],
        "per_token": per_token,
        "name": name,
    }
    codes, scales = derive_noting("quantize", made.channel_codes, notes, inputs, **arguments)
    features = weight.shape[-1]
    parameter = Parameter((("out", ONE), ("one", ONE)), header=(("one", ONE), ("out", ONE)), working_bytes=8 * features)
    return {"weight": (codes, MATRIX), "per_channel_scale": (scales, parameter)}


def by_tensor(
    weights: Sequence[Named], smooth: BlockArray, steps: BlockArray, per_token: bool, product: Product, spread: bool
) -> list[Packed]:
    """The same of the parts of a matrix that have one scale: float32 [1, 1], or [1, out] where `spread`.

    `product`: how the reference multiplies weights by their scale: in float16, in float32, or divided by its inverse in float16.
    """
    inputs = {"smooth": smooth, **_numbered([weight for _, weight in weights])}
    names = tuple(name for name, _ in weights)
    largest = reduce("smooth", made.largest_of, inputs, shape=(1,), dtype=FLOAT16, names=names)
    result = []
    for name, weight in weights:
        inputs = {"weight": weight, "smooth": smooth, "largest": largest}
        codes = derive(
            "quantize", made.tensor_codes, inputs, shape=weight.shape, dtype=INT8, rows=weight.chunks[0], product=product, name=name
        )
        scale = derive(
            "quantize",
            made.tensor_scale,
            {"largest": largest, "steps": steps},
            shape=(1, weight.shape[0] if spread else 1),
            dtype=FLOAT32,
            per_token=per_token,
            wide=not spread,
        )
        result.append({"weight": (codes, MATRIX), "per_channel_scale": (scale, BY_ROW if spread else SQUARE)})
    return result


def act_scale(outputs: Sequence[BlockArray]) -> tuple[BlockArray, Parameter]:
    """float32 [1, 1]: the largest output of a module, by 127."""
    return derive("quantize", made.largest_output, _numbered(outputs), shape=(1, 1), dtype=FLOAT32), SQUARE


def cache_scale(outputs: Sequence[BlockArray]) -> BlockArray:
    """float32 [1], of an INT8 cache: the largest of the queries', keys' and values' outputs, by 127.

    Facts: docs/format/quantized-layouts.md, section 4e.
    """
    return derive("quantize", made.largest_output, _numbered(outputs), shape=(1,), dtype=FLOAT32)


def to_int(steps: BlockArray) -> tuple[BlockArray, Parameter]:
    """float32 [1]: what smoothed activations are multiplied by before they are rounded."""
    return derive("quantize", made.first_step, {"steps": steps}, shape=(1,), dtype=FLOAT32), SCALAR


def smoother(smooth: BlockArray) -> tuple[BlockArray, Parameter]:
    """float32 [1, in]: what the activations of a module without a norm before it are divided by."""
    return derive("quantize", made.as_row, {"smooth": smooth}, shape=(1, *smooth.shape), dtype=FLOAT32), BY_COLUMN


def divided(name: str, gain: BlockArray, smooth: BlockArray) -> BlockArray:
    """float16 [in]: the weights of the norm before some matrices, divided by their factors. `name`: in the source."""
    return derive("quantize", made.gain_of, {"gain": gain, "smooth": smooth}, shape=gain.shape, dtype=FLOAT16, name=name)


def _numbered(arrays: Iterable[BlockArray]) -> dict[str, BlockArray]:
    return {f"part{number}": array for number, array in enumerate(arrays)}
