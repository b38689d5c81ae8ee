"""The types that stages pass to one another.

`TensorMap` is the one type until the split: arrays of blocks by module and parameter (arrays.py), whose Dask tasks are made when a
group of them is lowered. The value of a chunk is a `Block`: an array that is not made until a region of it is asked for, so that a
task may own a block of hundreds of MB and hold a few at a time.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from pipeline.tensor.arrays import BlockArray, Grid, Index, Maker, block_array, grid, shared
from pipeline.tensor.metering import meter
from pipeline.tensor.names import TensorName, split_names
from pipeline.tensor.placement import Region, extent, shift, slices, whole
from pipeline.tensor.source_file import SourceFile as SourceFile

TensorMap = Mapping[TensorName, BlockArray]

# The axes of each canonical parameter of a linear module. Column-parallel splits `out`; row-parallel splits `in`, and `group`
# with it. A stack of experts has the axis `expert` in front. What every source format unpacks to:
#   codes4         uint8 [out, in / 2]: unsigned, of even `in` in the low half of a byte; value = code - 8
#   codes8         uint8 [out, in]: unsigned; value = code - 128
#   scales         [group, out];  offsets int16 [group, out]: weight = (value + offset) * scale
#   fp8            float8_e4m3fn [out, in], with tensor_scale float32 [1] or channel_scale float32 [out]
#   fp4            uint8 [out, in / 2]: e2m1, of even `in` in the low half of a byte, with block_scale float8_e4m3fn [out, group]
#                  and global_scale float32 [1]: weight = value * block_scale * global_scale
#   input_scale    float32 [1], of activations; kv_scale float32 [1]; prequant [in], which activations are multiplied by;
#   group_index    int32 [in], the group of each in-feature, where a source says it
#   x_range        float32 [in], y_range float32 [out]: the largest magnitudes of what a linear takes and gives, over a calibration;
#                  awq_scale float32 [in], what AWQ's search has found to multiply weights by
AXES: Mapping[str, tuple[str, ...]] = {
    "weight": ("out", "in"),
    "bias": ("out",),
    "codes4": ("out", "in"),
    "codes8": ("out", "in"),
    "scales": ("group", "out"),
    "offsets": ("group", "out"),
    "group_index": ("in",),
    "prequant": ("in",),
    "fp8": ("out", "in"),
    "fp4": ("out", "in"),
    "block_scale": ("out", "group"),
    "global_scale": ("one",),
    "channel_scale": ("out",),
    "tensor_scale": ("one",),
    "input_scale": ("one",),
    "kv_scale": ("one",),
    "x_range": ("in",),
    "y_range": ("out",),
    "awq_scale": ("in",),
}
X_RANGE, Y_RANGE, AWQ_SCALE = "x_range", "y_range", "awq_scale"
MEASURED = (X_RANGE, Y_RANGE, AWQ_SCALE)  # by a calibration, on whichever linears it was asked for
CODES = ("codes4", "codes8", "fp8", "fp4")  # what a quantized module has in the place of its weight

AHEAD_BYTES = 4 << 20  # of codes that are made at once where a source is packed along its columns


@dataclass(frozen=True)
class Parameter:
    """How a parameter of a target lies along its module's axes.

    `axes`: of the array, by name, and how many of its elements stand for one feature (a Fraction, as codes are packed).
    `header`: the shape that the rank file's header says, in the same terms, where the bytes pass for something else; `dtype`: its
    type there, by TensorRT-LLM's name. `working_bytes`: the bytes that an element takes on the way, where it is more than its own.
    """

    axes: tuple[tuple[str, Fraction], ...]
    header: tuple[tuple[str, Fraction], ...] = ()
    dtype: str = ""
    working_bytes: int = 0

    @cached_property
    def _hash(self) -> int:
        return hash((self.axes, self.header, self.dtype, self.working_bytes))

    def __hash__(self) -> int:
        """Thousands of arrays have one object, whose fractions take long to hash."""
        return self._hash


@cache
def plain(parameter: str, matrix: bool = True) -> Parameter:
    """A parameter as AXES has it. A norm's weight is no matrix: it has no `in`."""
    return Parameter(tuple((axis, Fraction(1)) for axis in AXES[parameter] if matrix or axis == "out"))


