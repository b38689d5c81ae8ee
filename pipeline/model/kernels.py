"""The orders in which TensorRT-LLM's kernels read integer weights, by GPU generation.

Facts: docs/format/runtime-1.2.md, sections d to d4; the letters are those of docs/format/quantized-layouts.md, section 2.
"""

from __future__ import annotations

from typing import Literal

from pipeline.model.runtime import runtime

Generation = int | Literal["any"]
ANY: Literal["any"] = "any"  # weights in no order, which the loader quantizes on the builder's own GPU
STABLE = "A"  # docs/format/quantized-layouts.md, section 2


def generations() -> tuple[int, ...]:
    """The GPU generations (80 for SM 8.0) whose orders are known."""
    return tuple(runtime().orders)


def order(sm: int, stacked: bool) -> str:
    """The letter of the order that a generation reads a matrix in, or a stack of experts. Raises KeyError for an unknown one."""
    orders = runtime().orders[sm]
    return orders.stack if stacked else orders.matrix


def alike(sm: int) -> tuple[int, ...]:
    """The generations that read the same orders as `sm`, itself among them."""
    orders = runtime().orders
    return tuple(other for other, found in orders.items() if found == orders[sm])


def stable(sm: int) -> bool:
    """Whether a generation reads matrices in the one order that all releases of TensorRT-LLM have for it, where they know it."""
    return order(sm, stacked=False) == STABLE
