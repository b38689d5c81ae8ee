"""Linear modules of a rank as numbers, however they are stored; rows on demand.

Facts: docs/format/quantized-layouts.md, sections 2 to 7, read backwards from the closed forms and by no code of
stages/quantization.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.model.kernels import order
from pipeline.tensor.checkpoint import Checkpoint, FileTensor
from stages.verify.values import read

TILE = 64  # in-features that stay together in the kernels' order
UINT8 = np.dtype(np.uint8)
# What a matrix's numbers are computed with.
SCALING = ("weights_scaling_factor", "weights_scaling_factor_2", "prequant_scaling_factor")
PARAMETERS = ("weight", "per_channel_scale", "zero", *SCALING)
E2M1 = torch.tensor([sign * size for sign in (1, -1) for size in (0.0, 0.5, 1, 1.5, 2, 3, 4, 6)])  # 4-bit floats by their codes
SHUFFLE = {
    8: (0, 2, 1, 3),
    4: (0, 2, 4, 6, 1, 3, 5, 7),
}  # bits -> for each place of a 32-bit word, the code of the stream that it holds


@dataclass(frozen=True)
class Matrix:
    """The matrix [out_features, in_features] of one module, or of one expert, on one rank.

    `tensors`: the parameters that its numbers are computed with, by local name. `kind`: "dense", "weight-only", "groupwise", "awq",
    "fp8", "fp8 rowwise" or "nvfp4". `bits`: of an integer code. `order`: the letter of the order that its codes are in. `expert`:
    which of the rank's own, None for a module without experts. `fused`: its rows are those of several modules, which share a scale.
    """

    tensors: Mapping[str, FileTensor]
    kind: str
    shape: tuple[int, int]
    bits: int
    order: str
    expert: int | None
    fused: bool = False

    @property
    def columns(self) -> int:
        """The out-features that the kernels interleave."""
        return interleaved(self.bits, self.order)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the weight, float32 [stop - start, in_features], with scales and zero points applied, but not `prequant`."""
        if self.kind == "dense":
            return self.stored(start, stop).float()
        if self.kind == "nvfp4":
            data = self.stored_bytes(start, stop)
            values = E2M1[torch.stack([data & 15, data >> 4], -1).long()].reshape(stop - start, -1)
            return values * self._grouped("weights_scaling_factor", start, stop) * read(self.tensors["weights_scaling_factor_2"])
        if self.kind.startswith("fp8"):
            return self.stored(start, stop).float() * self.scales(start, stop)
        values = self.codes(start, stop).float() * self.scales(start, stop)
        return values + self._grouped("zero", start, stop) if "zero" in self.tensors else values

    def codes(self, start: int, stop: int) -> Tensor:
        """The signed codes of an integer format, int8 [stop - start, in_features]."""
        if self.kind == "awq":
            return self._paired(start, stop)
        first, last = start // self.columns, -(-stop // self.columns)
        width = self.columns * self.shape[1] * self.bits // 8
        stack = () if self.expert is None else (self.tensors["weight"].shape[0],)
        whole = self.tensors["weight"].viewed((*stack, self.shape[0] // self.columns, width), UINT8)
        data = read(whole, (*self._front(), (first, last), (0, width))).reshape(last - first, width)
        codes = unarrange(data, self.shape[1], self.bits, self.order)
        return codes[start - first * self.columns : stop - first * self.columns]

    def scales(self, start: int, stop: int) -> Tensor:
        """The scales of rows [start, stop): float32 [1 or rows, 1 or in_features]."""
        if self.kind in ("weight-only", "fp8 rowwise"):
            return read(self.tensors["per_channel_scale"], (*self._front(), (start, stop))).float().reshape(-1, 1)
        if self.kind == "fp8":
            return read(self.tensors["weights_scaling_factor"], (*self._front(), (0, 1))).float().reshape(1, 1)
        return self._grouped("weights_scaling_factor", start, stop)

    @property
    def prequant(self) -> Tensor | None:
        """The factors of activations before the matrix, float32 [in_features]; None where there are none."""
        factors = self.tensors.get("prequant_scaling_factor")
        if factors is None:
            return None
        own = self._front() if len(factors.shape) > 1 and factors.shape[0] > 1 else tuple((0, n) for n in factors.shape[:-1])
        return read(factors, (*own, (0, factors.shape[-1]))).float().reshape(-1)

    def _front(self) -> tuple[tuple[int, int], ...]:
        """The region of the experts' axis; nothing where there is no such axis."""
        return () if self.expert is None else ((self.expert, self.expert + 1),)

    def stored(self, start: int, stop: int) -> Tensor:
        """Rows of a matrix that is stored as numbers or as float8, in their own type, [stop - start, in_features]."""
        return read(self.tensors["weight"], (*self._front(), (start, stop), (0, self.shape[1]))).reshape(-1, self.shape[1])

    def stored_bytes(self, start: int, stop: int) -> Tensor:
        """Rows of a matrix of two in-features a byte, uint8 [stop - start, in_features / 2]."""
        return read(self.tensors["weight"], ((start, stop), (0, self.shape[1] // 2)))

    def _grouped(self, parameter: str, start: int, stop: int) -> Tensor:
        """A parameter of groups for rows [start, stop), float32 [stop - start, in_features].

        It is stored as [groups, out_features], or as [out_features, groups] in ModelOpt's forms ("awq" and "nvfp4").
        """
        tensor, by_row = self.tensors[parameter], self.kind in ("awq", "nvfp4")
        groups = tensor.shape[-1] if by_row else tensor.shape[-2]
        if by_row:
            values = read(tensor, (*self._front(), (start, stop), (0, groups))).reshape(-1, groups)
        else:
            values = read(tensor, (*self._front(), (0, groups), (start, stop))).reshape(groups, -1).T
        return values.float().repeat_interleave(self.shape[1] // groups, 1)

    def _paired(self, start: int, stop: int) -> Tensor:
        """ModelOpt's int4: byte [i, k] holds row 2 i in its low half and row 2 i + 1 in its high one, two's complement."""
        first, last = start // 2, -(-stop // 2)
        data = read(self.tensors["weight"], (*self._front(), (first, last), (0, self.shape[1])))
        data = data.reshape(-1, self.shape[1]).view(torch.uint8)
        both = torch.stack([data & 15, data >> 4], 1).reshape(-1, self.shape[1]).to(torch.int8)
        return ((both ^ 8) - 8)[start - 2 * first : stop - 2 * first]


def matrix(checkpoint: Checkpoint, rank: int, module: str, expert: int | None = None) -> Matrix:
    """Find a module of a rank; `expert` counts the rank's own from 0. Raises KeyError where the rank has no such module."""
    prefix = f"{module}."
    rank_tensors = checkpoint.ranks[rank]
    tensors = {name: rank_tensors[prefix + name] for name in PARAMETERS if prefix + name in rank_tensors}
    if "weight" not in tensors:
        raise KeyError(f"{module}.weight")
    weight, algorithm = tensors["weight"], str(checkpoint.config.get("quantization", {}).get("quant_algo"))
    first, second = weight.shape[-2:]
    bits = 4 if algorithm.startswith("W4") else 8
    letter = order(checkpoint.sm, expert is not None) if isinstance(checkpoint.sm, int) else ""
    if "weights_scaling_factor_2" in tensors:
        kind, shape = "nvfp4", (first, second * 2)
    elif len(tensors) == 1:
        kind, shape = "dense", (first, second)
    elif weight.dtype.name.startswith("float8"):
        kind, shape = "fp8 rowwise" if "per_channel_scale" in tensors else "fp8", (first, second)
    elif "per_channel_scale" in tensors:
        kind, shape = "weight-only", (second * 8 // bits, first)
    elif weight.dtype == np.int8:
        kind, shape = "awq", (first * 2, second)
    else:
        kind, shape = "groupwise", (second * 8 * weight.dtype.itemsize // bits, first)
    fused = module.endswith((".qkv", "shared_expert.fc")) or (
        module.endswith(".fc") and f"{module[:-3]}.gate.weight" not in rank_tensors
    )
    return Matrix(tensors, kind, shape, bits, letter, expert, fused)


def vector(checkpoint: Checkpoint, rank: int, name: str) -> Tensor:
    """Read a norm's weight, a bias or another parameter that is not quantized, as float32."""
    return read(checkpoint.ranks[rank][name]).float()


def interleaved(bits: int, order: str) -> int:
    """The out-features that an order interleaves."""
    return 16 // bits if order == "A" else 1


def unarrange(data: Tensor, features: int, bits: int, order: str) -> Tensor:
    """Undo an order: signed codes int8 [n * columns, features] of uint8 [n, columns * features * bits / 8]."""
    elements, columns, middle = (
        data if bits == 8 else torch.stack([data & 15, data >> 4], -1),
        interleaved(bits, order),
        1 << (bits - 1),
    )
    if order == "T":
        # Two's complement, element by element where the transposed matrix has it.
        signed = elements.reshape(len(data), features).to(torch.int16)
        return torch.where(signed < middle, signed, signed - 2 * middle).to(torch.int8)
    tiles = elements.reshape(len(data), features // TILE, columns * TILE)
    # NumPy's take is tens of times faster here than torch's index_select.
    codes = torch.from_numpy(tiles.numpy().take(_order(bits, columns).numpy(), axis=2))
    codes = codes.reshape(len(data), features // TILE, columns, TILE)
    codes = codes.transpose(1, 2).reshape(len(data) * columns, features)
    return (codes.to(torch.int16) - middle).to(torch.int8)


def _order(bits: int, columns: int) -> Tensor:
    """The place of each code (column, in-feature) in its tile's stream, int64 [columns * TILE]: steps 1, 3 and 5 of orders A and P.

    Facts: docs/format/quantized-layouts.md, section 3.
    """
    group, word = 128 // bits, len(SHUFFLE[bits])
    halves, run, stride = group // 8, 2, 8
    place = [0] * (columns * TILE)
    shuffled = {code: at for at, code in enumerate(SHUFFLE[bits])}
    for column in range(columns):
        for d in range(TILE):
            inner = d % group
            source = d // group * group + (inner // run % halves) * stride + inner // run // halves * run + inner % run
            at = column * TILE + d
            place[column * TILE + source] = at // word * word + shuffled[at % word]
    return torch.tensor(place)
