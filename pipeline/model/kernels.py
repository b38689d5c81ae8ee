"""The orders in which TensorRT-LLM's kernels read integer weights, by GPU generation.

Facts: docs/format/runtime-1.2.md, sections d to d4; the letters are those of docs/format/quantized-layouts.md, section 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Generation = int | Literal["any"]
ANY: Literal["any"] = "any"  # weights in no order, which the loader quantizes on the builder's own GPU

ORDERS: Mapping[int, tuple[str, str]] = {
    75: ("A", "A"),
    80: ("A", "A"),
    86: ("A", "A"),
    87: ("A", "A"),
    89: ("A", "A"),
    90: ("P", "A"),
    100: ("T", "A"),
    103: ("T", "A"),
    120: ("A", "A"),
    121: ("A", "A"),
}


def generations() -> tuple[int, ...]:
    """The GPU generations (80 for SM 8.0) whose orders are known."""
    return tuple(ORDERS)


def order(sm: int, stacked: bool) -> str:
    """The letter of the order that a generation reads a matrix in, or a stack of experts. Raises KeyError for an unknown one."""
    return ORDERS[sm][stacked]


def alike(sm: int) -> tuple[int, ...]:
    """The generations that read the same orders as `sm`, itself among them."""
    return tuple(other for other, orders in ORDERS.items() if orders == ORDERS[sm])
