"""read, strided tensors: regions of any strides are torch's, and are read through narrow windows of a file."""

from __future__ import annotations

import mmap
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.tensor import mapping
from pipeline.tensor.placement import Region, extent, size, slices, whole
from stages.read import strided
from stages.read.mapped import MappedTensor
from stages.read.strided import StridedTensor, contiguous, span, windows
from stages.read.torch_pickle import open_file
from tests.support.examples import examples
from tests.support.strategies import regions, shapes
from tests.support.torch_files import bits, random, saved


@st.composite
def strided_tensors(draw: st.DrawFn) -> tuple[torch.Tensor, Region]:
    """Any view that torch can make of a storage, and a region of it."""
    shape = draw(shapes(least=0, longest=6))
    strides = tuple(draw(st.sampled_from([0, 1, 2, 3, 7, 30])) for _ in shape)
    offset = draw(st.integers(0, 9))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.float8_e5m2]))
    base = random((offset + span(shape, strides) + draw(st.integers(0, 3)),), dtype)
    return base.as_strided(shape, strides, offset), draw(regions(shape))


@examples(300)
@given(st.data(), strided_tensors(), st.booleans(), st.sampled_from([4, 16, 64, 300, strided.WINDOW_BYTES]))
def test_regions_of_any_strides_are_those_of_torch(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, made: tuple[torch.Tensor, Region], zipped: bool, window: int
) -> None:
    tensor, outer = made
    path = saved(tmp_path_factory.getbasetemp() / "strided.bin", {"t": tensor, "other": torch.ones(3)}, zipped=zipped)
    _, tensors = open_file(path)
    assert isinstance(tensors["t"], MappedTensor if tensor.is_contiguous() else StridedTensor)
    inner = data.draw(regions(extent(outer)))
    with mock.patch.object(strided, "WINDOW_BYTES", window):
        block = tensors["t"].block(outer)
        assert np.asarray(block).tobytes() == bits(tensor[slices(outer)])
        found = block.read(inner)
    expected = tensor[slices(outer)][slices(inner)]
    assert found.shape == tuple(expected.shape)
    assert found.tobytes() == bits(expected)


@given(shapes(least=0, longest=6), st.data())
def test_what_is_contiguous_is_what_torch_says(shape: tuple[int, ...], data: st.DataObject) -> None:
    shape = tuple(data.draw(st.sampled_from([0, n, n])) for n in shape)
    strides = tuple(data.draw(st.sampled_from([1, 1, 2, 5, 6])) for _ in shape)
    tensor = torch.zeros(500).as_strided(shape, strides)
    for made in (tensor, torch.zeros(shape), torch.zeros(shape).T if len(shape) == 2 else tensor):
        assert contiguous(made.shape, made.stride()) == made.is_contiguous()


@given(st.data(), shapes(longest=8), st.integers(1, 200))
def test_windows_tile_a_region_and_are_narrow(data: st.DataObject, shape: tuple[int, ...], limit: int) -> None:
    strides = tuple(data.draw(st.integers(0, 60)) for _ in shape)
    region = data.draw(regions(shape))
    seen = np.zeros(shape, int)
    for part in windows(region, strides, limit):
        seen[slices(part)] += 1
        assert span(extent(part), strides) <= limit or size(part) == 1
    assert seen.sum() == size(region)
    assert (seen[slices(region)] == 1).all()


def test_a_strided_tensor_far_larger_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A sparse file of 64 GiB: only narrow windows of it may be mapped, whatever they span together.
    longest = 0

    def record(descriptor: int, length: int, **more: int) -> mmap.mmap:
        nonlocal longest
        longest = max(longest, length)
        return mmap.mmap(descriptor, length, **more)

    names = {name: getattr(mmap, name) for name in ("ALLOCATIONGRANULARITY", "ACCESS_READ")}
    monkeypatch.setattr(mapping, "mmap", SimpleNamespace(mmap=record, **names))
    rows, columns = 1 << 22, 1 << 13
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.seek((rows - 1) * columns * 2)
        file.write(np.arange(columns, dtype=np.uint16).tobytes())
    block = StridedTensor(str(path), 0, (columns, rows), np.dtype(np.uint16), (1, columns)).block(whole((columns, rows)))
    assert not longest, "nothing is mapped until it is read"
    found = block.read(((3, 6), (rows - 1000, rows)))
    assert found[:, -1].tolist() == [3, 4, 5]
    assert not found[:, :-1].any()
    assert longest <= strided.WINDOW_BYTES + mmap.ALLOCATIONGRANULARITY


def test_a_strided_file_that_became_shorter_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(10))
    block = StridedTensor(str(tmp_path / "file"), 0, (4, 3), np.dtype(np.uint8), (1, 4)).block(whole((4, 3)))
    with pytest.raises(OSError, match="shorter"):
        np.asarray(block)
