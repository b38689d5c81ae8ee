"""HQQ of 1, 2, 4 and 8 bits, grouped along the in-features (axis 1).

W_q uint8 [groups / p, group size], p = 8 / bits groups a byte: of all groups, in the order of the weight's values, the first p-th
is in the highest bits, the last in the lowest; scale and zero [groups, 1]; shape [2], nbits, group_size, axis: weight = (code -
zero) * scale. Facts: docs/format/quantized-layouts.md, section 9c.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import Problem
from pipeline.tensor.derived import derive
from pipeline.tensor.metering import meter
from pipeline.tensor.placement import Region, whole
from pipeline.tensor.tensors import Block, LazyTensor
from stages.quantization.packed_format import PackedFormat, PackedParameter

if TYPE_CHECKING:
    from pipeline.tensor.arrays import BlockArray

_VALUES = ("W_q", "scale", "zero")
# What the quantizer says of itself, in tensors of its own.
_SAID = ("shape", "nbits", "group_size", "axis", "packing", "view_as_float", "unpack_view_dtype", "quant_scale", "quant_zero")
_UNUSED = ("compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero")
_ALLOWED = {"axis": (1,), "nbits": (1, 2, 4, 8), "view_as_float": (0,), "quant_scale": (0,), "quant_zero": (0,)}


class Hqq(PackedFormat):
    """HQQ's modules."""

    name = "hqq"
    title = "HQQ"
    numbers = True
    proof = "hqq 0.2.8 in float32, value for value"
    parameters: Mapping[str, PackedParameter] = {
        **{name: PackedParameter(("group",), joint=True) for name in _VALUES},
        **{name: PackedParameter(("one",)) for name in (*_SAID, *_UNUSED)},
    }

    def accepts(self, parameters: Mapping[str, Any]) -> bool:
        """Whether a module has HQQ's codes and what it says of their shape."""
        return {*_VALUES, "shape"} <= parameters.keys()

    def arrange(self, tensors: Mapping[str, LazyTensor]) -> Mapping[str, LazyTensor]:
        """Scales and zero points as [N, K / group size]."""
        shape, size = _ints(tensors, "shape"), tensors["W_q"].shape[-1] if len(tensors["W_q"].shape) == 2 else 0
        names = ("scale", "zero")
        if len(shape) != 2 or min(shape) < 1 or not size or shape[1] % size:
            return tensors
        grid = (shape[0], shape[1] // size)
        if any(math.prod(tensors[name].shape) != math.prod(grid) or not hasattr(tensors[name], "viewed") for name in names):
            return tensors
        views: Any = tensors
        return {**tensors, **{name: views[name].viewed(grid, views[name].dtype) for name in names}}

    def check(self, module: str, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> list[Problem]:  # noqa: ARG002
        """Refuse other axes, widths and packings, and shapes that do not fit one another."""
        for key, allowed in _ALLOWED.items():
            found = _ints(tensors, key)
            if found and (len(found) > 1 or found[0] not in allowed):
                expected = " or ".join(map(str, allowed))
                return [Problem(f"{module}.{key}", str(found[0]), expected, "Convert the model that it was quantized from")]
        shape, codes, scale = _ints(tensors, "shape"), tensors["W_q"], tensors["scale"]
        if codes.dtype != np.uint8 or len(codes.shape) != 2:
            return [Problem(f"{module}.W_q", f"{codes.dtype} {list(codes.shape)}", "uint8 of groups, two or more a row")]
        if len(shape) != 2 or len(scale.shape) != 2 or scale.shape[0] * scale.shape[1] * codes.shape[1] != math.prod(shape):
            expected = f"a scale for each {codes.shape[1]} of {list(shape)}"
            return [Problem(f"{module}.scale", f"shape {list(scale.shape)}", expected)]
        if scale.shape[0] != shape[0] or tensors["zero"].shape != scale.shape or math.prod(scale.shape) % codes.shape[0]:
            return [Problem(f"{module}.zero", f"shape {list(tensors['zero'].shape)}", f"{list(scale.shape)}, in whole rows")]
        bits = 8 * codes.shape[0] / math.prod(scale.shape)
        said: float = next(iter(_ints(tensors, "nbits")), bits)
        return [] if said == bits else [Problem(f"{module}.W_q", f"{bits:g} bits by its shape", f"{said} bits, as nbits says")]

    def unpack(self, parameters: Mapping[str, BlockArray], settings: Mapping[str, Any]) -> dict[str, BlockArray]:  # noqa: ARG002
        """`weight`, float32; the rest stays."""
        codes, scale, zero = (parameters[name] for name in _VALUES)
        inputs = {"codes": codes, "scales": scale, "zeros": zero}
        shape = (scale.shape[0], scale.shape[1] * codes.shape[1])
        weight = derive("unpack", from_groups, inputs, shape=shape, dtype=np.dtype(np.float32), rows=scale.chunks[0])
        return {"weight": weight, **{name: array for name, array in parameters.items() if name not in self.parameters}}


def _ints(tensors: Mapping[str, LazyTensor], name: str) -> list[int]:
    """The few whole numbers of a small tensor; none where there is no such tensor."""
    tensor = tensors.get(name)
    if tensor is None or math.prod(tensor.shape) > 8 or not np.issubdtype(tensor.dtype, np.integer):
        return []
    return [int(value) for value in np.asarray(tensor.block(whole(tensor.shape))).reshape(-1)]


def from_groups(region: Region, codes: Block, scales: Block, zeros: Block) -> np.ndarray:
    """float32 of the region: (code - zero) * scale of its group. Reads the groups of the region's rows alone."""
    (top, bottom), columns = region
    step, size = codes.shape
    width = scales.shape[1]  # groups of a row
    count = scales.shape[0] * width // step  # groups of a byte
    bits = 8 // count
    first, last = top * width, bottom * width
    values = np.empty((last - first, size), dtype=np.float32)
    for place in range(first // step, -(-last // step)):
        start, stop = max(first, place * step), min(last, (place + 1) * step)
        stored = np.asarray(codes.read(((start - place * step, stop - place * step), (0, size))))
        with meter("unpack", stored.nbytes):
            values[start - first : stop - first] = (stored >> (bits * (count - 1 - place))) & ((1 << bits) - 1)
    factors, offsets = (np.asarray(each.read(((top, bottom), (0, width)))).astype(np.float32) for each in (scales, zeros))
    with meter("unpack", values.nbytes):
        values -= offsets.reshape(-1, 1)
        values *= factors.reshape(-1, 1)
        return values.reshape(bottom - top, -1)[:, slice(*columns)]


FORMAT = Hqq()
