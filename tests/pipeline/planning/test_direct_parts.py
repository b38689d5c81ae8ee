"""Parts that are made of the source at once: the bytes of rank files, of no more rows than lie in each; and when they are not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipeline.planning.memory
import pipeline.planning.rank_parts
from pipeline import convert, plan
from pipeline.planning.direct_parts import needs_cut
from pipeline.planning.phases import Store
from pipeline.planning.rank_parts import delivered, grouped
from pipeline.sinks.output import Output
from pipeline.sinks.rank_file import rank_file
from pipeline.tensor.arrays import BlockArray
from pipeline.tensor.blocks import read_block
from pipeline.tensor.placement import FixedPlacements, Placement, RankTensor, Region, extent, size, slices, whole
from pipeline.tensor.remote_path import RemotePath
from pipeline.tensor.rows import take_rows
from pipeline.tensor.tensors import Applied, Block, map_blocks
from stages.read import read
from stages.write.parts import PartBytes
from tests.support import checkpoints, quantized_checkpoints
from tests.support.lazy import Held, HeldBlock, held
from tests.support.range_server import range_server
from tests.support.s3_server import Proxied, s3_server

RANKS, PERIOD = 2, 4
PLACE = RemotePath("s3://bucket/out")
DENSE = {**checkpoints.LLAMA, "hidden_size": 128, "intermediate_size": 384}


def turned(block: Block) -> Block:
    """The rows of each period in reverse order."""
    return Applied(block, _turn, stage="rename", dtype=block.dtype, period=PERIOD)


def _turn(values: np.ndarray) -> np.ndarray:
    periods = values.reshape(-1, PERIOD, *values.shape[1:])
    return np.ascontiguousarray(periods[:, ::-1]).reshape(values.shape)


@st.composite
def models(draw: st.DrawFn) -> tuple[list[Store], list[list[RankTensor]], dict[tuple[int, str], np.ndarray]]:
    """Some tensors, each split over the ranks by its rows, the last of them padding, by its columns, or not; and the ranks' own."""
    stores, ranks, expected = [], [[] for _ in range(RANKS)], {}
    for number in range(draw(st.integers(1, 4))):
        name, rows, columns = f"t{number}", RANKS * PERIOD * draw(st.integers(1, 9)), RANKS * draw(st.integers(1, 9))
        experts = draw(st.sampled_from([(), (), (3,)]))
        shape = draw(st.sampled_from([(*experts, rows, columns), (rows,)]))
        values = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape) + np.uint16(1)
        period = draw(st.sampled_from([1, PERIOD])) if len(shape) < 3 else 1
        array: BlockArray = read(held({name: values}), draw(st.integers(8, 400)), PERIOD)[name]
        if period > 1:
            array, values = map_blocks(array, turned, dtype=values.dtype), _turn(values)
        axis = draw(st.sampled_from([None, *range(len(shape))])) if len(shape) < 3 else draw(st.sampled_from([None, 1, 2]))
        padding = draw(st.integers(0, 3)) if axis == 0 and period == 1 else 0
        placements = []
        for rank in range(RANKS):
            own: list[tuple[int, int]] = list(whole(shape))
            if axis is not None:
                share = shape[axis] // RANKS
                own[axis] = (rank * share, (rank + 1) * share)
            there = extent(tuple(own))
            target: Region = whole(there)
            placements.append(Placement(rank, name, tuple(own), target))
            filled = np.ascontiguousarray(values[slices(tuple(own))])
            if padding:
                there = (there[0] + padding, *there[1:])
                placements.append(Placement(rank, name, None, ((there[0] - padding, there[0]), *target[1:])))
                filled = np.concatenate([filled, np.zeros((padding, *there[1:]), filled.dtype)])
            ranks[rank].append(RankTensor(rank, name, there, "float16"))
            expected[rank, name] = filled
        stores.append(Store(name, (array,), (FixedPlacements(placements),), 2, period, values.nbytes))
    return stores, ranks, expected


