"""What the report's page is made of: words, the scale of the heat map, sizes of ranks, the picture of the stages."""

from __future__ import annotations

import math
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.reporting.html.errors_map import error_map
from pipeline.reporting.html.flow import NARROW, WIDE, columns, steps, timed
from pipeline.reporting.html.provenance import Provenance
from pipeline.reporting.html.scale import STEPS, colour_scale
from pipeline.reporting.html.sizes import part, sizes
from pipeline.reporting.html.summary import TensorError, VerificationSummary, parse_summary
from pipeline.reporting.html.words import duration, percent, runs, together, visible
from pipeline.tensor.tensors import tensor_bytes
from tests.support import report_pages

decibels = st.floats(-300, 300, allow_nan=False)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (0.00042, "0.42 ms"),
        (0.9994, "999 ms"),
        (0.9999, "1.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 0 s"),
        (3599.6, "1 h 0 min"),
        (7384, "2 h 3 min"),
        (math.nan, "nan"),
    ],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds).replace("\N{NO-BREAK SPACE}", " ") == said


def test_a_small_share_is_not_nothing() -> None:
    assert [percent(share).replace("\N{NO-BREAK SPACE}", " ") for share in (0, 1e-6, 0.0005, 1)] == [
        "0.0 %",
        "< 0.1 %",
        "0.1 %",
        "100.0 %",
    ]


def test_runs_of_numbers() -> None:
    assert runs([5, 2, 3, 4, 0, 4]) == "0, 2\N{EN DASH}5"
    assert runs([]) == ""


def test_names_that_share_words() -> None:
    layer = "model.layers.0.self_attn"
    assert together([f"{layer}.q_proj.weight", f"{layer}.k_proj.weight"]) == f"{layer}.{{q_proj, k_proj}}.weight"
    assert together(["a.b"]) == "a.b"
    assert together([]) == ""
    assert together([f"e.{n}.w" for n in range(9)]) == "e.{0, 1, 2, 3, 4, 5, … 3 more}.w"
    assert together(["a.b", "a.b.b"]) == "a.b.{, b}"


@given(st.text())
def test_text_that_is_shown_has_nothing_hidden(text: str) -> None:
    shown = visible(text)
    assert all(c.isprintable() or c == "\n" or unicodedata.category(c) == "Zs" for c in shown)  # spaces are seen as such
    shown.encode()
    if text.isprintable():
        assert shown == text


def test_what_turns_text_around_is_escaped() -> None:
    assert visible("a\u202eb\x00\ud800\u200f") == r"a\u202eb\x00\ud800\u200f"


@given(st.lists(decibels, min_size=1, max_size=30))
def test_every_figure_is_in_its_step_of_the_legend(values: list[float]) -> None:
    made = colour_scale(values)
    legend = {css: label for css, _, label in made.legend}
    assert 1 <= made.count == len(legend) <= STEPS
    for value in values:
        text, css = made.mark(value, exact=False)
        low, high = _range(legend[css])
        assert low <= value < high
        # What is written in the cell is in the range too.
        assert low <= float(text) < high


def _range(label: str) -> tuple[float, float]:
    numbers = [float(number) for number in re.findall(r"-?\d+", label)]
    return (numbers[0], math.inf) if "or more" in label else (numbers[0], numbers[1])


@given(st.lists(decibels, min_size=1, max_size=30))
def test_worse_is_never_a_better_step(values: list[float]) -> None:
    made = colour_scale(values)
    marks = [int(made.mark(value, exact=False)[1][1:]) for value in sorted(values, reverse=True)]
    assert marks == sorted(marks)


def test_what_is_no_number_is_the_worst_or_best_step() -> None:
    made = colour_scale([20.0, 30.0, math.nan, math.inf])
    assert made.mark(math.nan, exact=False) == ("nan", f"s{STEPS - 1}")
    assert made.mark(-math.inf, exact=False) == ("-inf", f"s{STEPS - 1}")
    assert made.mark(math.inf, exact=False) == ("inf", "s0")
    assert made.mark(None, exact=True) == ("=", "exact")
    assert made.mark(55.7, exact=True) == ("55", "once")
    assert colour_scale([math.nan]).legend == []


def round_trip(**changes: object) -> VerificationSummary:
    made = report_pages.summary(32)
    return parse_summary({**made, "round_trip": {**made["round_trip"], **changes}})


def test_the_map_has_every_layer_and_kind_once() -> None:
    found = parse_summary(report_pages.summary(80)).round_trip
    assert found
    made = error_map(found)
    assert list(made.columns) == list(report_pages.KINDS)
    rows = [row for block in made.blocks for row in block]
    assert [layer for layer, _ in rows] == list(range(80))
    assert len(made.blocks) == 3
    by_name = {tensor.name: tensor for tensor in found.tensors}
    for layer, cells in rows:
        for kind, cell in zip(made.columns, cells, strict=True):
            tensor = by_name[f"transformer.layers.{layer}.{kind}.weight"]
            assert cell.text == ("=" if tensor.snr_db is None else str(math.floor(tensor.snr_db)))
            assert cell.words.startswith(tensor.name)


