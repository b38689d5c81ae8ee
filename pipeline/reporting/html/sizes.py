"""Sum up the size of each rank by parts of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.reporting.html.provenance import look_up
from pipeline.reporting.html.words import percent, runs, size
from pipeline.tensor.checkpoint import Checkpoint, FileTensor
from pipeline.tensor.tensors import tensor_bytes

SHOWN_PARTS = 5  # parts with a colour of their own; the others are one more
SPECK = 0.005  # of all bytes: a smaller part has no colour of its own
SHOWN_RANKS = 16  # ranks with a row each; of more, equal neighbours share one
OTHER = "other"

_IN_LAYER = ("transformer", "layers")


@dataclass(frozen=True)
class Segment:
    """A part's share of a rank's bar. `number`: its place in the legend. `width`: its share of the longest bar, in CSS."""

    part: str
    number: int
    size: str
    width: str


@dataclass(frozen=True)
class RankBar:
    """The bar of one rank, or of several equal ones (`each`), whose figures are those of one of them."""

    label: str
    each: bool
    tensors: int
    size: str
    size_bytes: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Sizes:
    """The bars of all ranks. `parts`: each one's name, bytes in all and share of all, in the order of the segments."""

    bars: tuple[RankBar, ...]
    parts: tuple[tuple[str, str, str], ...]
    tensors: int
    total_bytes: int

    @property
    def total(self) -> str:
        """The bytes of all tensors in words."""
        return size(self.total_bytes)


def part(name: str) -> str:
    """The part of the model that a rank's tensor belongs to: `attention`, `mlp`, `input_layernorm`, `lm_head`.

    It is the word behind the layer's number in `transformer.layers.3.attention.qkv.weight`; outside the layers, the module.
    """
    words = name.split(".")
    if tuple(words[:2]) == _IN_LAYER and len(words) > 4:
        return words[3]
    return words[-2] if len(words) > 1 else name


def sizes(checkpoint: Checkpoint) -> Sizes:
    """Sum up the bytes of tensors by rank and part, without the headers of files."""
    ranks = [_parts(tensors) for tensors in checkpoint.ranks]
    whole = sum(ranks, Counter[str]())
    total = sum(whole.values())
    named = [name for name, nbytes in whole.most_common(SHOWN_PARTS) if nbytes >= SPECK * total]
    order = [*named, OTHER] if len(whole) > len(named) else named
    shown_bytes = [{name: _of(rank, name, named) for name in order} for rank in ranks]
    longest = max((sum(rank.values()) for rank in shown_bytes), default=0) or 1
    bars = tuple(
        _bar(numbers, shown_bytes[numbers[0]], len(checkpoint.ranks[numbers[0]]), longest, checkpoint)
        for numbers in _alike(checkpoint, shown_bytes)
    )
    parts = tuple((name, size(n), percent(n / (total or 1))) for name in order for n in [_of(whole, name, named)])
    return Sizes(bars, parts, sum(map(len, checkpoint.ranks)), total)


def _parts(tensors: Mapping[str, FileTensor]) -> Counter[str]:
    """The bytes of a rank by part."""
    bytes_by_part: Counter[str] = Counter()
    for name, tensor in tensors.items():
        bytes_by_part[part(name)] += tensor_bytes(tensor)
    return bytes_by_part


def _of(rank: Counter[str], name: str, named: list[str]) -> int:
    """A rank's bytes of a part; OTHER is everything that is not `named`."""
    return sum(n for key, n in rank.items() if key not in named) if name == OTHER and OTHER not in named else rank[name]


def _alike(checkpoint: Checkpoint, shown_bytes: list[dict[str, int]]) -> list[list[int]]:
    """The numbers of ranks that share a row: each its own, or, where there are many, neighbours of equal sizes."""
    rows: list[list[int]] = []
    for number in range(len(shown_bytes)):
        before = rows[-1][0] if rows else None
        alike = (
            before is not None
            and shown_bytes[before] == shown_bytes[number]
            and len(checkpoint.ranks[before]) == len(checkpoint.ranks[number])
        )
        if alike and len(shown_bytes) > SHOWN_RANKS:
            rows[-1].append(number)
        else:
            rows.append([number])
    return rows


def _bar(numbers: list[int], bytes_by_part: dict[str, int], tensors: int, longest: int, checkpoint: Checkpoint) -> RankBar:
    segments = tuple(
        Segment(name, place, size(nbytes), f"{nbytes / longest * 100:.3f}%")
        for place, (name, nbytes) in enumerate(bytes_by_part.items())
        if nbytes
    )
    total = sum(bytes_by_part.values())
    return RankBar(_label(numbers, checkpoint), len(numbers) > 1, tensors, size(total), total, segments)


def _label(numbers: list[int], checkpoint: Checkpoint) -> str:
    tp, pp = look_up(checkpoint.config, "mapping.tp_size"), look_up(checkpoint.config, "mapping.pp_size")
    label = f"{'ranks' if len(numbers) > 1 else 'rank'} {runs(numbers)}"
    if isinstance(tp, int) and isinstance(pp, int) and tp > 0 and pp > 1:
        stages = sorted({number // tp for number in numbers})
        label += f", {'stages' if len(stages) > 1 else 'stage'} {runs(stages)}"
    return label
