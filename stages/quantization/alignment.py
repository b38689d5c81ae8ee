"""Tiles and groups: the sizes of ranks that the kernels of a quantized target can take.

Facts: docs/format/quantized-layouts.md, sections 8 and 10.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pipeline.errors import Problem
from pipeline.model.quantization import AWQ, GROUPWISE, NVFP4, NVFP4_GROUP, Quantization
from stages.quantization.kernels.layout import ALIGNMENT
from stages.quantization.modules import linear

if TYPE_CHECKING:
    from stages.shard import Sharding


def alignment(sharding: Sharding, quantization: Quantization, tp_sizes: Sequence[int]) -> list[Problem]:
    """Refuse a tp_size that cuts modules within a kernel's tile or a group; the remedy lists those of `tp_sizes` that do not.

    Facts: docs/format/quantized-layouts.md, section 10.
    """
    if not _tiled(quantization) or not (obstacles := list(_misaligned(sharding, quantization, sharding.parallelism.tp_size))):
        return []
    fitting = aligned(sharding, quantization, tp_sizes)
    choice = ", ".join(map(str, fitting)) or "none: quantize to FP8, or not at all"
    return [
        Problem(f"--tp_size {sharding.parallelism.tp_size}", f"{name} {size:g} a rank", f"a multiple of {of}", f"Works: {choice}")
        for name, size, of in obstacles
    ]


def aligned(sharding: Sharding, quantization: Quantization, tp_sizes: Sequence[int]) -> list[int]:
    """Those of `tp_sizes` at which every rank's share of every quantized module is whole tiles and groups."""
    return [size for size in tp_sizes if not _tiled(quantization) or not list(_misaligned(sharding, quantization, size))]


def _tiled(quantization: Quantization) -> bool:
    """Whether a rank must hold whole tiles of integer codes, or whole groups of NVFP4."""
    return bool(quantization.bits) or quantization.algorithm == NVFP4


def _misaligned(sharding: Sharding, quantization: Quantization, tp_size: int) -> Iterator[tuple[str, float, int]]:
    """The axes of quantized modules whose share of a rank is not whole tiles or groups: (axis, share, what it must divide by).

    The loader pads both axes of a linear to whole tiles or groups for each of tp_size ranks, whichever is split, and asks for
    tensors of the padded shape (docs/format/quantized-layouts.md, section 8). Its class of experts pads none.
    """
    sizes, model = sharding.parallelism, sharding.model
    seen = set()
    grouped = quantization.algorithm in GROUPWISE or quantization.algorithm == AWQ
    group = quantization.group_size if grouped else 1
    tile = max(ALIGNMENT, group)
    for module in sharding.layout.modules.values():
        if not linear(module) or (module.when and not getattr(model, module.when)):
            continue
        if quantization.excludes(module.name.replace("{layer}", "0")):
            continue
        count = tp_size // sizes.moe_ep_size if module.experts else tp_size
        out = sum(_share(sharding, part.out, part.heads, count if module.split == "column" else 1) for part in module.parts) or (
            model.dimension(module.out) / (count if module.split == "column" else 1)
        )
        inside = model.dimension(module.in_) / (count if module.split == "row" else 1)
        outs = " + ".join(dict.fromkeys(part.out for part in module.parts)) or module.out
        if quantization.algorithm == NVFP4:
            asked = [(module.in_, inside, NVFP4_GROUP)]
        elif module.experts:
            asked = [(outs, out, ALIGNMENT), (module.in_, inside, ALIGNMENT), (module.in_, inside, group)]
        else:
            whole_in, whole_out = model.dimension(module.in_) / tp_size, model.dimension(module.out or "0") / tp_size
            asked = [(outs, out if module.split == "column" else whole_out, tile), (module.in_, whole_in, tile)]
        for name, size, of in asked:
            if size % of and (name, of) not in seen:
                seen.add((name, of))
                yield name, size, of


def _share(sharding: Sharding, out: str, heads: str, count: int) -> float:
    """Rows of a part that a rank holds: a whole head at least, where it is split by heads."""
    rows = sharding.model.dimension(out)
    return max(rows / count, rows / sharding.model.dimension(heads)) if heads else rows / count
