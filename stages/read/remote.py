"""Checkpoints in object storage and on web servers: their headers here, their tensors by ranges of bytes, where they are needed.

A checkpoint at a URL is opened by a local image of it: its small files whole, and each file of weights as an empty file of its
size with nothing but its header in it. So everything that opens a directory opens it, while planning takes a few MB. The tensors
are then ranges of the objects themselves. Each range is asked for on the condition that the object is still the one that was
opened: an object that is written anew ends the run.

    s3://bucket/llama    gs://bucket/llama    az://container/llama    https://host/llama    hf://org/name@revision

Credentials come from the environment, or from where the provider's own tools take them, and are never written anywhere.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from pipeline.errors import BadInput, Problem
from pipeline.tensor.metering import meter
from pipeline.tensor.placement import Region, ends
from pipeline.tensor.source_file import SourceFile
from pipeline.tensor.store_requests import said
from pipeline.tensor.tensors import Block, Source
from pipeline.urls import NO_SECRET, holds_secret, shown
from stages.read.gguf import part_names
from stages.read.mapped import MappedBlock, MappedTensor
from stages.read.object_store import Object, fetch_range, listed
from stages.read.read_ahead import ReadAhead
from stages.read.remote_image import SMALL_BYTES, WEIGHTS, checkpoint_files, copied, existing_object, make_image

SCHEMES = ("s3", "gs", "az", "http", "https", "hf")


@dataclass(frozen=True, slots=True)
class RemoteTensor(MappedTensor):
    """`shape` elements of `dtype` in C order, from byte `offset` of an object; `path` is its name below `url`."""

    url: str = ""
    etag: str = ""

    def block(self, region: Region) -> Block:
        return RemoteBlock(self, region)

    def viewed(self, shape: tuple[int, ...], dtype: np.dtype) -> RemoteTensor:
        return replace(self, shape=shape, dtype=dtype)


class RemoteBlock(MappedBlock):
    """A region of a RemoteTensor; nothing is fetched until it is read, then some pieces ahead of those that are asked for."""

    __slots__ = ("_ahead",)
    tensor: RemoteTensor

    def __init__(self, tensor: RemoteTensor, region: Region) -> None:
        super().__init__(tensor, region)
        self._ahead: ReadAhead | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteBlock, (self.tensor, self.region)

    def read_into(self, out: np.ndarray) -> bool:  # noqa: ARG002
        return False  # its path is no file here

    def _map(self, first: int, count: int) -> np.ndarray:
        tensor = self.tensor
        start, nbytes = tensor.offset + first * tensor.dtype.itemsize, count * tensor.dtype.itemsize
        with meter(tensor.stage, nbytes):
            return np.frombuffer(self._fetch(start, start + nbytes), np.uint8).view(tensor.dtype)

    def _fetch(self, start: int, end: int) -> Any:
        """The bytes [start, end) of the object."""
        tensor = self.tensor
        fetch = partial(_range, tensor.url, tensor.path, tensor.etag)
        last = tensor.offset + ends(tensor.shape, self.region)[1] * tensor.dtype.itemsize
        if end >= last and self._ahead is None:
            return fetch(start, end)  # the whole of what is left, as of small tensors
        ahead = self._ahead
        if ahead is None:
            ahead = self._ahead = ReadAhead(fetch, last)
        elif ahead.owner != threading.get_ident():
            return fetch(start, end)
        return ahead.read(start, end)


@dataclass(frozen=True)
class RemoteFile:
    """A small object below a URL, such as a tokenizer's file: whoever copies it asks for it."""

    url: str
    object: Object

    @property
    def name(self) -> str:
        return self.object.name

    def read_bytes(self) -> bytes:
        """All of it. Raises SourceChanged where it is another object now, and OSError where it cannot be read."""
        found = self.object
        return bytes(fetch_range(self.url, found.name, 0, found.size_bytes, found.etag)) if found.size_bytes else b""


def _with_etag(file: SourceFile, etag: str) -> SourceFile:
    """A file of an image as its object is known: by its ETag, too, as not every server says when an object was written."""
    known = f"{file.header_sha256} {etag}"
    return replace(file, seen=None, header_sha256=hashlib.sha256(known.encode()).hexdigest() if etag else file.header_sha256)


def _range(url: str, name: str, etag: str, start: int, end: int) -> Any:
    return fetch_range(url, name, start, end, etag)


