"""Linear modules of a rank as numbers, however they are stored; rows on demand.

Facts: docs/format/quantized-layouts.md, sections 2 to 7, read backwards from the closed forms and by no code of
stages/quantization.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from pipeline.model.kernels import order
from pipeline.tensor.checkpoint import Checkpoint, FileTensor
from stages.verify.kernel_orders import interleaved, unarrange
from stages.verify.values import UINT8, Buffers, halves, read, signed_pairs, to_float32

AHEAD_ROWS = 1024  # whose scales are read at once
# What a matrix's numbers are computed with.
SCALING = ("weights_scaling_factor", "weights_scaling_factor_2", "prequant_scaling_factor", "act_scale", "smoother")
PARAMETERS = ("weight", "per_channel_scale", "zero", *SCALING)
# What SmoothQuant's classes multiply the activations of a module by, beside the norm or in the module around it. Facts:
# docs/format/quantized-layouts.md, section 4d.
ACTIVATIONS = {
    "attention.qkv": "input_layernorm.scale_to_int",
    "attention.dense": "attention.quantization_scaling_factor",
    "mlp.fc": "post_layernorm.scale_to_int",
    "mlp.gate": "post_layernorm.scale_to_int",
    "mlp.proj": "mlp.quantization_scaling_factor",
}
# 4-bit floats by their codes.
E2M1 = np.array([sign * size for sign in (1, -1) for size in (0.0, 0.5, 1, 1.5, 2, 3, 4, 6)], dtype=np.float32)


@dataclass(frozen=True)
class Matrix:
    """The matrix [out_features, in_features] of one module, or of one expert, on one rank.

    It lies in its file in units of `period` rows each, one behind the other.

    `tensors`: the parameters that its numbers are computed with, by local name. `kind`: "dense", "weight-only", "groupwise", "awq",
    "fp8", "fp8 rowwise", "nvfp4" or "smoothquant". `bits`: of an integer code. `order`: the letter of the order that its codes are
    in. `expert`: which of the rank's own, None for a module without experts. `fused`: its rows are those of several modules, which
    share a scale. `activations`: what SmoothQuant multiplies its activations by, before they are rounded; None where each token has
    a scale.
    """

    tensors: Mapping[str, FileTensor]
    kind: str
    shape: tuple[int, int]
    bits: int
    order: str
    expert: int | None
    fused: bool = False
    activations: FileTensor | None = None
    _ahead: dict[str, tuple[int, np.ndarray]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def period(self) -> int:
        """The rows of a unit: those that the kernels interleave, or that share a byte."""
        if self.kind in ("weight-only", "groupwise"):
            return interleaved(self.bits, self.order)
        return 2 if self.kind == "awq" else 1

    @property
    def unit_bytes(self) -> int:
        """The bytes of a unit."""
        if self.kind in ("weight-only", "groupwise"):
            return self.period * self.shape[1] * self.bits // 8
        weight = self.tensors["weight"]
        return int(weight.shape[-1]) * weight.dtype.itemsize

    def units(self, first: int, last: int) -> np.ndarray:
        """Units [first, last) as they are stored, uint8 [last - first, unit_bytes]."""
        stack = () if self.expert is None else (self.tensors["weight"].shape[0],)
        whole = self.tensors["weight"].viewed((*stack, self.shape[0] // self.period, self.unit_bytes), UINT8)
        return read(whole, (*self._front(), (first, last), (0, self.unit_bytes))).reshape(last - first, self.unit_bytes)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows of the weight, float32 [stop - start, in_features], with scales and zero points applied, but not `prequant`."""
        first, last = start // self.period, -(-stop // self.period)
        numbers = self.numbers(self.units(first, last), first * self.period)
        return numbers[start - first * self.period : stop - first * self.period]

    def codes(self, start: int, stop: int) -> np.ndarray:
        """The signed codes of an integer format, int8 [stop - start, in_features]."""
        first, last = start // self.period, -(-stop // self.period)
        return self.signed(self.units(first, last))[start - first * self.period : stop - first * self.period]

    def signed(self, data: np.ndarray) -> np.ndarray:
        """The signed codes of some units of an integer format, int8 [units * period, in_features]."""
        if self.kind == "awq":
            return signed_pairs(data)  # ModelOpt's int4
        if self.kind == "smoothquant":
            return data.view(np.int8)
        return unarrange(data, self.shape[1], self.bits, self.order)

    def stored(self, data: np.ndarray) -> np.ndarray:
        """Some units of a matrix of numbers or of float8 in their own type, [units, in_features]."""
        return data.view(self.tensors["weight"].dtype)

    def numbers(self, data: np.ndarray, start: int, buffers: Buffers | None = None) -> np.ndarray:
        """The numbers that some units stand for, float32 [units * period, in_features], as `rows` has them.

        `start`: the first unit's first row. `buffers`: to compute in; the result is the caller's until the next call with them.
        """
        count = len(data) * self.period
        out = (buffers or Buffers()).array("numbers", (count, self.shape[1]))
        if self.kind == "dense":
            return to_float32(self.stored(data), out)
        if self.kind == "nvfp4":
            np.take(E2M1, halves(data), out=out, mode="clip")
        elif self.kind.startswith("fp8"):
            out = to_float32(self.stored(data), out)
        else:
            np.copyto(out, self.signed(data))
        by_group(np.multiply, out, self.scales(start, start + count))
        if "weights_scaling_factor_2" in self.tensors:
            out *= read(self.tensors["weights_scaling_factor_2"])
        zeros = self.zeros(start, start + count)
        if zeros is not None:
            by_group(np.add, out, zeros)
        return out

    def scales(self, start: int, stop: int) -> np.ndarray:
        """The scales of rows [start, stop), of each group of in-features: float32 [1 or rows, groups]."""
        if self.kind in ("weight-only", "fp8 rowwise"):
            return self._some("per_channel_scale", self._by_row, start, stop)
        if self.kind == "smoothquant":
            return self._smoothed(start, stop)
        if self.kind == "fp8":
            return to_float32(read(self.tensors["weights_scaling_factor"], (*self._front(), (0, 1)))).reshape(1, 1)
        return self._some("weights_scaling_factor", self._grouped, start, stop)

    def zeros(self, start: int, stop: int) -> np.ndarray | None:
        """The zero points times scales, which are added to rows [start, stop): float32 [rows, groups]; None for none."""
        return self._some("zero", self._grouped, start, stop) if self.kind == "groupwise" and "zero" in self.tensors else None

    @property
    def prequant_or_second(self) -> bool:
        """Whether its numbers are computed with more than one scale and a zero point."""
        return not self.tensors.keys().isdisjoint(SCALING[1:])

    @property
    def prequant(self) -> np.ndarray | None:
        """The factors of activations before the matrix, float32 [in_features]; None where there are none."""
        factors = self.tensors.get("prequant_scaling_factor")
        if "smoother" in self.tensors:
            with np.errstate(divide="ignore"):
                factor: np.ndarray = np.float32(1) / to_float32(read(self.tensors["smoother"])).reshape(-1)
                return factor
        if factors is None:
            return None
        own = self._front() if len(factors.shape) > 1 and factors.shape[0] > 1 else tuple((0, n) for n in factors.shape[:-1])
        return to_float32(read(factors, (*own, (0, factors.shape[-1])))).reshape(-1)

    @property
    def step(self) -> float:
        """The number that SmoothQuant multiplies activations by; 0 where each token has a scale."""
        return 0.0 if self.activations is None else float(to_float32(read(self.activations)).reshape(-1)[0])

    def _smoothed(self, start: int, stop: int) -> np.ndarray:
        """SmoothQuant's scales of rows [start, stop) alone: those of the products by what these have of the activations'."""
        tensor = self.tensors["per_channel_scale"]
        rows = (start, stop) if tensor.shape[-1] > 1 else (0, 1)
        scales = to_float32(read(tensor, ((0, 1), rows))).reshape(-1, 1)
        if self.activations is None:
            return scales
        alone: np.ndarray = scales * np.float32(self.step) * to_float32(read(self.tensors["act_scale"]))
        return alone

    def _front(self) -> tuple[tuple[int, int], ...]:
        """The region of the experts' axis; nothing where there is no such axis."""
        return () if self.expert is None else ((self.expert, self.expert + 1),)

    def _some(self, parameter: str, load: Callable[[str, int, int], np.ndarray], start: int, stop: int) -> np.ndarray:
        """A parameter of rows [start, stop), out of those of many rows that are read at once: no file is opened for a few."""
        first = start - start % AHEAD_ROWS
        last = min(first + AHEAD_ROWS, self.shape[0])
        if stop > last:
            return load(parameter, start, stop)
        held = self._ahead.get(parameter)
        if held is None or held[0] != first:
            self._ahead[parameter] = held = (first, load(parameter, first, last))
        return held[1][start - first : stop - first]

    def _by_row(self, parameter: str, start: int, stop: int) -> np.ndarray:
        """A parameter of rows [start, stop), one a row, float32 [stop - start, 1]."""
        return to_float32(read(self.tensors[parameter], (*self._front(), (start, stop)))).reshape(-1, 1)

    def _grouped(self, parameter: str, start: int, stop: int) -> np.ndarray:
        """A parameter of groups for rows [start, stop), float32 [stop - start, groups].

        It is stored as [groups, out_features], or as [out_features, groups] in ModelOpt's forms ("awq" and "nvfp4").
        """
        tensor = self.tensors[parameter]
        if self.kind in ("awq", "nvfp4"):
            groups = tensor.shape[-1]
            return to_float32(read(tensor, (*self._front(), (start, stop), (0, groups))).reshape(-1, groups))
        return np.ascontiguousarray(self.by_group(parameter, start, stop).T)

    def by_group(self, parameter: str, start: int, stop: int) -> np.ndarray:
        """A parameter of groups for rows [start, stop) of a groupwise matrix as it is stored, float32 [groups, stop - start]."""
        tensor = self.tensors[parameter]
        groups = tensor.shape[-2]
        return to_float32(read(tensor, (*self._front(), (0, groups), (start, stop))).reshape(groups, stop - start))


def by_group(operation: np.ufunc, values: np.ndarray, factors: np.ndarray) -> None:
    """Apply an operation in place to values [rows, in_features] and one factor a group of them, [1 or rows, groups]."""
    grouped = values.reshape(len(values), factors.shape[1], values.shape[1] // factors.shape[1])
    operation(grouped, factors[:, :, None], out=grouped)


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
    elif algorithm.startswith("W8A8_SQ"):
        kind, shape = "smoothquant", (first, second)
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
    activations = rank_tensors[_activations(module)] if kind == "smoothquant" and "act_scale" in tensors else None
    return Matrix(tensors, kind, shape, bits, letter, expert, fused, activations)


def _activations(module: str) -> str:
    """The name of what SmoothQuant multiplies a module's activations by."""
    prefix, _, place = module.rpartition(".")
    layer, _, around = prefix.rpartition(".")
    return f"{layer}.{ACTIVATIONS[f'{around}.{place}']}"


def vector(checkpoint: Checkpoint, rank: int, name: str) -> np.ndarray:
    """Read a norm's weight, a bias or another parameter that is not quantized, as float32."""
    return to_float32(read(checkpoint.ranks[rank][name]))
