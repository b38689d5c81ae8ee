"""Apply the ranks' modules to activations, reading one block of one weight at a time.

All ranks of a pipeline stage together hold a module: each rank computes a part of the outputs of a column-parallel one, a partial
sum of all outputs of a row-parallel one, and has a copy of every other. That copies are equal is checked byte by byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from torch import Tensor

from pipeline.errors import Problem, VerificationFailed
from pipeline.tensor.checkpoint import Checkpoint, FileTensor
from stages.verify.forward.tensors import read_tensor, to_torch
from stages.verify.matrices import Matrix, matrix, vector
from stages.verify.values import UINT8, read, same_bits

T = TypeVar("T")
# Parameters beside a module's numbers, for the precision of activations, which is not emulated, and of a cache.
BESIDE = (
    "activation_scaling_factor",
    "clamp_val",
    "kv_cache_scaling_factor",
    "kv_cache_rcp_scaling_factor",
    "scale_to_int",
    "quantization_scaling_factor",
)
# The loader computes these itself, whatever the file says (docs/format/checkpoint.md, section 4).
BUFFERS = tuple(
    prefix + name
    for name in ("rotary_inv_freq", "embed_positions", "embed_positions_for_gpt_attention")
    for prefix in ("", "long_rope_")
)


class CheckpointWeights:
    """Reads the tensors of a checkpoint when they are needed. Raises VerificationFailed naming those that are missing or wrong.

    `block_bytes`: the part of a weight that is in memory at once, as float32. `cache_bytes`: room for blocks that are kept for the
    next use, the first ones that are read. Vectors (norms, biases) are always kept. `int8_activations`: round activations
    to the codes that SmoothQuant's classes make of them; otherwise they stay as they are, as transformers has them.
    """

    def __init__(self, checkpoint: Checkpoint, block_bytes: int, cache_bytes: int = 0, int8_activations: bool = True) -> None:
        self.checkpoint, self.block_bytes, self.cache_bytes = checkpoint, block_bytes, cache_bytes
        self.int8_activations = int8_activations
        self._used: list[set[str]] = [set() for _ in checkpoint.ranks]
        self._vectors: dict[tuple[int, str], Tensor] = {}
        self._blocks: dict[tuple[int, str, int | None, int], Tensor] = {}
        self._same: set[tuple[int, str]] = set()
        self._padded: set[tuple[int, str]] = set()

    def tensor(self, rank: int, name: str) -> FileTensor:
        """A tensor as the file stores it."""
        return self._find(rank, name, lambda: self.checkpoint.ranks[rank][name])

    def matrix(self, rank: int, module: str, expert: int | None = None) -> Matrix:
        """The matrix of a module of a rank; `expert` counts the rank's own from 0."""
        module_matrix = self._find(rank, f"{module}.weight", lambda: matrix(self.checkpoint, rank, module, expert))
        self._used[rank].update(f"{module}.{parameter}" for parameter in module_matrix.tensors)
        return module_matrix

    def vector(self, rank: int, name: str, size: int) -> Tensor:
        """A parameter with one axis, float32 [size]."""
        if (rank, name) not in self._vectors:
            values = self._find(rank, name, lambda: to_torch(vector(self.checkpoint, rank, name)))
            if values.shape != (size,):
                raise _failed(rank, name, f"shape {list(values.shape)}", f"[{size}]")
            self._vectors[rank, name] = values
            self._used[rank].add(name)
        return self._vectors[rank, name]

    def product(self, x: Tensor, rank: int, module: str, out: int, *, expert: int | None = None) -> Tensor:
        """Multiply activations [tokens, in_features] by a module's matrix [out, in_features]; returns [tokens, out].

        The matrix is read in blocks of rows.
        """
        weight = self.matrix(rank, module, expert)
        expected = (out, x.shape[-1])
        if weight.shape != expected:
            raise _failed(rank, f"{module}.weight", f"a matrix {list(weight.shape)}", f"{list(expected)}, [out, in]")
        smooth = weight.prequant
        x = x if smooth is None else x * to_torch(smooth)
        x = as_int8(x, weight.step) if weight.kind == "smoothquant" and self.int8_activations else x
        result = x.new_empty(len(x), weight.shape[0])
        for start, stop in self._steps(weight.shape):
            result[:, start:stop] = x @ self._rows(weight, (rank, module, expert, start), stop).T
        return result

    def same(self, ranks: Sequence[int], name: str) -> None:
        """Check, once, that a tensor has the same bytes on some ranks."""
        if (ranks[0], name) in self._same:
            return
        first, *others = (self.tensor(rank, name) for rank in ranks)
        for rank, other in zip(ranks[1:], others, strict=True):
            if (other.shape, other.dtype) != (first.shape, first.dtype):
                found, expected = (f"{tensor.dtype} {list(tensor.shape)}" for tensor in (other, first))
                raise _failed(rank, name, found, f"{expected}, as on rank {ranks[0]}")
            for one, two in zip(self._bytes(first), self._bytes(other), strict=True):
                if not same_bits(one, two):
                    raise _failed(rank, name, f"other values than on rank {ranks[0]}", "the same on every rank of the stage")
            self._used[rank].add(name)
        self._same.add((ranks[0], name))

    def zeros(self, rank: int, name: str, first: int) -> None:
        """Check, once, that a tensor's rows from `first` on, which pad the vocabulary, are zeros."""
        tensor = self.tensor(rank, name)
        if (rank, name) in self._padded:
            return
        other_axes = tuple((0, size) for size in tensor.shape[1:])
        for row in range(max(first, 0), tensor.shape[0]):
            if read_tensor(tensor, ((row, row + 1), *other_axes)).float().any():
                raise _failed(rank, name, f"values in row {row}", f"zeros in the rows from {max(first, 0)}: they are padding")
        self._padded.add((rank, name))

    def unused(self) -> list[str]:
        """The tensors that nothing has read so far, each after its file's name."""
        result = []
        for rank, (stored, used) in enumerate(zip(self.checkpoint.ranks, self._used, strict=True)):
            owners = {owner for name in used for owner in _owners(name)}
            for name in sorted(stored.keys() - used - set(BUFFERS)):
                owner, _, parameter = name.rpartition(".")
                if parameter not in BESIDE or owner not in owners:
                    result.append(f"rank{rank}.safetensors: {name}")
        return result

    def _find(self, rank: int, name: str, get: Callable[[], T]) -> T:
        """Call `get`, and raise VerificationFailed where it does not find tensor `name`."""
        try:
            return get()
        except KeyError:
            raise _failed(rank, name, "nothing", "a tensor, which config.json's model computes with") from None

    def _steps(self, shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
        count = max(self.block_bytes // (4 * shape[1]), 1)
        return ((start, min(start + count, shape[0])) for start in range(0, shape[0], count))

    def _rows(self, weight: Matrix, key: tuple[int, str, int | None, int], stop: int) -> Tensor:
        if key in self._blocks:
            return self._blocks[key]
        rows = to_torch(weight.rows(key[3], stop))
        if rows.nbytes <= self.cache_bytes:
            self.cache_bytes -= rows.nbytes
            self._blocks[key] = rows
        return rows

    def _bytes(self, tensor: FileTensor) -> Iterator[np.ndarray]:
        count = math.prod(tensor.shape) * tensor.dtype.itemsize
        whole = tensor.viewed((count,), UINT8)
        return (read(whole, ((at, min(at + self.block_bytes, count)),)) for at in range(0, count, self.block_bytes))


def as_int8(x: Tensor, step: float) -> Tensor:
    """Activations [tokens, in_features] as their 8-bit codes stand for them, by one step, or, where that is 0, by each token's own.

    Facts: docs/format/quantized-layouts.md, section 4d.
    """
    steps = x.new_full((len(x), 1), step) if step else 127 / x.abs().amax(1, keepdim=True).clamp(min=1e-30)
    return (x * steps).round().clamp(-128, 127) / steps


@dataclass(frozen=True)
class PipelineStage:
    """The ranks of one pipeline stage."""

    weights: CheckpointWeights
    ranks: range

    def part(self, rank: int, x: Tensor, module: str, out: int, *, bias: bool = False) -> Tensor:
        """A rank's outputs, [tokens, out], of a column-parallel module, for activations `x` [tokens, in_features]."""
        result = self.weights.product(x, rank, module, out)
        return result + self.weights.vector(rank, f"{module}.bias", out) if bias else result

    def total(self, part: Callable[[int], Tensor], module: str, out: int, *, bias: bool = False) -> Tensor:
        """The outputs, [tokens, out], of a row-parallel module: the sum over its ranks, whose activations `part` computes.

        Its bias is a copy on every rank, and is added once.
        """
        result = self.weights.product(part(self.ranks[0]), self.ranks[0], module, out)
        for rank in self.ranks[1:]:
            result += self.weights.product(part(rank), rank, module, out)
        return result + self.vector(f"{module}.bias", out) if bias else result

    def copied(self, x: Tensor, module: str, out: int) -> Tensor:
        """The outputs, [tokens, out], of a module of which every rank has a copy."""
        self.weights.same(self.ranks, f"{module}.weight")
        return self.weights.product(x, self.ranks[0], module, out)

    def vector(self, name: str, size: int) -> Tensor:
        """A parameter, float32 [size], of which every rank has a copy."""
        self.weights.same(self.ranks, name)
        return self.weights.vector(self.ranks[0], name, size)

    def has(self, name: str) -> bool:
        """Whether any of the stage's ranks holds a tensor."""
        return any(name in self.weights.checkpoint.ranks[rank] for rank in self.ranks)


def _owners(name: str) -> Iterator[str]:
    """The modules around a tensor, the outermost first."""
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts)))


def _failed(rank: int, name: str, found: str, expected: str) -> VerificationFailed:
    return VerificationFailed([Problem(f"rank{rank}.safetensors: {name}", found, expected)])