def open_remote(url: str, open_source: Callable[[Path], Source]) -> Source:
    """Open the checkpoint at a URL. `open_source` opens a local directory.

    Raises BadInput where the URL is of no kind that is read, nothing is there, or it cannot be opened.
    """
    _check(url)
    url = _resolved(url) if url.startswith("hf://") else url.rstrip("/")
    # By its own address: an image has nothing but the model's files, and another model may be opened meanwhile.
    directory = _cache() / hashlib.sha256(url.encode()).hexdigest()[:24]
    url, _, single = url.rpartition("/") if url.endswith(".gguf") else (url, "", "")
    try:
        objects = [existing_object(url, name) for name in part_names(single)] if single else checkpoint_files(url)
        fetched = make_image(url, directory, objects)
    except (OSError, ValueError, ImportError) as error:
        raise BadInput([Problem(url, said(error), "a checkpoint that can be read")]) from None
    try:
        source = open_source(directory / single if single else directory)
    except BadInput as error:  # of the object, and not of its image
        raise BadInput([replace(each, subject=each.subject.replace(str(directory), url)) for each in error.problems]) from None
    etags = {str(directory / each.name): each for each in objects}
    tensors = {}
    for name, tensor in source.tensors.items():
        if not isinstance(tensor, MappedTensor):
            raise BadInput(
                [Problem(f"{url}: {name}", "a tensor that is put together of others", "one range of bytes", copied(url))]
            )
        found = etags[tensor.path]
        values = (tensor.offset, tensor.shape, tensor.dtype, tensor.stage)
        tensors[name] = RemoteTensor(found.name, *values, url=url, etag=found.etag)
    files = tuple(_with_etag(file, etags[str(file.path)].etag) for file in source.files)
    beside = {each.name: each for each in objects}
    companions = tuple(RemoteFile(url, beside[path.name]) for path in source.companions)
    weights = [each for each in objects if each.name.endswith(WEIGHTS)]
    unsure = "" if all(each.etag for each in weights) else "; its server gives no ETags, so that changes meanwhile go unnoticed"
    note = (
        f"{url}: {fetched:,} bytes of configuration and headers were read of {sum(each.size_bytes for each in objects):,}{unsure}"
    )
    place = f"{url}/{single}" if single else url
    config_name = source.config_name.replace(str(directory), url)
    notes = (*source.notes, note)
    return replace(source, tensors=tensors, files=files, companions=companions, url=place, config_name=config_name, notes=notes)


def image_of(url: str) -> tuple[Path, list[Object]]:
    """The local image of what lies below a URL: small files whole, those of weights empty but for their headers; and its objects.

    Raises BadInput where it cannot be read.
    """
    _check(url)
    directory = _cache() / hashlib.sha256(url.encode()).hexdigest()[:24]
    try:
        objects = [each for each in listed(url) if each.name.endswith(WEIGHTS) or each.size_bytes <= SMALL_BYTES]
        make_image(url, directory, objects)
    except (OSError, ValueError, ImportError) as error:
        raise BadInput([Problem(url, said(error), "a checkpoint that can be read")]) from None
    return directory, objects


def remote_tensor(tensor: MappedTensor, url: str, etags: Mapping[str, str]) -> RemoteTensor:
    """A tensor of an image as ranges of its object. `etags`: by the object's name below the URL."""
    name = Path(tensor.path).name
    return RemoteTensor(name, tensor.offset, tensor.shape, tensor.dtype, tensor.stage, url=url, etag=etags[name])


def _resolved(url: str) -> str:
    """The address of a model's files on the Hub, at the commit that a revision is now, so that nothing changes meanwhile."""
    from huggingface_hub import HfApi, constants

    name, _, revision = url.removeprefix("hf://").strip("/").partition("@")
    try:
        commit = HfApi().model_info(name, revision=revision or None, timeout=constants.HF_HUB_ETAG_TIMEOUT).sha
    except Exception as error:  # of the library or the network, whose text names no token
        raise BadInput([Problem(url, f"{type(error).__name__}", "a model on the Hub that can be read")]) from None
    return f"{constants.ENDPOINT}/{name}/resolve/{commit}"


def _check(url: str) -> None:
    if holds_secret(url):
        raise BadInput([Problem(f"--model_dir {shown(url)}", "a URL with a secret in it", NO_SECRET)])
    scheme = urlsplit(url).scheme
    if scheme not in SCHEMES:
        raise BadInput([Problem(f"--model_dir {scheme}://...", "a URL of no kind that is read", f"one of {', '.join(SCHEMES)}")])
    try:
        import obstore  # noqa: F401
    except ModuleNotFoundError:
        raise BadInput([Problem(url, "no package obstore", "it installed", "Run pip install 'headrace[s3]'")]) from None


def _cache() -> Path:
    """Where images are: by the XDG Base Directory Specification."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    place = (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "headrace/remote"
    place.mkdir(parents=True, exist_ok=True)
    place.chmod(0o700)
    return place