class Block(ABC):
    """A block of a tensor whose values are made on demand. Behaves like a read-only NumPy array that is only ever sliced."""

    __slots__ = ()

    shape: tuple[int, ...]
    dtype: np.dtype

    @abstractmethod
    def read(self, region: Region) -> np.ndarray:
        """The values of `region` (relative to this block), as an array that the caller must not change."""

    def read_into(self, out: np.ndarray) -> bool:  # noqa: ARG002
        """Read the whole block into `out`, uint8 of as many bytes; False, and nothing is read, where it is no one run of a file.

        Memory that is used again and again stays in the processor's cache, where a map has new pages each time. Raises OSError
        where the file has become shorter than its header says.
        """
        return False

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Block:
        """A part of the block, still unread. Only slices of step 1 are understood."""
        given = index if isinstance(index, tuple) else (index,)
        region = []
        for axis, length in enumerate(self.shape):
            start, stop, step = (given[axis] if axis < len(given) else slice(None)).indices(length)
            if step != 1:
                raise IndexError(f"a block is sliced with step 1 only, not {step}")
            region.append((start, max(start, stop)))
        return self if tuple(region) == whole(self.shape) else self.part(tuple(region))

    def part(self, region: Region) -> Block:
        """The part that is a region of the block, still unread, and as narrow as it can be: who reads ahead reads no further."""
        return View(self, region)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = self.read(whole(self.shape))
        return np.array(values, dtype=dtype, copy=True) if copy else np.asarray(values, dtype=dtype)

    def copy(self) -> np.ndarray:
        """The whole block in memory. Dask asks for this when an array of one chunk is computed."""
        return np.array(self.read(whole(self.shape)))


class View(Block):
    """A rectangular part of another block."""

    def __init__(self, base: Block, region: Region) -> None:
        self.base, self.region = base, region
        self.shape, self.dtype = extent(region), base.dtype

    def read(self, region: Region) -> np.ndarray:
        return self.base.read(shift(region, [start for start, _ in self.region]))


@runtime_checkable
class Castable(Protocol):
    """A function of `Applied` that can give its float32 values in another type at once."""

    def into(self, dtype: np.dtype) -> Callable[[np.ndarray], np.ndarray]:
        """The function that casts each value as it makes it."""
        ...


