"""read: the bytes of every tensor, unchanged, from safetensors in one file or several; a slice touches only its own rows."""

from __future__ import annotations

import math
import mmap
import pickle
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from pipeline.model.dtypes import BY_SAFETENSORS
from pipeline.tensor import mapping
from pipeline.tensor.placement import Region, extent, slices, whole
from stages.read import chunk_sizes, open_source, read
from stages.read.mapped import MappedTensor
from stages.read.safetensors import open_file
from tests.support import checkpoints
from tests.support.examples import examples
from tests.support.lazy import values
from tests.support.strategies import regions, shapes

# The types that the library's NumPy side writes.
TYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")


def random(shape: tuple[int, ...], kind: str, seed: int = 0) -> np.ndarray:
    dtype = BY_SAFETENSORS[kind].numpy
    if kind == "BOOL":
        return np.random.default_rng(seed).integers(0, 2, shape).astype(dtype)
    data = np.random.default_rng(seed).bytes(math.prod(shape) * dtype.itemsize)
    return np.frombuffer(data, dtype=dtype).reshape(shape)


@examples(50)
@given(st.lists(st.tuples(st.sampled_from(TYPES), shapes(least=0)), min_size=1, max_size=5))
def test_bytes_are_unchanged(table: list[tuple[str, tuple[int, ...]]]) -> None:
    arrays = {f"t{n}": random(shape, kind, n) for n, (kind, shape) in enumerate(table)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(arrays, path)
        file, tensors = open_file(path)
        assert file.size_bytes == path.stat().st_size
        assert tensors.keys() == arrays.keys()
        for name, array in arrays.items():
            found = np.asarray(tensors[name].block(whole(array.shape)))
            assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())


@examples(150)
@given(st.data(), shapes(), st.sampled_from(["F32", "BF16", "U8"]), st.integers(0, 9), st.sampled_from([0, 1]))
def test_slices_are_those_of_numpy(data: st.DataObject, shape: tuple[int, ...], kind: str, offset: int, least: int) -> None:
    array = random(shape, kind)
    outer = data.draw(regions(shape, least))
    inner = data.draw(regions(extent(outer), least))
    with tempfile.NamedTemporaryFile() as file:
        # Any offset: nothing in the format aligns a tensor to its type.
        file.write(bytes(offset) + array.tobytes())
        file.flush()
        block = MappedTensor(file.name, offset, shape, array.dtype).block(outer)
        expected = array[slices(outer)][slices(inner)]
        for found in (block.read(inner), np.asarray(block[slices(inner)])):
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert found.tobytes() == expected.tobytes()


