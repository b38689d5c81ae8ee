"""The kernels of verification in C, which module.c makes a module of.

Arrays of 16-bit types and float8 are passed as integers of their width. A wrong argument is a ValueError, a TypeError or a
BufferError.
"""

from typing import Any

from numpy.typing import NDArray

_Array = NDArray[Any]

def compared(
    kind: str,
    bits: int,
    columns: int,
    features: int,
    first: int,
    units: _Array,
    places: _Array | None,
    scales: _Array,
    zeros: _Array | None,
    type: str,
    values: _Array,
    value_scales: _Array | None,
    value_zeros: _Array | None,
    base: str,
    largest: str,
    slope: float,
    factor: float,
    top: float,
    slack: float,
    constant: _Array,
    worst: float,
    /,
) -> tuple[float, float, float, float, float] | None:
    """The greatest error, the worst part of what is allowed, and the sums of squares of errors, expected and actual values.

    None where a value is not right for sure. `worst`: of what has been compared before.
    """

def kept(
    columns: int,
    features: int,
    first: int,
    units: _Array,
    places: _Array | None,
    words: _Array,
    order: _Array | None,
    start: int,
    skip: int,
    scales: _Array,
    zeros: _Array | None,
    source_scales: _Array,
    source_zeros: _Array,
    constant: _Array,
    slope: float,
    worst: float,
    /,
) -> tuple[float, float, float, float, float] | None:
    """As `compared`, of codes of 4 bits that are the source's, whose words are packed along columns.

    None where a code is another, and where a value is not right for sure. Factors are float32 [groups, rows].
    """

def same_bytes(one: _Array, two: _Array, /) -> bool: ...
def words_as_rows(words: _Array, out: _Array, /) -> None: ...
def columns_as_rows(words: _Array, places: _Array, out: _Array, /) -> None: ...
def level() -> str:
    """The level of instructions in use, such as x86-64-v4."""

def levels() -> list[str]:
    """Those that this processor has, the highest first."""

def use(level: str, /) -> str:
    """Use another level; returns the one that was in use."""
