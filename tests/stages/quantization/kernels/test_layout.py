"""The kernels' order: the closed-form maps of the format, element by element; blocks of rows and tiles of columns go by
themselves.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.model.kernels import alike, generations, order
from stages.quantization.kernels.layout import ALIGNMENT, KernelLayout, kernel_layout
from tests.support.examples import examples
from tests.support.kernel_oracle import ORDERS, TILE, A, P, T, arrange, gather, order_of, source_row, stream, unarrange

LAYOUTS = [(bits, name, KernelLayout(bits, 16 // bits if name == A else 1, name != T)) for bits in (8, 4) for name in (A, P, T)]

each_layout = pytest.mark.parametrize(("bits", "name", "layout"), LAYOUTS, ids=[f"int{bits}-{name}" for bits, name, _ in LAYOUTS])
each_width = pytest.mark.parametrize(
    ("bits", "layout"), [(b, made) for b, _, made in LAYOUTS], ids=[f"int{b}-{n}" for b, n, _ in LAYOUTS]
)
# Out-features in eights, as a rank's share of q, k or v may be; in-features in whole tiles.
sizes = st.tuples(st.integers(1, 9).map(lambda n: 8 * n), st.integers(1, 4).map(lambda n: TILE * n))


def random_codes(shape: tuple[int, int], bits: int, seed: int = 0) -> np.ndarray:
    half = 1 << (bits - 1)
    return np.random.default_rng(seed).integers(-half, half, shape)


@each_layout
@examples(40)
@given(shape=sizes, seed=st.integers(0, 99))
def test_every_element_is_where_the_maps_put_it(
    bits: int, name: str, layout: KernelLayout, shape: tuple[int, int], seed: int
) -> None:
    codes = random_codes(shape, bits, seed)
    result = layout.arrange(stream(codes, bits))
    assert result.dtype == np.uint8
    assert result.shape == (shape[0] // layout.columns, layout.columns * shape[1] * bits // 8)
    assert result.tobytes() == arrange(codes, bits, name)
    unpacked = (codes + (1 << (bits - 1))).astype(np.uint16)
    assert np.array_equal(layout.arrange_codes(unpacked), result)


@each_layout
@pytest.mark.parametrize("shape", [(64, 64), (64, 192), (192, 64), (128, 128)])
def test_codes_come_back(bits: int, name: str, layout: KernelLayout, shape: tuple[int, int]) -> None:
    codes = random_codes(shape, bits)
    assert np.array_equal(unarrange(layout.arrange(stream(codes, bits)).tobytes(), shape, bits, name), codes)
    # Each place has a code of its own: nothing is read twice.
    assert np.array_equal(np.sort(gather(*shape, bits, name)), np.arange(shape[0] * shape[1]))


@each_layout
def test_every_value_of_a_code_at_every_place_of_a_group(bits: int, name: str, layout: KernelLayout) -> None:
    values = np.arange(-(1 << (bits - 1)), 1 << (bits - 1))
    codes = np.stack([np.resize(np.roll(values, shift), TILE) for shift in range(max(len(values), 8))])
    assert layout.arrange(stream(codes, bits)).tobytes() == arrange(codes, bits, name)
    assert layout.arrange_codes((codes + (1 << (bits - 1))).astype(np.uint16)).tobytes() == arrange(codes, bits, name)


@each_width
@given(shape=sizes, data=st.data())
def test_blocks_of_rows_are_contiguous_ranges(bits: int, layout: KernelLayout, shape: tuple[int, int], data: st.DataObject) -> None:
    codes = stream(random_codes(shape, bits), bits)
    first = data.draw(st.integers(0, shape[0] // layout.columns - 1)) * layout.columns
    last = data.draw(st.integers(first // layout.columns + 1, shape[0] // layout.columns)) * layout.columns
    flat, row_bytes = layout.arrange(codes).reshape(-1), shape[1] * bits // 8
    assert np.array_equal(layout.arrange(codes[first:last]).reshape(-1), flat[first * row_bytes : last * row_bytes])


@each_width
@given(shape=sizes, data=st.data())
def test_tiles_of_columns_are_parts_of_each_row(
    bits: int, layout: KernelLayout, shape: tuple[int, int], data: st.DataObject
) -> None:
    """What a row-parallel split relies on: K is cut into tiles, each arranged by itself."""
    codes = stream(random_codes(shape, bits), bits)
    tiles = shape[1] // TILE
    first = data.draw(st.integers(0, tiles - 1))
    last = data.draw(st.integers(first + 1, tiles))
    part = codes[:, first * layout.tile_bytes : last * layout.tile_bytes]
    width = layout.tile_bytes * layout.columns
    assert np.array_equal(layout.arrange(np.ascontiguousarray(part)), layout.arrange(codes)[:, first * width : last * width])


def test_the_orders_that_the_specification_spells_out() -> None:
    assert [source_row(d, 8) for d in range(16)] == [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    assert [source_row(d, 4) for d in range(10)] == [0, 1, 8, 9, 16, 17, 24, 25, 2, 3]
    # After the shuffle of the registers, of one out-feature: what a kernel's thread finds in its words.
    int8 = KernelLayout(8, 1).arrange(np.arange(64, dtype=np.uint8)[None])[0]
    assert int8[:16].tolist() == [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]
    nibbles = np.arange(64, dtype=np.uint8) % 32
    low, high = (KernelLayout(4, 1).arrange((part[0::2] | part[1::2] << 4)[None])[0] for part in (nibbles & 15, nibbles >> 4))
    order = [int(a) + 16 * int(b) for a, b in zip(_nibbles(low), _nibbles(high), strict=True)]
    assert order[:16] == [0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27]
    assert order[16:32] == [4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31]


def _nibbles(data: np.ndarray) -> np.ndarray:
    return np.stack([data & 15, data >> 4], axis=1).reshape(-1)


@pytest.mark.parametrize(("bits", "columns"), [(8, 2), (4, 4)])
def test_tiles_of_neighbouring_out_features_alternate(bits: int, columns: int) -> None:
    """Layout A: each run of a tile's bytes is one out-feature's; runs go round the columns, then to the next tile."""
    codes = np.repeat(np.arange(columns)[:, None], 2 * TILE, axis=1) + np.repeat([0, columns], TILE)[None]
    flat = KernelLayout(bits, columns).arrange(stream(codes, bits)).reshape(-1)
    runs = flat.reshape(-1, TILE * bits // 8)
    assert (runs == runs[:, :1]).all()
    assert (runs[:, 0] & 15).tolist() == [(run + (1 << (bits - 1))) & 15 for run in range(2 * columns)]


@pytest.mark.parametrize("stacked", [False, True], ids=["matrix", "stack"])
@pytest.mark.parametrize("sm", ORDERS)
@pytest.mark.parametrize("bits", [8, 4])
def test_each_generation_has_the_order_of_the_specification(sm: int, bits: int, stacked: bool) -> None:
    """By the bytes of a random matrix, gathered element by element, and by the letter."""
    letter = order_of(sm, stacked)
    assert order(sm, stacked) == letter
    codes = random_codes((32, 192), bits, sm)
    layout = kernel_layout(bits, sm, stacked)
    assert layout.arrange(stream(codes, bits)).tobytes() == arrange(codes, bits, letter)
    assert layout.arrange_codes((codes + (1 << (bits - 1))).astype(np.uint16)).tobytes() == arrange(codes, bits, letter)
    # No other order has these bytes.
    others = {A, P, T} - {letter}
    assert not any(layout.arrange(stream(codes, bits)).tobytes() == arrange(codes, bits, other) for other in others)


def test_the_generations_and_those_that_read_alike() -> None:
    assert generations() == tuple(ORDERS)
    assert alike(80) == alike(121) == (75, 80, 86, 87, 89, 120, 121)
    assert alike(90) == (90,)
    assert alike(100) == alike(103) == (100, 103)
    assert ALIGNMENT == 64
    with pytest.raises(KeyError):
        order(70, stacked=False)


def test_a_plain_transpose_is_twos_complement_of_rows() -> None:
    """Order T by its definition: X[n, k] as int8; as nibbles, the even in-feature in the low half."""
    codes = random_codes((8, TILE), 8)
    assert np.array_equal(KernelLayout(8, 1, mixed=False).arrange(stream(codes, 8)).view(np.int8), codes)
    codes = random_codes((8, TILE), 4)
    packed = KernelLayout(4, 1, mixed=False).arrange(stream(codes, 4)).view(np.int8)
    assert np.array_equal((packed << 4).astype(np.int8) >> 4, codes[:, 0::2])
    assert np.array_equal(packed >> 4, codes[:, 1::2])


@each_width
def test_what_is_arranged_is_left_as_it_was(bits: int, layout: KernelLayout) -> None:
    """Sources are mapped read-only."""
    packed = stream(random_codes((8, TILE), bits), bits)
    unpacked = np.zeros((8, TILE), dtype=np.uint16)
    for arranger, values in ((layout.arrange, packed), (layout.arrange_codes, unpacked)):
        before = values.copy()
        values.flags.writeable = False
        arranger(values)
        assert np.array_equal(values, before)