@pytest.fixture
def mappings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The (first, behind the last) bytes of every mapping that is made."""
    made: list[tuple[int, int]] = []

    def record(descriptor: int, length: int, *, offset: int = 0, **more: int) -> mmap.mmap:
        made.append((offset, offset + length))
        return mmap.mmap(descriptor, length, offset=offset, **more)

    names = {name: getattr(mmap, name) for name in ("ALLOCATIONGRANULARITY", "ACCESS_READ")}
    monkeypatch.setattr(mapping, "mmap", SimpleNamespace(mmap=record, **names))
    return made


@pytest.mark.parametrize(
    ("shape", "region", "first", "last"),
    [
        ((64, 1024), ((10, 12), (0, 1024)), 10 * 1024, 12 * 1024),
        ((64, 1024), ((63, 64), (5, 6)), 63 * 1024, 64 * 1024),
        ((65536,), ((100, 200),), 100, 200),
        ((4, 16, 1024), ((1, 3), (0, 16), (0, 1024)), 16 * 1024, 48 * 1024),
        # One matrix of a stack: its own rows alone.
        ((4, 16, 1024), ((2, 3), (5, 7), (0, 1024)), 37 * 1024, 39 * 1024),
    ],
)
def test_a_slice_touches_only_its_own_rows(
    shape: tuple[int, ...], region: Region, first: int, last: int, tmp_path: Path, mappings: list[tuple[int, int]]
) -> None:
    array, offset = random(shape, "U8"), 5000
    (tmp_path / "file").write_bytes(bytes(offset) + array.tobytes())
    block = MappedTensor(str(tmp_path / "file"), offset, shape, array.dtype).block(whole(shape))
    assert not mappings, "nothing is mapped until it is read"
    assert block.read(region).tobytes() == array[slices(region)].tobytes()
    ((start, stop),) = mappings
    assert stop == offset + last
    assert 0 <= offset + first - start < mmap.ALLOCATIONGRANULARITY


def test_opening_and_planning_map_nothing(tmp_path: Path, mappings: list[tuple[int, int]]) -> None:
    checkpoints.write(tmp_path, checkpoints.LLAMA, shards=2)
    read(open_source(tmp_path).tensors, 1000, 1)
    assert not mappings


def test_a_tensor_far_larger_than_memory(tmp_path: Path) -> None:
    # A sparse file of 64 GiB: only what is asked for can be touched.
    rows, columns = 1 << 22, 1 << 13
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.seek((rows - 1) * columns * 2)
        file.write(np.arange(columns, dtype=np.uint16).tobytes())
    block = MappedTensor(str(path), 0, (rows, columns), np.dtype(np.uint16)).block(((rows - 100, rows), (0, columns)))
    assert block.read(((99, 100), (3, 6))).tolist() == [[3, 4, 5]]
    assert block.read(((0, 1), (0, 2))).tolist() == [[0, 0]]


def test_a_file_that_became_shorter_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(10))
    block = MappedTensor(str(tmp_path / "file"), 0, (11,), np.dtype(np.uint8)).block(((0, 11),))
    with pytest.raises(OSError, match="shorter"):
        np.asarray(block)
    with pytest.raises(OSError, match="shorter"):
        block.read_into(np.zeros(11, np.uint8))


@examples(50)
@given(data=st.data())
def test_a_run_of_a_file_is_read_into_memory_that_is_there(data: st.DataObject) -> None:
    """What is no run is left as it is, and said not to have been read."""
    shape = data.draw(shapes())
    region = data.draw(regions(shape))
    array = np.arange(math.prod(shape), dtype=np.uint32).reshape(shape)
    wanted = array[slices(region)]
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"front" + array.tobytes())
        file.flush()
        block = MappedTensor(file.name, 5, shape, array.dtype).block(region)
        out = np.full(wanted.nbytes, 7, np.uint8)
        if block.read_into(out):
            assert out.tobytes() == wanted.tobytes()
        else:
            assert not wanted.flags.c_contiguous
            assert np.all(out == 7)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_a_directory_of_shards_is_one_source(shards: int, tmp_path: Path) -> None:
    arrays = checkpoints.write(tmp_path, checkpoints.LLAMA, shards=shards)
    source = open_source(tmp_path)
    assert (source.container, source.architecture, source.dtype) == ("huggingface", "LlamaForCausalLM", "float16")
    assert len(source.files) == shards + 1
    assert source.nbytes == sum(array.nbytes for array in arrays.values())
    assert source.tensors.keys() == arrays.keys()
    for name, array in read(source.tensors, 1000, 4).items():
        assert values(array).tobytes() == arrays[name].tobytes()


def test_shards_without_an_index_are_all_read(tmp_path: Path) -> None:
    arrays = checkpoints.write(tmp_path, checkpoints.LLAMA, shards=3)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert open_source(tmp_path).tensors.keys() == arrays.keys()


def test_tensors_survive_pickling(tmp_path: Path) -> None:
    arrays = checkpoints.write(tmp_path, checkpoints.LLAMA)
    source = pickle.loads(pickle.dumps(open_source(tmp_path)))
    name = "model.norm.weight"
    assert np.asarray(source.tensors[name].block(((0, 64),))).tobytes() == arrays[name].tobytes()


@given(shapes(least=0, longest=40), st.sampled_from([1, 2, 4]), st.integers(1, 2000), st.sampled_from([1, 4, 64]))
def test_chunks_tile_a_tensor_and_obey_the_limit(shape: tuple[int, ...], itemsize: int, limit: int, multiple: int) -> None:
    chunks = chunk_sizes(shape, itemsize, limit, multiple)
    assert tuple(map(sum, chunks)) == shape
    assert all(n > 0 for axis in chunks for n in axis)
    if not shape:
        return
    rows_axis = max(len(shape) - 2, 0)
    # Rows are never cut; of a stack, the matrices are cut only where one is too large.
    assert all(len(axis) == 1 for axis in chunks[rows_axis + 1 :])
    assert all(n % multiple == 0 for n in chunks[rows_axis][:-1])
    largest = math.prod(map(max, chunks)) * itemsize
    assert largest <= limit or (all(max(axis) == 1 for axis in chunks[:rows_axis]) and max(chunks[rows_axis]) <= multiple)


@given(st.data(), shapes(longest=12), st.integers(1, 200), st.sampled_from([1, 4]))
def test_arrays_of_any_chunks_hold_the_tensor(data: st.DataObject, shape: tuple[int, ...], limit: int, multiple: int) -> None:
    array = random(shape, data.draw(st.sampled_from(["F32", "U8"])))
    with tempfile.NamedTemporaryFile() as file:
        file.write(array.tobytes())
        file.flush()
        lazy = read({"t": MappedTensor(file.name, 0, shape, array.dtype)}, limit, multiple)["t"]
        assert (lazy.shape, lazy.dtype) == (array.shape, array.dtype)
        assert values(lazy).tobytes() == array.tobytes()
