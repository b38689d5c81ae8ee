"""HQQ of 1, 2, 4 and 8 bits, grouped along the in-features (axis 1) or across them (axis 0).

W_q uint8, the weight's values in their order as a matrix of groups, p = 8 / bits of its rows a byte: the first p-th of these is in
the highest bits, the last in the lowest. Axis 1: a row is a group, [groups / p, group size], scale and zero [groups, 1]. Axis 0: a
column is one, [group size / p, groups], scale and zero [1, groups]. shape [2], nbits, group_size, axis: weight = (code - zero) *
scale. Facts: docs/format/quantized-layouts.md, section 9c.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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

FLOAT32 = np.dtype(np.float32)
_SHAPE = "hqq shape"  # of one module's weight, among its settings
_VALUES = ("W_q", "scale", "zero")
# What the quantizer says of itself, in tensors of its own.
_SAID = ("shape", "nbits", "group_size", "axis", "packing", "view_as_float", "unpack_view_dtype", "quant_scale", "quant_zero")
_UNUSED = ("compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero")
_ALLOWED = {"axis": (0, 1), "nbits": (1, 2, 4, 8), "view_as_float": (0,), "quant_scale": (0,), "quant_zero": (0,)}


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
        """Scales and zero points as [N, K / group size] of axis 1, as [1, groups] of axis 0."""
        shape, size = _ints(tensors, "shape"), tensors["W_q"].shape[-1] if len(tensors["W_q"].shape) == 2 else 0
        names = ("scale", "zero")
        if len(shape) != 2 or min(shape) < 1 or not size or (shape[1] % size and not _across(tensors)):
            return tensors
        grid = (1, size) if _across(tensors) else (shape[0], shape[1] // size)
        if any(math.prod(tensors[name].shape) != math.prod(grid) or not hasattr(tensors[name], "viewed") for name in names):
            return tensors
        views: Any = tensors
        return {**tensors, **{name: views[name].viewed(grid, views[name].dtype) for name in names}}

    def module_settings(self, module: str, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> Mapping[str, Any]:  # noqa: ARG002
        """With the shape of a weight of axis 0, which that of its tensors does not say."""
        shape = _ints(tensors, "shape")
        return {**settings, _SHAPE: tuple(shape)} if _across(tensors) and len(shape) == 2 else settings

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
        if len(shape) != 2 or min(shape) < 1:
            return [Problem(f"{module}.shape", str(list(shape)), "the two sizes of the weight")]
        if _across(tensors):
            return _check_across(module, tensors, shape)
        if len(scale.shape) != 2 or math.prod(scale.shape) * codes.shape[1] != math.prod(shape):
            expected = f"a scale for each {codes.shape[1]} of {list(shape)}"
            return [Problem(f"{module}.scale", f"shape {list(scale.shape)}", expected)]
        if scale.shape[0] != shape[0] or tensors["zero"].shape != scale.shape:
            return [Problem(f"{module}.zero", f"shape {list(tensors['zero'].shape)}", f"{list(scale.shape)}, as the scales")]
        return _check_width(module, tensors, math.prod(scale.shape) / (codes.shape[0] or math.inf))

    def unpack(self, parameters: Mapping[str, BlockArray], settings: Mapping[str, Any]) -> dict[str, BlockArray]:
        """`weight`, float32; the rest stays."""
        codes, scale, zero = (parameters[name] for name in _VALUES)
        inputs = {"codes": codes, "scales": scale, "zeros": zero}
        if _SHAPE in settings:
            shape: tuple[int, int] = settings[_SHAPE]
            count = shape[0] * shape[1] // (codes.shape[0] * codes.shape[1])
            weight = derive("unpack", from_columns, inputs, shape=shape, dtype=FLOAT32, features=shape[1], count=count)
        else:
            shape = (scale.shape[0], scale.shape[1] * codes.shape[1])
            weight = derive("unpack", from_groups, inputs, shape=shape, dtype=FLOAT32, rows=scale.chunks[0])
        return {"weight": weight, **{name: array for name, array in parameters.items() if name not in self.parameters}}


def _ints(tensors: Mapping[str, LazyTensor], name: str) -> list[int]:
    """The few whole numbers of a small tensor; none where there is no such tensor."""
    tensor = tensors.get(name)
    if tensor is None or math.prod(tensor.shape) > 8 or not np.issubdtype(tensor.dtype, np.integer):
        return []
    return [int(value) for value in np.asarray(tensor.block(whole(tensor.shape))).reshape(-1)]


def _across(tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether a module says that its groups are across the in-features."""
    return _ints(tensors, "axis") == [0]


def _check_across(module: str, tensors: Mapping[str, LazyTensor], shape: Sequence[int]) -> list[Problem]:
    """Refuse codes, scales and zero points of axis 0 that do not fit one another."""
    lines, groups = tensors["W_q"].shape
    for name in ("scale", "zero"):
        if math.prod(tensors[name].shape) != groups or len(tensors[name].shape) != 2:
            return [Problem(f"{module}.{name}", f"shape {list(tensors[name].shape)}", f"[1, {groups}], one for each column of W_q")]
    return _check_width(module, tensors, math.prod(shape) / (lines * groups or math.inf))


def _check_width(module: str, tensors: Mapping[str, LazyTensor], count: float) -> list[Problem]:
    """Refuse another number of codes in a byte than 1, 2, 4 or 8, and than `nbits` says. `count`: as the shapes have it."""
    if count not in (1, 2, 4, 8):
        expected = f"1, 2, 4 or 8 codes a byte of {_ints(tensors, 'shape')}"
        return [Problem(f"{module}.W_q", f"shape {list(tensors['W_q'].shape)}", expected)]
    said = next(iter(_ints(tensors, "nbits")), 8 / count)
    if said * count == 8:
        return []
    return [Problem(f"{module}.W_q", f"{8 / count:g} bits by its shape", f"{said} bits, as nbits says")]


def from_columns(region: Region, codes: Block, scales: Block, zeros: Block, features: int, count: int) -> np.ndarray:
    """float32 of the region, of axis 0: (code - zero) * scale of its column. Reads the codes of the region's rows alone.

    `features`: the in-features of a row. `count`: the codes of a byte.
    """
    (top, bottom), columns = region
    lines, groups = codes.shape
    bits, first, last = 8 // count, top * features, bottom * features
    values = np.empty(last - first, dtype=np.float32)
    for row in range(first // groups, -(-last // groups)):
        start, stop = max(first, row * groups), min(last, (row + 1) * groups)
        place, line = divmod(row, lines)
        run = (start - row * groups, stop - row * groups)
        stored = np.asarray(codes.read(((line, line + 1), run)))[0]
        scale, zero = (np.asarray(each.read(((0, 1), run)))[0].astype(np.float32) for each in (scales, zeros))
        with meter("unpack", stored.nbytes):
            part = values[start - first : stop - first]
            part[:] = (stored >> (bits * (count - 1 - place))) & ((1 << bits) - 1)
            part -= zero
            part *= scale
    return values.reshape(bottom - top, -1)[:, slice(*columns)]


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
