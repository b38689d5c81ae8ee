"""EETQ: int8 with a scale a row, stored in the order in which its kernels read it.

weight (EETQ's own tools: qweight) int8 [K, N], which is a run of bytes in order A of the kernels that TensorRT-LLM has too,
whatever the GPU; weight_scales float16 [N]: weight = (code - 128) * scale of the code put back in its place.
Facts: docs/format/quantized-layouts.md, sections 3 and 14.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import Problem
from pipeline.tensor.derived import derive
from pipeline.tensor.metering import meter
from pipeline.tensor.placement import Region
from pipeline.tensor.tensors import Block, LazyTensor
from stages.quantization.integers import by_group, no_offsets
from stages.quantization.kernels.layout import int8_of_order_a
from stages.quantization.packed_format import Modules, PackedFormat, PackedParameter

if TYPE_CHECKING:
    from pipeline.tensor.arrays import BlockArray

_WEIGHTS, _SCALES = ("weight", "qweight"), "weight_scales"
TILE, PAIR = 64, 2  # in-features of a tile; out-features whose tiles alternate
UINT8, INT16 = np.dtype(np.uint8), np.dtype(np.int16)


class Eetq(PackedFormat):
    """EETQ's modules."""

    name = "eetq"
    title = "EETQ"
    keeps = ("W8A16",)
    proof = "a reader written from its description alone"
    parameters: Mapping[str, PackedParameter] = {
        **{name: PackedParameter(("out", "in"), rows=PAIR) for name in _WEIGHTS},
        _SCALES: PackedParameter(("out",)),
    }

    def accepts(self, parameters: Mapping[str, Any]) -> bool:
        """Whether a module has int8 weights, arranged or not, and scales of that name."""
        name = next((name for name in _WEIGHTS if name in parameters), "")
        return bool(name) and _SCALES in parameters and parameters[name].dtype in (np.int8, np.uint8)

    def arrange(self, tensors: Mapping[str, LazyTensor]) -> Mapping[str, LazyTensor]:
        """The codes as uint8 [N / 2, 2 * K]: a row is the run of two out-features."""
        name = next(name for name in _WEIGHTS if name in tensors)
        weight: Any = tensors[name]
        if len(weight.shape) != 2 or weight.dtype != np.int8 or weight.shape[0] % TILE or weight.shape[1] % PAIR:
            return tensors
        if not hasattr(weight, "viewed"):
            return tensors
        features, out = weight.shape
        return {**tensors, name: weight.viewed((out // PAIR, PAIR * features), UINT8)}

    def check(self, module: str, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> list[Problem]:  # noqa: ARG002
        """Refuse a weight that is not whole tiles, and scales that are not one for each out-feature."""
        name = next(name for name in _WEIGHTS if name in tensors)
        weight, scales = tensors[name], tensors[_SCALES]
        if weight.dtype != np.uint8 or len(weight.shape) != 2:
            expected = f"int8 [in-features, out-features] in multiples of {TILE} and {PAIR}"
            return [Problem(f"{module}.{name}", f"{weight.dtype} {list(weight.shape)}", expected)]
        out = PAIR * weight.shape[0]
        return [] if scales.shape == (out,) else [Problem(f"{module}.{_SCALES}", f"shape {list(scales.shape)}", f"[{out}]")]

    def unpack(self, parameters: Mapping[str, BlockArray], settings: Mapping[str, Any]) -> dict[str, BlockArray]:  # noqa: ARG002
        """`codes8`, `scales` and `offsets` of one group a row; the rest stays."""
        weight, scale = parameters[next(name for name in _WEIGHTS if name in parameters)], parameters[_SCALES]
        out, features = PAIR * weight.shape[0], weight.shape[1] // PAIR
        rows = [PAIR * count for count in weight.chunks[0]]
        codes = derive("unpack", read_codes, {"arranged": weight}, shape=(out, features), dtype=UINT8, rows=rows)
        scales = derive("unpack", by_group, {"values": scale}, shape=(1, out), dtype=scale.dtype)
        offsets = derive("unpack", no_offsets, {"scales": scales}, shape=(1, out), dtype=INT16)
        rest = {name: array for name, array in parameters.items() if name not in self.parameters}
        return {"codes8": codes, "scales": scales, "offsets": offsets, **rest}

    def native(self, modules: Modules, settings: Mapping[str, Any]) -> tuple[str | None, int]:  # noqa: ARG002
        """W8A16."""
        return "W8A16", 0


def read_codes(region: Region, arranged: Block) -> np.ndarray:
    """uint8 [n, K] of the region: unsigned codes, out of the kernels' order."""
    (top, bottom), columns = region
    first, last = top // PAIR, -(-bottom // PAIR)
    values = np.ascontiguousarray(arranged.read(((first, last), (0, arranged.shape[1]))))
    with meter("unpack", values.nbytes):
        return int8_of_order_a(values)[top - PAIR * first : bottom - PAIR * first, slice(*columns)]


FORMAT = Eetq()