@given(models(), st.integers(20, 600))
def test_the_parts_of_a_file_are_its_bytes(model: Any, step: int) -> None:
    stores, ranks, expected = model
    files = tuple(rank_file(PLACE / f"rank{rank}.safetensors", tensors) for rank, tensors in enumerate(ranks))
    output = Output(PLACE, files, "", "", (), False, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.planning.rank_parts, "PART_BYTES", 2 * step)
        groups, parts = grouped(stores, [output], 1000)
    made = [bytearray(file.size_bytes) for file in files]
    for group, part in zip(groups, parts.values(), strict=True):
        with PartBytes(part, "") as gathered:
            for store, index in group:
                region, found = delivered(part, store, index, files[part.rank])
                assert found
                block = read_block(store.arrays[0], index)[slices(region)]
                for to in found:
                    gathered.write(np.ascontiguousarray(block.read(to.source)).reshape(-1).view(np.uint8).data, to.offset)
            assert gathered.filled == part.end - part.start, "each byte once"
            made[part.rank][part.start : part.end] = gathered.data
    for file, found in zip(files, made, strict=True):
        assert found[: len(file.header)] == file.header
    for (rank, name), values in expected.items():
        tensor = files[rank].tensors[name]
        assert made[rank][tensor.offset : tensor.offset + tensor.nbytes] == values.tobytes()


def test_a_part_takes_the_rows_that_lie_in_it_and_no_others() -> None:
    """[64, 8] of two bytes in one block: a part of 100 of them has bytes of at most eight rows, for each rank half of each row."""
    values = np.zeros((64, 8), np.uint16)
    (array,) = read(held({"t": values}), 1 << 20, 1).values()
    placements = [Placement(rank, "t", ((0, 64), (4 * rank, 4 * rank + 4)), ((0, 64), (0, 4))) for rank in range(2)]
    store = Store("t", (array,), (FixedPlacements(placements),), 2, 1, values.nbytes)
    files = tuple(rank_file(PLACE / f"rank{n}.safetensors", [RankTensor(n, "t", (64, 4), "float16")]) for n in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.planning.rank_parts, "PART_BYTES", 56)
        _, parts = grouped([store], [Output(PLACE, files, "", "", (), False, {})], 1000)
    assert [(part.rank, part.number) for part in list(parts.values())[:4]] == [(0, 1), (1, 1), (0, 2), (1, 2)], "side by side"
    for part in parts.values():
        region, found = delivered(part, store, (0, 0), files[part.rank])
        if found:
            assert region[1] == (0, 8)
            assert size(region) // 8 <= 56 // 8 + 1
            assert sum(size(to.source) for to in found) * 2 <= 56


def test_a_parts_blocks_are_found_without_a_look_at_all_blocks_of_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred blocks in as many parts: a mixture's stacks of experts are as many, and looking at each for each takes minutes."""
    (array,) = read(held({"t": np.zeros((1000, 4), np.uint16)}), 80, 1).values()
    region = whole(array.shape)
    store = Store("t", (array,), (FixedPlacements([Placement(0, "t", region, region)]),), 2, 1, array.nbytes)
    output = Output(PLACE, (rank_file(PLACE / "rank0.safetensors", [RankTensor(0, "t", array.shape, "float16")]),), "", "")
    looked = list[Any]()
    monkeypatch.setattr(pipeline.planning.rank_parts, "PART_BYTES", 80)
    monkeypatch.setattr(pipeline.planning.rank_parts, "delivered", lambda *own: (looked.append(own), delivered(*own))[1])
    groups, parts = grouped([store], [output], 1000)
    assert array.npartitions == 100 <= len(parts)
    assert len(looked) == sum(map(len, groups)) <= 2 * len(parts)


def test_a_narrow_part_of_a_cast_block_is_made_of_a_narrow_part_of_its_source() -> None:
    block = turned(HeldBlock(np.arange(32).reshape(16, 2), whole((16, 2))))
    part = block[4:8]
    assert isinstance(part, Applied)
    assert part.base.shape == (4, 2)
    assert np.array_equal(part.read(whole((4, 2))), block.read(((4, 8), (0, 2))))
    odd = block[3:6]
    assert not isinstance(odd, Applied)
    assert np.array_equal(odd.read(whole((3, 2))), block.read(((3, 6), (0, 2))))


