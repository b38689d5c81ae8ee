"""read: the bytes of every tensor, unchanged (packed formats stay packed); a slice touches only its own rows.

Each module of this package with a `READER` is a source (`SourceReader`, source_reader.py); others may add theirs, by entry points.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from pipeline.errors import BadInput, Problem
from pipeline.extensions import extensions
from pipeline.tensor.placement import Region, chunk_regions
from pipeline.tensor.tensors import Block, LazyTensor, Source
from stages.read.source_reader import SourceReader

if TYPE_CHECKING:
    import dask.array as da

Name = TypeVar("Name")  # a text, or a TensorName


GROUP = "headrace.sources"


def sources() -> Iterator[SourceReader]:
    """The kinds of checkpoint that can be read, each module imported when it is asked for: our own, then other packages'.

    Where several accept a directory, Hugging Face's own format comes first. Raises BadInput, after our own, where another package's
    is none.
    """
    names = []
    for name in sorted((module.name for module in pkgutil.iter_modules(__path__)), key=lambda name: name != "huggingface"):
        reader: SourceReader | None = getattr(importlib.import_module(f"{__name__}.{name}"), "READER", None)
        if reader is not None:
            names.append(reader.name)
            yield reader
    yield from extensions(GROUP, SourceReader, names)


def find_source(
    model_dir: Path | str | None, meta_ckpt_dir: Path | None, quant_ckpt_path: Path | None, revision: str | None, download: bool
) -> Source:
    """Open what a job names: a path, a model on the Hub, or a Meta directory; and what stands in for its tensors.

    Raises BadInput where it is not there, cannot be read, or is none of what headrace reads.
    """
    try:
        return _find_source(model_dir, meta_ckpt_dir, quant_ckpt_path, revision, download)
    except PermissionError as error:
        raise BadInput([Problem(str(error.filename), "no permission to read it", "a readable checkpoint")]) from None


def _find_source(
    model_dir: Path | str | None, meta_ckpt_dir: Path | None, quant_ckpt_path: Path | None, revision: str | None, download: bool
) -> Source:
    if meta_ckpt_dir:
        from stages.read import meta

        if not _exists(meta_ckpt_dir):
            raise BadInput([Problem(str(meta_ckpt_dir), "no such directory", "a Meta checkpoint")])
        return meta.READER.open_source(meta_ckpt_dir)
    if isinstance(model_dir, str):
        from stages.read import hub

        model_dir = hub.find(model_dir, revision, download)
    assert model_dir is not None, "a job has a source"
    source = open_source(model_dir)
    if quant_ckpt_path:
        from stages.read import beside

        source = beside.open_beside(source, quant_ckpt_path)
    return source


def open_model(model: Any) -> Source:
    """A Hugging Face model in memory. Raises BadInput where it is none, or some of its values are not in memory."""
    from stages.read import live_model

    return live_model.open_model(model)


def open_source(location: Path) -> Source:
    """Open a checkpoint by what it is. Raises BadInput where nothing is there, or nothing that headrace reads."""
    if not _exists(location):
        raise BadInput([Problem(str(location), "no such file or directory", "a checkpoint")])
    titles = []
    for reader in sources():
        if reader.detect(location):
            return reader.open_source(location)
        titles.append(reader.title)
    names = ", ".join(sorted(path.name for path in location.iterdir())[:8]) if location.is_dir() else "another file"
    expected = f"{', '.join(titles[:-1])}, or {titles[-1]}"
    raise BadInput([Problem(str(location), names or "an empty directory", expected)])


def _exists(location: Path) -> bool:
    try:
        return location.exists()
    except OSError:  # a name too long for the file system
        return False


def read(tensors: Mapping[Name, LazyTensor], block_bytes: int, row_multiple: int) -> dict[Name, da.Array]:
    """Every tensor as a Dask array in chunks of at most `block_bytes`, cut at multiples of `row_multiple` rows."""
    return {name: _array(str(name), tensor, block_bytes, row_multiple) for name, tensor in tensors.items()}


def open_block(tensor: LazyTensor, region: Region) -> Block:
    """Run a read task: make a block of a tensor, without touching its bytes."""
    return tensor.block(region)


def _array(name: str, tensor: LazyTensor, block_bytes: int, row_multiple: int) -> da.Array:
    import dask.array as da
    from dask._task_spec import Task

    chunks = chunk_sizes(tensor.shape, tensor.dtype.itemsize, block_bytes, row_multiple)
    key = f"read-{name}"
    graph = {}
    for index, region in chunk_regions(chunks):
        graph[(key, *index)] = Task((key, *index), open_block, tensor, region)
    return da.Array(graph, key, chunks=chunks, meta=np.empty((0,) * len(chunks), dtype=tensor.dtype))


def chunk_sizes(shape: tuple[int, ...], itemsize: int, block_bytes: int, row_multiple: int) -> tuple[tuple[int, ...], ...]:
    """Chunk lengths by axis: rows in multiples of `row_multiple`; a stack is cut between its matrices, then inside them."""
    if not shape or not math.prod(shape):  # nothing to cut, whatever lengths a header claims
        return tuple((n,) for n in shape)
    row_bytes = max(math.prod(shape[1:]) * itemsize, 1)
    if len(shape) > 2 and row_bytes > block_bytes:
        inner = chunk_sizes(shape[1:], itemsize, block_bytes, row_multiple)
        return ((1,) * shape[0], *inner)
    multiple = row_multiple if len(shape) < 3 else 1
    rows = min(max(block_bytes // row_bytes // multiple, 1) * multiple, shape[0])
    full, rest = divmod(shape[0], rows)
    return ((rows,) * full + ((rest,) if rest else ()), *((n,) for n in shape[1:]))
