"""read: the bytes of every tensor, unchanged (packed formats stay packed); a slice touches only its own rows.

Each module of this package with a `READER` is a source (`SourceReader`, source_reader.py); others may add theirs, by entry points.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pipeline.errors import BadInput, Problem
from pipeline.extensions import extensions
from pipeline.tensor.arrays import BlockArray, Index, Maker, grid
from pipeline.tensor.placement import Region
from pipeline.tensor.tensors import Block, LazyTensor, Source
from stages.read.source_reader import SourceReader
from stages.read.text_part import text_part
from stages.read.unread_containers import unread_container
from stages.read.wrapped_names import unwrapped

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
        _check_container(meta_ckpt_dir)
        return _model(meta.READER.open_source(meta_ckpt_dir))
    if isinstance(model_dir, str) and "://" in model_dir:
        from stages.read import remote

        return _model(remote.open_remote(model_dir, open_source))
    if isinstance(model_dir, str):
        from stages.read import hub

        model_dir = hub.find(model_dir, revision, download)
    assert model_dir is not None, "a job has a source"
    source = _model(open_source(model_dir))
    if quant_ckpt_path:
        from stages.read import beside

        source = beside.open_beside(source, quant_ckpt_path)
    return source


def _model(source: Source) -> Source:
    """A source as the model that is converted: its text alone, under its family's own names."""
    model = unwrapped(text_part(source))
    return model if model.tensors is source.tensors else replace(model, called=_called(model, source.tensors))


def _called(model: Source, tensors: Mapping[str, LazyTensor]) -> dict[str, str]:
    """The names of modules in the checkpoint, where others are theirs in the model. `tensors`: by the checkpoint's names."""
    names = {id(tensor): name for name, tensor in tensors.items()}
    result = {}
    for name, tensor in model.named.items():
        there = names.get(id(tensor), "") if tensors.get(str(name)) is not tensor else ""
        if there.endswith(f".{name.parameter}"):  # not a stack of experts, which has no name of a module there
            result[name.module] = there.removesuffix(f".{name.parameter}")
    return result


def open_model(model: Any) -> Source:
    """A Hugging Face model in memory. Raises BadInput where it is none, or some of its values are not in memory."""
    from stages.read import live_model

    return _model(live_model.open_model(model))


def open_source(location: Path) -> Source:
    """Open a checkpoint by what it is. Raises BadInput where nothing is there, or nothing that headrace reads."""
    if not _exists(location):
        raise BadInput([Problem(str(location), "no such file or directory", "a checkpoint")])
    _check_container(location)
    titles = []
    for reader in sources():
        if reader.detect(location):
            return reader.open_source(location)
        titles.append(reader.title)
    names = ", ".join(sorted(path.name for path in location.iterdir())[:8]) if location.is_dir() else "another file"
    expected = f"{', '.join(titles[:-1])}, or {titles[-1]}"
    raise BadInput([Problem(str(location), names or "an empty directory", expected)])


def _check_container(location: Path) -> None:
    problem = unread_container(location)
    if problem:
        raise BadInput([problem])


def _exists(location: Path) -> bool:
    try:
        return location.exists()
    except OSError:  # a name too long for the file system
        return False


def read(tensors: Mapping[Name, LazyTensor], block_bytes: int, row_multiple: int) -> dict[Name, BlockArray]:
    """Every tensor as an array in chunks of at most `block_bytes`, cut at multiples of `row_multiple` rows."""
    return {name: ReadArray(name, tensor, block_bytes, row_multiple) for name, tensor in tensors.items()}


class ReadArray(BlockArray):
    """A tensor of a source, cut into blocks."""

    __slots__ = ("label", "tensor")

    def __init__(self, label: object, tensor: LazyTensor, block_bytes: int, row_multiple: int) -> None:
        cut = grid(chunk_sizes(tuple(tensor.shape), tensor.dtype.itemsize, block_bytes, row_multiple))
        super().__init__(cut, tensor.dtype)
        self.label, self.tensor = label, tensor

    @property
    def by_rows(self) -> bool:
        return getattr(self.tensor, "by_rows", False)

    def naming(self) -> str:
        return f"read-{self.label}"

    def make(self, index: Index) -> Maker:
        return OpenBlock(self.tensor, self.grid.regions[index])


class OpenBlock(NamedTuple):
    """Makes a block of a tensor, without touching its bytes."""

    tensor: LazyTensor
    region: Region

    @property
    def stage(self) -> str:
        """The stage that a source is opened in."""
        return "read"

    def __call__(self) -> Block:
        return self.tensor.block(self.region)


@lru_cache(maxsize=1 << 12)
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