def test_a_cell_of_several_tensors_shows_the_worst() -> None:
    tensors = [
        report_pages.tensor(f"transformer.layers.0.mlp.fc.{n}.weight", "mlp.fc", 0, [], snr, "fp8", 2)
        for n, snr in enumerate((31.5, 28.2, None))
    ]
    found = round_trip(tensors=tensors).round_trip
    assert found
    made = error_map(found)
    (((_, (cell,)),),) = made.blocks
    assert cell.text == "28"
    assert "mlp.fc.1.weight" in cell.words
    assert "the worst of 3 tensors" in cell.words
    assert (made.tensors, made.identical, made.rounded, made.over) == (3, 1, 0, 0)


def test_what_is_over_its_bound_comes_first_and_does_not_stretch_the_scale() -> None:
    passed, failed = parse_summary(report_pages.summary()).round_trip, parse_summary(report_pages.failed()).round_trip
    assert passed
    assert failed
    assert error_map(failed).worst[0].name == "transformer.layers.3.mlp.fc.weight"
    assert error_map(failed).worst[0].over
    assert error_map(failed).over == 1
    assert not error_map(passed).over
    steps_ = [(made.scale.top, made.scale.width) for made in (error_map(passed), error_map(failed))]
    assert steps_[0] == steps_[1]
    cell = error_map(failed).blocks[0][3][1][list(report_pages.KINDS).index("mlp.fc")]
    assert (cell.text, cell.css) == ("2!", f"s{STEPS - 1} over")


@pytest.mark.parametrize(("bound", "over"), [(1.0, False), (1.001, True), (math.nan, True), (math.inf, True), (0.0, False)])
def test_more_error_than_allowed(bound: float, over: bool) -> None:
    values = report_pages.tensor("a.weight", "a", None, [], 20.0, "fp8", 1)
    assert TensorError.model_validate({**values, "bound": bound}).over is over


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (8, 4)])
def test_sizes_of_ranks_add_up(tp: int, pp: int) -> None:
    checkpoint = report_pages.checkpoint(32, tp, pp)
    made = sizes(checkpoint)
    total = sum(tensor_bytes(tensor) for rank in checkpoint.ranks for tensor in rank.values())
    assert made.total_bytes == total
    assert made.tensors == sum(map(len, checkpoint.ranks))
    assert len(made.bars) == (3 if tp * pp > 16 else tp * pp)
    assert max(sum(float(segment.width[:-1]) for segment in bar.segments) for bar in made.bars) == pytest.approx(100, abs=0.01)
    for bar in made.bars:
        numbers = [made.parts[segment.number][0] for segment in bar.segments]
        assert numbers == [segment.part for segment in bar.segments]


def test_parts_of_names() -> None:
    assert part("transformer.layers.11.attention.qkv.weight") == "attention"
    assert part("transformer.layers.3.input_layernorm.weight") == "input_layernorm"
    assert part("transformer.vocab_embedding.weight") == "vocab_embedding"
    assert part("lm_head.weight") == "lm_head"
    assert part("x") == "x"


def test_the_stages_in_order_with_their_cut() -> None:
    checkpoint = report_pages.checkpoint(cuts=("unpack",))
    boxes = steps(checkpoint, Provenance.model_validate(checkpoint.provenance))
    names = ["read", "rename", "unpack", "scratch", "cast", "quantize", "shard", "checksum", "write"]
    assert [box.name for box in boxes] == names
    assert [box.name for box in boxes if box.idle] == ["rename"]
    assert [box.name for box in boxes if box.cut] == ["scratch"]
    assert sum(box.share for box in boxes) == pytest.approx(1)
    assert timed(boxes)[0].name == "quantize"
    assert {"rename", "scratch"}.isdisjoint(box.name for box in timed(boxes))


def test_a_stage_of_another_version_is_shown_too() -> None:
    told = {"timings": {"stages": {"calibrate": {"seconds": 2.0}}}}
    boxes = steps(report_pages.checkpoint(), Provenance.model_validate(told))
    assert boxes[-1].name == "calibrate"
    assert boxes[-1].share == 1


@given(st.integers(0, 40))
def test_rows_of_boxes_are_of_about_one_length(number: int) -> None:
    for most in (WIDE, NARROW):
        wide = columns([None] * number, most)  # type: ignore[list-item]
        rows = -(-(number + 2) // wide)
        assert wide <= most
        assert rows == -(-(number + 2) // most)
        assert wide * rows - (number + 2) < rows
