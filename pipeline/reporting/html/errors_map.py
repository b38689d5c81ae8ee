"""Error per layer and kind of module as a heat map, the same by kind alone, and the worst tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.reporting.html.order import in_order
from pipeline.reporting.html.scale import Scale, scale
from pipeline.reporting.html.summary import RoundTrip, TensorError
from pipeline.reporting.html.words import count, decibels, figure, runs, together

WORST = 12  # tensors in the list that is open
LISTED = 1000  # tensors in the list that is folded
PAGE_EMS = 74  # the width that blocks of the map share, and what a row's label and a cell take of it
LABEL_EMS, CELL_EMS = 4.0, 2.9
ROWS = 10  # a block has no fewer, unless there are no more


@dataclass(frozen=True)
class Cell:
    """A square of the map: its text, its colour's class, and what it says when pointed at. Empty where there is no tensor."""

    text: str = ""
    css: str = "none"
    words: str = ""


@dataclass(frozen=True)
class Row:
    """A tensor of a list."""

    name: str
    storage: str
    ranks: str
    sources: str
    snr: Cell
    max_abs: str
    relative_rms: str
    cosine: str
    bound: str
    over: bool


@dataclass(frozen=True)
class Kind:
    """All tensors of a kind: how many, how many of them bit-identical, and the worst of each figure."""

    name: str
    in_layers: bool
    storage: str
    tensors: int
    identical: int
    snr: Cell
    relative_rms: str
    max_abs: str
    bound: str
    over: bool


@dataclass(frozen=True)
class ErrorMap:
    """`blocks` of the map stand side by side where there is room: each is rows of (layer, a cell a kind)."""

    columns: tuple[str, ...]
    blocks: tuple[tuple[tuple[int, tuple[Cell, ...]], ...], ...]
    scale: Scale
    kinds: tuple[Kind, ...]
    worst: tuple[Row, ...]
    listed: tuple[Row, ...]
    tensors: int
    identical: int
    rounded: int
    over: int
    lowest: float | None

    @property
    def headline(self) -> tuple[str, str]:
        """The one figure that says most, and what it is."""
        if self.lowest is not None:
            return decibels(self.lowest), "lowest signal to noise"
        if self.identical == self.tensors:
            return "bit-identical", "every tensor"
        return ("rounded once", "and no more, in every tensor") if self.rounded else ("no error", "in any tensor")


def error_map(found: RoundTrip) -> ErrorMap:
    """Arrange what a round trip found."""
    tensors = in_order(found.tensors)
    in_layers = [tensor for tensor in tensors if tensor.layer is not None]
    # What is quantized sets the scale: beside it a rounding to 16 bits is no more than the scale's light end.
    # What is broken is at its dark end, and must not stretch it.
    sound = [tensor for tensor in in_layers if not tensor.over]
    quantized = [tensor for tensor in sound if tensor.storage not in ("", "dense")]
    colours = scale([tensor.snr_db for tensor in quantized or sound or tensors if tensor.snr_db is not None and not tensor.exact])
    columns = tuple(dict.fromkeys(tensor.kind for tensor in in_layers))
    order = sorted(tensors, key=_badness)
    rows = tuple(_row(tensor, colours) for tensor in order[:LISTED])
    return ErrorMap(
        columns=columns,
        blocks=_blocks(in_layers, columns, colours),
        scale=colours,
        kinds=tuple(_kinds(tensors, colours)),
        worst=tuple(row for row, tensor in zip(rows, order[:WORST], strict=False) if not tensor.identical or tensor.over),
        listed=rows,
        tensors=len(tensors),
        identical=sum(tensor.identical for tensor in tensors),
        rounded=sum(tensor.rounded for tensor in tensors),
        over=sum(tensor.over for tensor in tensors),
        lowest=min((tensor.snr_db for tensor in tensors if tensor.snr_db is not None and not tensor.exact), default=None),
    )


def _badness(tensor: TensorError) -> tuple[bool, bool, float, float]:
    """The worst come first: over the bound, then those with an error by their signal to noise, then by their bound."""
    snr = tensor.snr_db
    value = math.inf if snr is None else -math.inf if math.isnan(snr) else snr
    return not tensor.over, tensor.exact, value, -tensor.bound if math.isfinite(tensor.bound) else -math.inf


