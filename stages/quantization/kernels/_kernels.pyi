"""The kernels in C, which module.c makes a module of. Arrays of 16-bit types and float8 are passed as integers of their width.

A wrong argument is a ValueError, a TypeError or a BufferError. `type`, `to`: the names of NumPy's types. Those that return a bool
say whether all values are finite; where they are not, `out` is not whole.
"""

from typing import Any

from numpy.typing import NDArray

_Array = NDArray[Any]

def weight_only_scales(values: _Array, type: str, segments: int, bits: int, out: _Array, /) -> bool: ...
def weight_only_codes(
    values: _Array, type: str, segments: int, bits: int, columns: int, mixed: bool, scales: _Array, out: _Array, /
) -> bool: ...
def float8_scales(values: _Array, type: str, segments: int, clamp: float, out: _Array, /) -> bool: ...
def float8_codes(values: _Array, type: str, segments: int, clamp: float, scales: _Array, out: _Array, /) -> bool: ...
def float8_rescaled(codes: _Array, scale: float, common: float, out: _Array, /) -> None: ...
def cast(values: _Array, type: str, to: str, out: _Array, /) -> None: ...
def arranged(stream: _Array, bits: int, columns: int, mixed: bool, out: _Array, /) -> None: ...
def transposed(words: _Array, out: _Array, /) -> None: ...
def awq_codes(words: _Array, out: _Array, /) -> None: ...
def gguf_numbers(blocks: _Array, type: str, to: str, out: _Array, /) -> None: ...
def gguf_types() -> dict[str, tuple[int, int]]:
    """The types of blocks that gguf_numbers knows: of each its bytes and its elements."""

def level() -> str:
    """The level of instructions in use, such as x86-64-v4."""

def levels() -> list[str]:
    """The levels that this processor has, the highest first."""

def use(level: str, /) -> str:
    """Use another level, for tests; returns the one that was in use."""
