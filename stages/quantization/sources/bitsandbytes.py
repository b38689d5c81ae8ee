"""bitsandbytes: 4 bits (nf4 and fp4), with the scales quantized again or not, and 8 bits (LLM.int8).

4 bits: weight uint8 [N * K / 2, 1], the first of two in-features in the high half of a byte; weight.quant_map float32 [16], the
value of each code; weight.absmax float32, one for each run of `blocksize`; weight.quant_state.bitsandbytes__nf4 (or fp4), bytes of
JSON with shape and blocksize. Quantized again: weight.absmax is uint8, codes of weight.nested_quant_map, with weight.nested_absmax
for each run of `nested_blocksize` of them, and `nested_offset` is added. 8 bits: weight int8 [N, K] and SCB float32 [N]: weight *
SCB / 127. Facts: docs/format/quantized-layouts.md, section 9c.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.documents import parse_json
from pipeline.errors import Problem
from pipeline.tensor.derived import derive
from pipeline.tensor.metering import meter
from pipeline.tensor.placement import Region, whole
from pipeline.tensor.tensors import Block, LazyTensor
from stages.quantization.packed_format import OF_ALL, PackedFormat, PackedParameter

if TYPE_CHECKING:
    from pipeline.tensor.arrays import BlockArray

_STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
_INT8 = ("weight", "SCB", "weight_format")
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
_STATE_BYTES = 64 << 10  # of a state, which has a few hundred
FLOAT32, UINT8 = np.dtype(np.float32), np.dtype(np.uint8)


class BitsAndBytes(PackedFormat):
    """bitsandbytes' modules."""

    name = "bitsandbytes"
    title = "bitsandbytes of 4 or 8 bits"
    numbers = True
    proof = "bitsandbytes 0.50 (4 bits), value for value"
    parameters: Mapping[str, PackedParameter] = {
        "weight.absmax": PackedParameter(("out", "group")),
        "weight.nested_absmax": PackedParameter(("group",), joint=True),
        "weight.quant_map": PackedParameter(("code",)),
        "weight.nested_quant_map": PackedParameter(("code",)),
        **{name: PackedParameter(("byte",)) for name in _STATES},
        "SCB": PackedParameter(("out",)),
        "weight_format": PackedParameter(OF_ALL, dropped="the order of an int8 weight, which is that of its rows"),
    }

    def accepts(self, parameters: Mapping[str, Any]) -> bool:
        """Whether a module has a state of 4 bits, or an int8 weight with SCB."""
        if "weight" not in parameters:
            return False
        return any(name in parameters for name in _STATES) or ("SCB" in parameters and parameters["weight"].dtype == np.int8)

    def arrange(self, tensors: Mapping[str, LazyTensor]) -> Mapping[str, LazyTensor]:
        """The weight as uint8 [N, K / 2], and the scales as [N, K / blocksize]: rows are whole runs."""
        state = _state(tensors)
        if not state:
            return tensors
        (rows, columns), size = state["shape"], state["blocksize"]
        shapes = {"weight": (rows, columns // 2), "weight.absmax": (rows, columns // size)}
        fits = (
            not columns % size
            and not columns % 2
            and all(name in tensors and math.prod(tensors[name].shape) == math.prod(shape) for name, shape in shapes.items())
        )
        if not fits or not all(hasattr(tensors[name], "viewed") for name in shapes):
            return tensors
        views: Any = tensors
        return {**tensors, **{name: views[name].viewed(shape, views[name].dtype) for name, shape in shapes.items()}}

    def check(self, module: str, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> list[Problem]:  # noqa: ARG002
        """Refuse states that cannot be read, shapes that do not fit them, and int8 weights in an order of a GPU's own."""
        shape = tensors["weight"].shape
        if "SCB" in tensors:
            return _check_int8(module, tensors, shape)
        state, name = _state(tensors), next(name for name in _STATES if name in tensors)
        if not state:
            return [Problem(f"{module}.{name}", "bytes that are no state of 4 bits", "JSON with shape, blocksize and quant_type")]
        (rows, columns), size = state["shape"], state["blocksize"]
        if tensors["weight"].dtype != UINT8 or shape != (rows, columns // 2) or columns % 2:
            expected = f"uint8 of {rows} x {columns} codes, two a byte"
            return [Problem(f"{module}.weight", f"{tensors['weight'].dtype} {list(shape)}", expected)]
        for key in ("weight.absmax", "weight.quant_map", *(_NESTED if "nested_offset" in state else ())):
            if key not in tensors:
                return [Problem(f"{module}.{key}", "no such tensor", "a part of the module's state")]
        if tensors["weight.absmax"].shape != (rows, columns // size):
            expected = f"{rows} x {columns} / {size}, a scale for each run of {size} inside a row"
            return [Problem(f"{module}.weight.absmax", f"shape {list(tensors['weight.absmax'].shape)}", expected)]
        counts = {"weight.quant_map": 16}
        if "nested_offset" in state:
            runs = -(-rows * (columns // size) // state["nested_blocksize"])
            counts |= {"weight.nested_quant_map": 256, "weight.nested_absmax": runs}
        return [
            Problem(f"{module}.{key}", f"shape {list(tensors[key].shape)}", f"{count} values")
            for key, count in counts.items()
            if tensors[key].shape != (count,)
        ]

    def unpack(self, parameters: Mapping[str, BlockArray], settings: Mapping[str, Any]) -> dict[str, BlockArray]:  # noqa: ARG002
        """`weight`, float32; the rest stays."""
        weight = parameters["weight"]
        rows = weight.chunks[0]
        if "SCB" in parameters:
            inputs = {"codes": weight, "scales": parameters["SCB"]}
            made = derive("unpack", from_int8, inputs, shape=weight.shape, dtype=FLOAT32, rows=rows)
            return {"weight": made, **{name: array for name, array in parameters.items() if name not in _INT8}}
        state = next(name for name in _STATES if name in parameters)
        inputs = {"codes": weight, "scales": parameters["weight.absmax"], "of_code": parameters["weight.quant_map"]}
        if all(name in parameters for name in _NESTED):
            inputs |= {"nested": parameters[_NESTED[0]], "of_scale": parameters[_NESTED[1]], "state": parameters[state]}
        made = derive("unpack", from_codes, inputs, shape=(weight.shape[0], 2 * weight.shape[1]), dtype=FLOAT32, rows=rows)
        return {"weight": made, **{name: array for name, array in parameters.items() if not name.startswith("weight")}}


def _state(tensors: Mapping[str, LazyTensor]) -> dict[str, Any]:
    """A module's state of 4 bits; empty where it has none, or one that makes no sense."""
    name = next((name for name in _STATES if name in tensors), None)
    if name is None or tensors[name].dtype != UINT8 or len(tensors[name].shape) != 1 or tensors[name].shape[0] > _STATE_BYTES:
        return {}
    return read_state(np.asarray(tensors[name].block(whole(tensors[name].shape))))


def read_state(data: np.ndarray) -> dict[str, Any]:
    """The state in the bytes of a quant_state; empty where these are none, or say no sizes."""
    try:
        state = parse_json(data.tobytes())
        sizes = [*state["shape"], state["blocksize"], *([state["nested_blocksize"]] if "nested_offset" in state else [])]
    except (ValueError, TypeError, KeyError):
        return {}
    plain = all(isinstance(size, int) and size > 0 for size in sizes) and len(state["shape"]) == 2
    offset = state.get("nested_offset", 0.0)
    return state if plain and isinstance(offset, int | float) else {}


def _check_int8(module: str, tensors: Mapping[str, LazyTensor], shape: tuple[int, ...]) -> list[Problem]:
    """Problems of an int8 module: a matrix, its scales, and the order of its rows."""
    if len(shape) != 2 or tensors["SCB"].shape != shape[:1]:
        expected = f"a scale for each row of the weight {list(shape)}"
        return [Problem(f"{module}.SCB", f"shape {list(tensors['SCB'].shape)}", expected)]
    order = tensors.get("weight_format")
    if order is not None and np.any(np.asarray(order.block(whole(order.shape)))):
        remedy = "Load and save it with a bitsandbytes of 2024 or later"
        return [Problem(f"{module}.weight_format", "an order of a GPU's own", "0, rows one after the other", remedy)]
    return []


def from_int8(region: Region, codes: Block, scales: Block) -> np.ndarray:
    """float32 of the region: code times the largest magnitude of its row, over 127."""
    stored = np.asarray(codes.read(region))
    factors = np.asarray(scales.read((region[0],))).astype(np.float32)
    with meter("unpack", stored.nbytes):
        values = stored.astype(np.float32)
        values *= factors[:, None]
        values /= np.float32(127)
        return values


def from_codes(
    region: Region,
    codes: Block,
    scales: Block,
    of_code: Block,
    nested: Block | None = None,
    of_scale: Block | None = None,
    state: Block | None = None,
) -> np.ndarray:
    """float32 of the region: the value of a code times the scale of its run. Reads the scales of the region's runs alone."""
    (top, bottom), (left, right) = region
    size = 2 * codes.shape[1] // scales.shape[1]
    first, last = left // size, -(-right // size)
    stored = np.asarray(codes.read(((top, bottom), (first * size // 2, last * size // 2))))
    factors = np.asarray(scales.read(((top, bottom), (first, last))))
    if nested is not None and of_scale is not None and state is not None:
        factors = _nested(factors, top, first, scales.shape[1], nested, of_scale, state)
    with meter("unpack", stored.nbytes):
        table = np.asarray(of_code.read(whole(of_code.shape))).astype(np.float32)
        both = np.arange(256)
        values = np.take(np.stack([table[both >> 4], table[both & 15]], axis=1), stored, axis=0).reshape(len(stored), -1)
        values.reshape(len(values), -1, size)[...] *= factors.astype(np.float32)[:, :, None]
        return values[:, left - first * size : right - first * size]


def _nested(codes: np.ndarray, top: int, first: int, width: int, nested: Block, of_scale: Block, state: Block) -> np.ndarray:
    """float32 scales of their codes [n, m], which begin at row `top` and column `first` of `width`."""
    said = read_state(np.asarray(state.read(whole(state.shape))))
    run = said["nested_blocksize"]
    place = (np.arange(top, top + len(codes))[:, None] * width + np.arange(first, first + codes.shape[1])) // run
    low, high = int(place.min()), int(place.max()) + 1
    own = np.asarray(nested.read(((low, high),))).astype(np.float32)
    table = np.asarray(of_scale.read(whole(of_scale.shape))).astype(np.float32)
    return np.asarray(table[codes] * own[place - low] + np.float32(said["nested_offset"]))


FORMAT = BitsAndBytes()