class Applied(Block):
    """A block with a function applied to its rows, a few at a time.

    `function` maps the values of rows [a, b) of `base` to those of rows [a, b) of this block, where a and b are multiples of
    `period`; other axes may change length only where `columns` gives the new one.
    """

    def __init__(
        self,
        base: Block,
        function: Callable[[np.ndarray], np.ndarray],
        *,
        stage: str,
        dtype: np.dtype,
        period: int = 1,
        columns: int | None = None,
    ) -> None:
        self.base, self.function, self.stage, self.period, self.columns = base, function, stage, period, columns
        self.shape = base.shape if columns is None else (*base.shape[:-1], columns)
        self.dtype = np.dtype(dtype)

    def read(self, region: Region) -> np.ndarray:
        start, stop = region[0]
        first = start - start % self.period
        last = min(-(-stop // self.period) * self.period, self.shape[0])
        periods = ((first, last), *region[1:])
        # The last axis is asked for whole where its length changes: packed columns are cut after they are unpacked.
        source = periods if self.columns is None else (*periods[:-1], (0, self.base.shape[-1]))
        values = self.base.read(source)
        with meter(self.stage, values.nbytes):
            result = self.function(values)
        inner = ((start - first, stop - first), *whole(result.shape)[1:])
        if self.columns is not None:
            inner = (*inner[:-1], region[-1])
        return result[slices(inner)]

    def part(self, region: Region) -> Block:
        """Whole periods of rows are the function of such rows of the base."""
        start, stop = region[0]
        if start % self.period or (stop % self.period and stop != self.shape[0]) or region[1:] != whole(self.shape)[1:]:
            return View(self, region)
        rows = self.base[start:stop]
        return Applied(rows, self.function, stage=self.stage, dtype=self.dtype, period=self.period, columns=self.columns)


class LazyTensor(Protocol):
    """A tensor of a source: known shape and dtype, and blocks of it on demand. Must survive pickling.

    One that reads some of its rows without the others may say so: `by_rows = True`.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def block(self, region: Region) -> Block: ...


class Companion(Protocol):
    """A small file beside a checkpoint, which may be copied: a Path, or what stands for one at a URL."""

    @property
    def name(self) -> str: ...
    def read_bytes(self) -> bytes: ...


@dataclass(frozen=True)
class Source:
    """An opened checkpoint: headers read, no tensor touched.

    `container` selects the family tables that apply ("huggingface", "gguf"), `architecture` the family among them. `config`
    is the container's own metadata: config.json, or GGUF's key-value pairs. `companions` are the tokenizer's files beside it.
    `in_memory`: its tensors are in this process, so that workers elsewhere cannot read them. `notes`: what a plan says of how it
    was read. `url`: where it is, if that is no local path: `location` is an image of its headers then. `called`: the names in the
    checkpoint of modules that have another here. `prefixes`: what else the settings of such a module may have before its name.
    """

    kind: str
    location: Path
    container: str
    architecture: str
    config: Mapping[str, Any]
    config_name: str
    tensors: Mapping[str, LazyTensor]
    files: tuple[SourceFile, ...]
    dtype: str | None
    companions: tuple[Companion, ...] = ()
    in_memory: bool = False
    notes: tuple[str, ...] = ()
    url: str = ""
    called: Mapping[str, str] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ()

    def names_of(self, module: str) -> Iterator[str]:
        """The names by which a quantizer's settings may call a module: the checkpoint's own first, that which it has here last."""
        if module in self.called:
            yield self.called[module]
            for prefix in self.prefixes:
                yield f"{prefix}{module}"
                yield f"{prefix}{module.removeprefix('model.')}"
        yield module

    @property
    def place(self) -> str:
        """Where it is, for people and for records: a path or a URL."""
        return self.url or str(self.location)

    @cached_property
    def named(self) -> Mapping[TensorName, LazyTensor]:
        """The tensors under their names taken apart: the stages' keys."""
        return split_names(self.tensors)

    @property
    def nbytes(self) -> int:
        return sum(tensor_bytes(tensor) for tensor in self.tensors.values())


def tensor_bytes(tensor: LazyTensor) -> int:
    """The size of a tensor in bytes as its source stores it."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def map_blocks(
    array: BlockArray, function: Callable[..., Block], *, dtype: np.dtype, columns: int | None = None, **arguments: Any
) -> BlockArray:
    """Apply `function(block, **arguments)` to each chunk of `array`. The result has the same chunks, but for `columns`."""
    array = block_array(array)
    cut = array.grid if columns is None else grid((*array.chunks[:-1], (columns,)))
    return MappedBlocks(array, cut, np.dtype(dtype), shared(Bound(function, tuple(sorted(arguments.items())))))


class Bound(NamedTuple):
    """A function of a block with its other arguments, by name."""

    function: Callable[..., Block]
    arguments: tuple[tuple[str, Any], ...]

    def __call__(self, block: Block) -> Block:
        return self.function(block, **dict(self.arguments))


class MappedBlocks(BlockArray):
    """An array whose blocks are each made of one block of another array."""

    __slots__ = ("bound",)

    def __init__(self, array: BlockArray, cut: Grid, dtype: np.dtype, bound: Bound) -> None:
        super().__init__(cut, dtype, (array,))
        self.bound = bound

    @property
    def by_rows(self) -> bool:
        return True

    def naming(self) -> str:
        function, arguments = self.bound
        decides = [str(self.dtype), self.chunks, function.__module__, arguments]
        digest = hashlib.sha256(repr(decides).encode()).hexdigest()[:12]
        return f"{function.__name__}-{digest}-{self.inputs[0].name}"

    def make(self, index: Index) -> Maker:  # noqa: ARG002
        return self.bound
