"""The size of each rank, by the part of the model that its bytes hold."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.reporting.html.provenance import look_up
from pipeline.reporting.html.words import percent, runs, size
from pipeline.tensor.checkpoint import Checkpoint, FileTensor

SHOWN_PARTS = 5  # with a colour of their own, if they are no speck; the rest is one more
SPECK = 0.005
SHOWN_RANKS = 16  # with a row each; of more, equal neighbours share one
OTHER = "other"

_IN_LAYER = ("transformer", "layers")


@dataclass(frozen=True)
class Segment:
    """A part's share of a rank's bar: `number` is its place in the legend, `width` of the longest bar, as CSS."""

    part: str
    number: int
    size: str
    width: str


@dataclass(frozen=True)
class Bar:
    """One rank, or several equal ones."""

    label: str
    each: bool
    tensors: int
    size: str
    size_bytes: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Sizes:
    """All ranks. `parts`: name, bytes in all, share of all; in the order of the segments."""

    bars: tuple[Bar, ...]
    parts: tuple[tuple[str, str, str], ...]
    tensors: int
    total_bytes: int

    @property
    def total(self) -> str:
        return size(self.total_bytes)


def tensor_bytes(tensor: FileTensor) -> int:
    """The bytes of a tensor in its file."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def part(name: str) -> str:
    """The part of the model that a rank's tensor belongs to: `attention`, `mlp`, `input_layernorm`, `lm_head`.

    What follows the layer's number in `transformer.layers.3.attention.qkv.weight`; the module of a name outside the layers.
    """
    words = name.split(".")
    if tuple(words[:2]) == _IN_LAYER and len(words) > 4:
        return words[3]
    return words[-2] if len(words) > 1 else name


def sizes(checkpoint: Checkpoint) -> Sizes:
    """Bytes of tensors by rank and part; headers of files are not counted."""
    ranks = [_parts(tensors) for tensors in checkpoint.ranks]
    whole = sum(ranks, Counter[str]())
    total = sum(whole.values())
    named = [name for name, nbytes in whole.most_common(SHOWN_PARTS) if nbytes >= SPECK * total]
    order = [*named, OTHER] if len(whole) > len(named) else named
    held = [{name: _of(rank, name, named) for name in order} for rank in ranks]
    longest = max((sum(rank.values()) for rank in held), default=0) or 1
    bars = tuple(
        _bar(numbers, held[numbers[0]], len(checkpoint.ranks[numbers[0]]), longest, checkpoint)
        for numbers in _alike(checkpoint, held)
    )
    parts = tuple((name, size(n), percent(n / (total or 1))) for name in order for n in [_of(whole, name, named)])
    return Sizes(bars, parts, sum(map(len, checkpoint.ranks)), total)


def _parts(tensors: Mapping[str, FileTensor]) -> Counter[str]:
    found: Counter[str] = Counter()
    for name, tensor in tensors.items():
        found[part(name)] += tensor_bytes(tensor)
    return found


def _of(rank: Counter[str], name: str, named: list[str]) -> int:
    return sum(n for key, n in rank.items() if key not in named) if name == OTHER and OTHER not in named else rank[name]


def _alike(checkpoint: Checkpoint, held: list[dict[str, int]]) -> list[list[int]]:
    """The numbers of ranks that share a row: each its own, or, where there are many, neighbours of equal sizes."""
    rows: list[list[int]] = []
    for number in range(len(held)):
        before = rows[-1][0] if rows else None
        alike = (
            before is not None and held[before] == held[number] and len(checkpoint.ranks[before]) == len(checkpoint.ranks[number])
        )
        if alike and len(held) > SHOWN_RANKS:
            rows[-1].append(number)
        else:
            rows.append([number])
    return rows


def _bar(numbers: list[int], held: dict[str, int], tensors: int, longest: int, checkpoint: Checkpoint) -> Bar:
    segments = tuple(
        Segment(name, place, size(nbytes), f"{nbytes / longest * 100:.3f}%")
        for place, (name, nbytes) in enumerate(held.items())
        if nbytes
    )
    total = sum(held.values())
    return Bar(_label(numbers, checkpoint), len(numbers) > 1, tensors, size(total), total, segments)


def _label(numbers: list[int], checkpoint: Checkpoint) -> str:
    tp, pp = look_up(checkpoint.config, "mapping.tp_size"), look_up(checkpoint.config, "mapping.pp_size")
    label = f"{'ranks' if len(numbers) > 1 else 'rank'} {runs(numbers)}"
    if isinstance(tp, int) and isinstance(pp, int) and tp > 0 and pp > 1:
        stages = sorted({number // tp for number in numbers})
        label += f", {'stages' if len(stages) > 1 else 'stage'} {runs(stages)}"
    return label
