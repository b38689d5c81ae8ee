"""Arrange the errors of tensors: a heat map by layer and kind of module, a table by kind, and the list of the worst."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.reporting.html.order import in_order
from pipeline.reporting.html.scale import ColourScale, colour_scale
from pipeline.reporting.html.summary import RoundTrip, TensorError
from pipeline.reporting.html.words import count, decibels, figure, runs, together

WORST = 12  # tensors in the list that is open
LISTED = 1000  # tensors in the list that is folded
REPORT_EMS = 74  # the width that blocks of the map share
LABEL_EMS, CELL_EMS = 4.0, 2.9  # the widths of a row's label and of a cell
ROWS = 10  # a block has no fewer, unless there are no more


@dataclass(frozen=True)
class MapCell:
    """A square of the map: its text, the CSS class of its colour, and its tooltip. Without a tensor it is empty."""

    text: str = ""
    css: str = "none"
    words: str = ""


@dataclass(frozen=True)
class TensorRow:
    """A tensor in the list of the worst."""

    name: str
    storage: str
    ranks: str
    sources: str
    snr: MapCell
    max_abs: str
    relative_rms: str
    cosine: str
    bound: str
    over: bool


@dataclass(frozen=True)
class KindRow:
    """A kind of module in the table: the numbers of its tensors and of the bit-identical ones, and the worst of each figure."""

    name: str
    in_layers: bool
    storage: str
    tensors: int
    identical: int
    snr: MapCell
    relative_rms: str
    max_abs: str
    bound: str
    over: bool


@dataclass(frozen=True)
class ErrorMap:
    """The heat map, the table by kind and the lists.

    `columns`: the kinds. `blocks`: parts of the map that stand side by side where there is room, each rows of (layer, a cell for
    each kind). `identical`, `rounded`, `over`: numbers of tensors. `lowest`: the lowest signal-to-noise ratio in dB, None for no
    error.
    """

    columns: tuple[str, ...]
    blocks: tuple[tuple[tuple[int, tuple[MapCell, ...]], ...], ...]
    scale: ColourScale
    kinds: tuple[KindRow, ...]
    worst: tuple[TensorRow, ...]
    listed: tuple[TensorRow, ...]
    tensors: int
    identical: int
    rounded: int
    over: int
    lowest: float | None

    @property
    def headline(self) -> tuple[str, str]:
        """The most telling figure, and its description."""
        if self.lowest is not None:
            return decibels(self.lowest), "lowest signal to noise"
        if self.identical == self.tensors:
            return "bit-identical", "every tensor"
        return ("rounded once", "and no more, in every tensor") if self.rounded else ("no error", "in any tensor")


def error_map(round_trip: RoundTrip) -> ErrorMap:
    """Arrange the errors of a round trip."""
    tensors = in_order(round_trip.tensors)
    in_layers = [tensor for tensor in tensors if tensor.layer is not None]
    # Quantized tensors set the scale: beside them a rounding to 16 bits is at the scale's light end.
    # Broken tensors are at its dark end, and must not stretch it.
    sound = [tensor for tensor in in_layers if not tensor.over]
    quantized = [tensor for tensor in sound if tensor.storage not in ("", "dense")]
    colours = colour_scale(
        [tensor.snr_db for tensor in quantized or sound or tensors if tensor.snr_db is not None and not tensor.exact]
    )
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
    """A sort key by which the worst come first: those over the bound, then by signal to noise, then by bound."""
    snr = tensor.snr_db
    value = math.inf if snr is None else -math.inf if math.isnan(snr) else snr
    return not tensor.over, tensor.exact, value, -tensor.bound if math.isfinite(tensor.bound) else -math.inf


def _blocks(
    tensors: Sequence[TensorError], columns: Sequence[str], colours: ColourScale
) -> tuple[tuple[tuple[int, tuple[MapCell, ...]], ...], ...]:
    cells: dict[tuple[int, str], list[TensorError]] = {}
    for tensor in tensors:
        if tensor.layer is not None:
            cells.setdefault((tensor.layer, tensor.kind), []).append(tensor)
    layers = sorted({layer for layer, _ in cells})
    rows = [(layer, tuple(_cell(cells.get((layer, kind), []), colours) for kind in columns)) for layer in layers]
    fit = max(int(REPORT_EMS / (LABEL_EMS + CELL_EMS * len(columns))), 1)
    blocks = min(fit, -(-len(rows) // ROWS))
    height = -(-len(rows) // max(blocks, 1))
    return tuple(tuple(rows[start : start + height]) for start in range(0, len(rows), max(height, 1)))


def _cell(tensors: Sequence[TensorError], colours: ColourScale) -> MapCell:
    """The cell of some tensors, with the figures of the worst."""
    if not tensors:
        return MapCell()
    worst = min(tensors, key=_badness)
    text, css = colours.mark(worst.snr_db, worst.exact)
    lines = [worst.name, ", ".join(filter(None, (worst.storage, _ranks(worst)))), _errors_in_words(worst)]
    if len(tensors) > 1:
        lines.append(f"the worst of {count(len(tensors), 'tensor')}")
    return MapCell(f"{text}!" if worst.over else text, f"{css} over" if worst.over else css, "\n".join(filter(None, lines)))


def _errors_in_words(tensor: TensorError) -> str:
    allowed = f"{_bound(tensor.bound)} of the error that the format allows"
    if tensor.identical and not tensor.over:
        return "bit-identical to the source"
    noise = "no error" if tensor.snr_db is None else f"SNR {decibels(tensor.snr_db)}"
    errors = f"largest error {figure(tensor.max_abs)}, relative RMS {figure(tensor.relative_rms)}, cosine {tensor.cosine:.6g}"
    once = "rounded once, no more; " if tensor.rounded else ""
    return f"{once}{noise}, {errors}\n{allowed}{': too much' if tensor.over else ''}"


def _ranks(tensor: TensorError) -> str:
    return f"{'rank' if len(set(tensor.ranks)) == 1 else 'ranks'} {runs(tensor.ranks)}" if tensor.ranks else ""


def _row(tensor: TensorError, colours: ColourScale) -> TensorRow:
    text, css = colours.mark(tensor.snr_db, tensor.exact, digits=1)
    return TensorRow(
        name=tensor.name,
        storage=tensor.storage,
        ranks=runs(tensor.ranks),
        sources=together(tensor.sources),
        snr=MapCell("bit-identical" if tensor.identical else text, css),
        max_abs=figure(tensor.max_abs),
        relative_rms=figure(tensor.relative_rms),
        cosine=f"{tensor.cosine:.6g}",
        bound=_bound(tensor.bound),
        over=tensor.over,
    )


def _kinds(tensors: Sequence[TensorError], colours: ColourScale) -> Iterable[KindRow]:
    for name in dict.fromkeys(tensor.kind for tensor in tensors):
        of_kind = [tensor for tensor in tensors if tensor.kind == name]
        worst = _row(min(of_kind, key=_badness), colours)
        yield KindRow(
            name=name,
            in_layers=any(tensor.layer is not None for tensor in of_kind),
            storage=", ".join(dict.fromkeys(tensor.storage for tensor in of_kind if tensor.storage)),
            tensors=len(of_kind),
            identical=sum(tensor.identical for tensor in of_kind),
            snr=worst.snr,
            relative_rms=figure(_most(tensor.relative_rms for tensor in of_kind)),
            max_abs=figure(_most(tensor.max_abs for tensor in of_kind)),
            bound=_bound(_most(tensor.bound for tensor in of_kind)),
            over=any(tensor.over for tensor in of_kind),
        )


def _bound(value: float) -> str:
    """The ratio of the greatest error to the allowed one as text; it is not finite where no error is allowed."""
    return "> 999" if value > 999 else figure(value)


def _most(values: Iterable[float]) -> float:
    """The greatest value, or NaN where one is NaN."""
    listed = list(values)
    return math.nan if any(map(math.isnan, listed)) else max(listed)