@pytest.fixture(scope="module")
def server() -> Iterator[Proxied]:
    with s3_server() as found:
        yield found


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dtype": "bfloat16", "tp_size": 2}, ""),
        ({"scratch_after": "none"}, ""),
        ({"write_rope_buffers": True}, ""),
        ({"scratch_after": "shard"}, "it was asked for"),
        ({"scratch_after": "read"}, "chunks of the cut before it are checked whole"),
        ({"use_weight_only": True}, "passes quantize"),
        ({"target": [{"output_dir": f"{PLACE}/{n}", "tp_size": n} for n in (1, 2)]}, "several outputs share one reading"),
    ],
)
def test_a_cut_where_it_is_needed_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoints.write(tmp_path / "model", DENSE)
    place = {} if "target" in options else {"output_dir": str(PLACE)}
    made = plan(model_dir=tmp_path / "model", scheduler="threads", **place, **options)
    said = made.scratch_reasons["shard"]
    if why:
        assert said.startswith("cut: ")
        assert why in said
        assert made.scratch_bytes_written
    else:
        assert said == "no cut: each part of a rank file is made of the source's rows at once"
        assert (made.scratch, made.scratch_bytes_written, made.scratch_bytes_read) == ((), 0, 0)


@pytest.mark.usefixtures("server")
def test_what_is_unpacked_needs_a_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quantized_checkpoints.write(tmp_path / "model", quantized_checkpoints.LLAMA, quantized_checkpoints.bitsandbytes())
    made = plan(model_dir=tmp_path / "model", output_dir=str(PLACE), dequantize=True)
    assert made.scratch_reasons["shard"].endswith("passes unpack")


class HeldByRows(Held):
    """A tensor of somebody's own source."""

    by_rows = True


@pytest.mark.parametrize(("made", "why"), [(Held, "t is no one run of bytes in a file"), (HeldByRows, "")])
def test_a_tensor_of_any_source_may_say_that_some_rows_are_read_without_the_others(made: type[Held], why: str) -> None:
    (array,) = read({"t": made(np.zeros((64, 8), np.uint16))}, 1 << 20, 1).values()
    array.stage = "read"
    of_its_rows = take_rows(map_blocks(array, turned, dtype=array.dtype), [(4, 12)], 0)
    for each in (of_its_rows, *of_its_rows.inputs):
        each.stage = "rename"
    store = Store("t", (of_its_rows,), (FixedPlacements(()),), 2, 1, array.nbytes)
    assert needs_cut([store], [PLACE], fetched=False) == why


@pytest.mark.usefixtures("server")
def test_a_stream_needs_a_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.tensor.bucket.IN_PARTS", ())
    checkpoints.write(tmp_path / "model", DENSE)
    said = plan(model_dir=tmp_path / "model", output_dir=str(PLACE)).scratch_reasons["shard"]
    assert said.endswith("this store takes each file as one stream")


@pytest.mark.usefixtures("server")
def test_columns_behind_a_url_are_not_fetched_again_for_each_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    checkpoints.write(tmp_path / "model", DENSE)
    with range_server(tmp_path / "model") as served:
        options = {"model_dir": served.url, "output_dir": "s3://bucket/out", "scheduler": "threads"}
        assert plan(**options).scratch_reasons["shard"].startswith("no cut")
        assert plan(pp_size=2, **options).scratch_reasons["shard"].startswith("no cut")
        assert "parts made at once would fetch" in plan(tp_size=4, **options).scratch_reasons["shard"]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.usefixtures("server")
def test_what_a_part_fetches_ahead_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Pieces are fetched ahead to the end of the part's rows, and not into those of the next part, which another task fetches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline.planning.rank_parts, "PART_BYTES", 40_000)
    monkeypatch.setattr(pipeline.planning.memory, "MAX_PIECE_BYTES", 4_000)
    checkpoints.write(tmp_path / "model", {**DENSE, "torch_dtype": "float16"})
    with range_server(tmp_path / "model") as served:
        options = {"model_dir": served.url, "output_dir": f"{PLACE}-{dtype}", "dtype": dtype, "scheduler": "threads"}
        convert(**options)
        lengths = [last - first + 1 for _, name, first, last in served.requests if name.endswith(".safetensors")]
    pieces = [length for length in lengths if length <= 4_000]  # the others were for the header
    size_bytes = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(pieces) > 50
    assert sum(pieces) < 1.05 * size_bytes
