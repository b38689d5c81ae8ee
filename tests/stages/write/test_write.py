"""write: read(write(x)) == x whatever the order of the blocks; files are the safetensors library's own, byte for byte."""

from __future__ import annotations

import itertools
import math
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from pipeline.model.dtypes import BY_TARGET
from pipeline.sinks.rank_file import RankFile, rank_file
from pipeline.tensor.placement import Placement, RankTensor, Region, extent, slices, whole
from stages.read.safetensors import open_file
from stages.write import write_blocks
from stages.write.deliveries import BlockWrite, Delivery, deliveries
from tests.support.examples import examples
from tests.support.lazy import HeldBlock, block
from tests.support.strategies import regions, shapes

TYPES = sorted(BY_TARGET)
TORCH = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
    "uint8": torch.uint8,
}
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
contents = st.dictionaries(names, st.tuples(st.sampled_from(TYPES), shapes(longest=5)), min_size=1, max_size=6)


def values(shape: tuple[int, ...], kind: str, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    numbers = random.integers(0, 128, shape) if "int" in kind else random.standard_normal(shape)
    return numbers.astype(BY_TARGET[kind].numpy)


def bound(files: Sequence[RankFile], placements: Sequence[Placement], region: Region) -> tuple[Delivery, ...]:
    return deliveries(placements, region, lambda rank, tensor, part: files[rank].tensors[tensor].locate(part))


def write_whole(file: RankFile, arrays: dict[str, np.ndarray]) -> bytes:
    """Write every tensor as one region, in the given order."""
    file.create()
    for name, array in arrays.items():
        placement = Placement(0, name, whole(array.shape), whole(array.shape))
        work = BlockWrite(name, (bound([file], [placement], whole(array.shape)),), array.dtype.itemsize, 1 << 20, 1)
        write_blocks(0, [work], [[block(array)]])
    file.finish()
    return file.path.read_bytes()


@examples(60)
@given(contents, st.randoms(use_true_random=False))
def test_files_are_those_of_safetensors(table: dict[str, tuple[str, tuple[int, ...]]], order: random.Random) -> None:
    arrays = {name: values(shape, kind, seed) for seed, (name, (kind, shape)) in enumerate(table.items())}
    shuffled = order.sample(list(arrays), len(arrays))
    with tempfile.TemporaryDirectory() as folder:
        tensors = [RankTensor(0, name, arrays[name].shape, table[name][0]) for name in shuffled]
        file = rank_file(Path(folder) / "rank0.safetensors", tensors)
        written = write_whole(file, {name: arrays[name] for name in order.sample(shuffled, len(shuffled))})
        assert len(written) == file.size_bytes
        safetensors.torch.save_file(
            {name: torch.from_numpy(array.astype(np.float32)).to(TORCH[table[name][0]]) for name, array in arrays.items()},
            Path(folder) / "torch",
        )
        safetensors.numpy.save_file(arrays, Path(folder) / "numpy")
        assert written == (Path(folder) / "torch").read_bytes()
        assert written == (Path(folder) / "numpy").read_bytes()
        _, found = open_file(file.path)
        assert {name: np.asarray(tensor.block(whole(tensor.shape))).tobytes() for name, tensor in found.items()} == {
            name: array.tobytes() for name, array in arrays.items()
        }


def test_a_file_is_partial_until_it_is_finished(tmp_path: Path) -> None:
    file = rank_file(tmp_path / "rank0.safetensors", [RankTensor(0, "a", (3, 4), "float16")])
    file.create()
    assert [path.name for path in tmp_path.iterdir()] == ["rank0.safetensors.partial"]
    assert file.partial.stat().st_size == file.size_bytes
    # What nothing is written to is padding, and that is zeros.
    assert file.partial.read_bytes() == file.header + bytes(24)
    file.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["rank0.safetensors"]


def test_a_file_begins_anew_where_one_was_left(tmp_path: Path) -> None:
    file = rank_file(tmp_path / "rank0.safetensors", [RankTensor(0, "a", (4,), "float32")])
    file.partial.write_bytes(b"\xff" * 10_000)
    file.create()
    assert file.partial.read_bytes() == file.header + bytes(16)


@given(
    shapes().flatmap(lambda shape: st.tuples(st.just(shape), regions(shape))),
    st.sampled_from(TYPES),
    st.sampled_from(["contiguous", "strided", "transposed"]),
    st.integers(1, 60),
)
def test_a_delivery_is_an_assignment(case: tuple[tuple[int, ...], Region], kind: str, memory: str, piece_bytes: int) -> None:
    shape, region = case
    part = values(extent(region), kind)
    if memory == "strided":
        part = np.repeat(part, 2, axis=-1)[..., ::2]
    elif memory == "transposed":
        part = np.asfortranarray(part)
    expected = np.zeros(shape, dtype=part.dtype)
    expected[slices(region)] = part
    with tempfile.TemporaryDirectory() as folder:
        file = rank_file(Path(folder) / "rank0.safetensors", [RankTensor(0, "t", shape, kind), RankTensor(0, "u", (3,), kind)])
        file.create()
        placements = [Placement(0, "t", whole(part.shape), region)]
        work = BlockWrite("t", (bound([file], placements, whole(part.shape)),), part.dtype.itemsize, piece_bytes, 1)
        written = write_blocks(7, [work], [[HeldBlock(part, whole(part.shape))]])
        assert (written.number, written.bytes_written) == (7, part.nbytes)
        data = file.partial.read_bytes()
        assert data == file.header + expected.tobytes() + bytes(3 * part.dtype.itemsize)
        # Each run of bytes has the checksum of what it holds, whatever the pieces that it was written in.
        assert sum(checksum.nbytes for checksum in written.checksums) == part.nbytes
        for checksum in written.checksums:
            run = data[checksum.offset : checksum.offset + checksum.nbytes]
            assert xxhash.xxh3_64_hexdigest(run) == checksum.xxh3


def test_an_experts_matrix_goes_into_its_place_in_a_stack(tmp_path: Path) -> None:
    stack, matrix = np.zeros((3, 4, 6), dtype=np.float16), values((2, 3), "float16")
    stack[1, 1:3, 2:5] = matrix
    file = rank_file(tmp_path / "rank0.safetensors", [RankTensor(0, "t", stack.shape, "float16")])
    file.create()
    placements = [Placement(0, "t", whole(matrix.shape), ((1, 2), (1, 3), (2, 5)))]
    write_blocks(0, [BlockWrite("t", (bound([file], placements, whole(matrix.shape)),), 2, 100, 1)], [[block(matrix)]])
    assert file.partial.read_bytes() == file.header + stack.tobytes()


@st.composite
def cuts(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    """An axis cut into intervals."""
    inner = draw(st.sets(st.integers(1, size - 1), max_size=3)) if size > 1 else set()
    edges = [0, *sorted(inner), size]
    return list(itertools.pairwise(edges))


@examples(60)
@given(st.data(), st.sampled_from(TYPES), st.booleans())
def test_blocks_in_any_order_make_the_same_file(data: st.DataObject, kind: str, stacked: bool) -> None:
    """A matrix is cut into a grid of places on two ranks, and comes in blocks of rows and columns, each cut into pieces."""
    shape = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    array, lead = values(shape, kind), ((1, 2),) if stacked else ()
    targets = [np.zeros((*(3,) * stacked, *shape), dtype=array.dtype) for _ in range(2)]
    placements = []
    for index, region in enumerate((rows, columns) for rows in data.draw(cuts(shape[0])) for columns in data.draw(cuts(shape[1]))):
        placements.append(Placement(index % 2, "t", region, (*lead, *region)))
        targets[index % 2][slices((*lead, *region))] = array[slices(region)]
    blocks = [(rows, columns) for rows in data.draw(cuts(shape[0])) for columns in data.draw(cuts(shape[1]))]
    blocks = data.draw(st.permutations(blocks))
    piece_bytes = data.draw(st.integers(1, 200))
    with tempfile.TemporaryDirectory() as folder:
        tensors = [RankTensor(rank, "t", targets[rank].shape, kind) for rank in range(2)]
        files = [rank_file(Path(folder) / f"rank{tensor.rank}.safetensors", [tensor]) for tensor in tensors]
        for file in files:
            file.create()
        for region in blocks:
            work = BlockWrite("t", (bound(files, placements, region),), array.dtype.itemsize, piece_bytes, 1)
            written = write_blocks(0, [work], [[HeldBlock(array, region)]])
            assert written.bytes_written == math.prod(extent(region)) * array.dtype.itemsize
        for file, target in zip(files, targets, strict=True):
            file.finish()
            (read,) = (np.asarray(tensor.block(whole(tensor.shape))) for tensor in open_file(file.path)[1].values())
            assert read.dtype == target.dtype
            assert read.tobytes() == target.tobytes()


def test_padding_is_delivered_nowhere(tmp_path: Path) -> None:
    file = rank_file(tmp_path / "rank0.safetensors", [RankTensor(0, "t", (4, 2), "float16")])
    placements = [Placement(0, "t", ((0, 3), (0, 2)), ((0, 3), (0, 2))), Placement(0, "t", None, ((3, 4), (0, 2)))]
    array = values((3, 2), "float16")
    made = bound([file], placements, whole(array.shape))
    assert len(made) == 1
    file.create()
    write_blocks(0, [BlockWrite("t", (made,), 2, 100, 1)], [[block(array)]])
    assert file.partial.read_bytes() == file.header + array.tobytes() + bytes(4)


def test_a_file_that_is_gone_is_an_os_error(tmp_path: Path) -> None:
    file = rank_file(tmp_path / "rank0.safetensors", [RankTensor(0, "t", (2,), "float16")])
    array = values((2,), "float16")
    made = bound([file], [Placement(0, "t", ((0, 2),), ((0, 2),))], ((0, 2),))
    with pytest.raises(FileNotFoundError):
        write_blocks(0, [BlockWrite("t", (made,), 2, 100, 1)], [[block(array)]])