def _blocks(
    tensors: Sequence[TensorError], columns: Sequence[str], colours: Scale
) -> tuple[tuple[tuple[int, tuple[Cell, ...]], ...], ...]:
    held: dict[tuple[int, str], list[TensorError]] = {}
    for tensor in tensors:
        if tensor.layer is not None:
            held.setdefault((tensor.layer, tensor.kind), []).append(tensor)
    layers = sorted({layer for layer, _ in held})
    rows = [(layer, tuple(_cell(held.get((layer, kind), []), colours) for kind in columns)) for layer in layers]
    fit = max(int(PAGE_EMS / (LABEL_EMS + CELL_EMS * len(columns))), 1)
    blocks = min(fit, -(-len(rows) // ROWS))
    height = -(-len(rows) // max(blocks, 1))
    return tuple(tuple(rows[start : start + height]) for start in range(0, len(rows), max(height, 1)))


def _cell(tensors: Sequence[TensorError], colours: Scale) -> Cell:
    """The worst of some tensors."""
    if not tensors:
        return Cell()
    worst = min(tensors, key=_badness)
    text, css = colours.mark(worst.snr_db, worst.exact)
    lines = [worst.name, ", ".join(filter(None, (worst.storage, _ranks(worst)))), _said(worst)]
    if len(tensors) > 1:
        lines.append(f"the worst of {count(len(tensors), 'tensor')}")
    return Cell(f"{text}!" if worst.over else text, f"{css} over" if worst.over else css, "\n".join(filter(None, lines)))


def _said(tensor: TensorError) -> str:
    allowed = f"{_bound(tensor.bound)} of the error that the format allows"
    if tensor.identical and not tensor.over:
        return "bit-identical to the source"
    noise = "no error" if tensor.snr_db is None else f"SNR {decibels(tensor.snr_db)}"
    errors = f"largest error {figure(tensor.max_abs)}, relative RMS {figure(tensor.relative_rms)}, cosine {tensor.cosine:.6g}"
    once = "rounded once, no more; " if tensor.rounded else ""
    return f"{once}{noise}, {errors}\n{allowed}{': too much' if tensor.over else ''}"


def _ranks(tensor: TensorError) -> str:
    return f"{'rank' if len(set(tensor.ranks)) == 1 else 'ranks'} {runs(tensor.ranks)}" if tensor.ranks else ""


def _row(tensor: TensorError, colours: Scale) -> Row:
    text, css = colours.mark(tensor.snr_db, tensor.exact, digits=1)
    return Row(
        name=tensor.name,
        storage=tensor.storage,
        ranks=runs(tensor.ranks),
        sources=together(tensor.sources),
        snr=Cell("bit-identical" if tensor.identical else text, css),
        max_abs=figure(tensor.max_abs),
        relative_rms=figure(tensor.relative_rms),
        cosine=f"{tensor.cosine:.6g}",
        bound=_bound(tensor.bound),
        over=tensor.over,
    )


def _kinds(tensors: Sequence[TensorError], colours: Scale) -> Iterable[Kind]:
    for name in dict.fromkeys(tensor.kind for tensor in tensors):
        held = [tensor for tensor in tensors if tensor.kind == name]
        worst = _row(min(held, key=_badness), colours)
        yield Kind(
            name=name,
            in_layers=any(tensor.layer is not None for tensor in held),
            storage=", ".join(dict.fromkeys(tensor.storage for tensor in held if tensor.storage)),
            tensors=len(held),
            identical=sum(tensor.identical for tensor in held),
            snr=worst.snr,
            relative_rms=figure(_most(tensor.relative_rms for tensor in held)),
            max_abs=figure(_most(tensor.max_abs for tensor in held)),
            bound=_bound(_most(tensor.bound for tensor in held)),
            over=any(tensor.over for tensor in held),
        )


def _bound(value: float) -> str:
    """The greatest error over the allowed one; where nothing is allowed it has no size."""
    return "> 999" if value > 999 else figure(value)


def _most(values: Iterable[float]) -> float:
    """The greatest value, or NaN where one is none."""
    held = list(values)
    return math.nan if any(map(math.isnan, held)) else max(held)
