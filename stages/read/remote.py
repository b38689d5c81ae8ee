"""Checkpoints in object storage and on web servers: their headers here, their tensors by ranges of bytes, where they are needed.

A checkpoint at a URL is opened by a local image of it: its small files whole, and each file of weights as an empty file of its
size with nothing but its header in it. So everything that opens a directory opens it, while planning takes a few MB. The tensors
are then ranges of the objects themselves. Each range is asked for on the condition that the object is still the one that was
opened: an object that is written anew ends the run.

    s3://bucket/llama    gs://bucket/llama    az://account/container/llama    https://host/llama    hf://org/name@revision

Credentials come from the environment, or from where the provider's own tools take them, and are never written anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit

import numpy as np

from pipeline.documents import parse_json, read_object
from pipeline.errors import BadInput, Problem, SourceChanged
from pipeline.tensor.metering import meter
from pipeline.tensor.placement import Region
from pipeline.tensor.tensors import Block, Source
from stages.read.gguf import part_names
from stages.read.gguf_config import READ
from stages.read.gguf_header import read_header
from stages.read.mapped import MappedBlock, MappedTensor

SCHEMES = ("s3", "gs", "az", "http", "https", "hf")
WEIGHTS = (".safetensors", ".gguf")
UNREAD = (".bin", ".pth", ".pt")
SMALL_BYTES = 64 << 20  # of a file that is fetched whole
FIRST_BYTES = 1 << 20  # of a header, fetched at once
MAX_HEADER_BYTES = 100_000_000  # of safetensors, as its library has it
INDEX = "model.safetensors.index.json"
# What a server without listings is asked for.
NAMES = ("config.json", "generation_config.json", "quantize_config.json", "hf_quant_config.json", "tokenizer.json",
         "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "chat_template.jinja", INDEX)  # fmt: skip
ATTEMPTS, FIRST_PAUSE_SECONDS = 6, 0.5
IMAGE = "headrace-image.json"

T = TypeVar("T")


@dataclass(frozen=True)
class Object:
    """An object as it was when the checkpoint was opened. `etag`: "" where its server has none."""

    name: str
    size_bytes: int
    mtime: float
    etag: str


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
    """A region of a RemoteTensor; nothing is fetched until it is read."""

    __slots__ = ()
    tensor: RemoteTensor

    def read_into(self, out: np.ndarray) -> bool:  # noqa: ARG002
        return False  # its path is no file here

    def _map(self, first: int, count: int) -> np.ndarray:
        tensor = self.tensor
        start, nbytes = tensor.offset + first * tensor.dtype.itemsize, count * tensor.dtype.itemsize
        with meter(tensor.stage, nbytes):
            data = fetch_range(tensor.url, tensor.path, start, start + nbytes, tensor.etag)
            return np.frombuffer(data, np.uint8).view(tensor.dtype)


def is_remote(place: object) -> bool:
    """Whether this is a URL of a kind that is read here."""
    return isinstance(place, str) and "://" in place


def open_remote(url: str, open_source: Callable[[Path], Source]) -> Source:
    """Open the checkpoint at a URL. `open_source` opens a local directory.

    Raises BadInput where the URL is of no kind that is read, nothing is there, or it cannot be opened.
    """
    _check(url)
    url = _resolved(url) if url.startswith("hf://") else url.rstrip("/")
    url, _, single = url.rpartition("/") if url.endswith(".gguf") else (url, "", "")
    directory = _cache() / hashlib.sha256(url.encode()).hexdigest()[:24]
    try:
        objects = [_existing(url, name) for name in part_names(single)] if single else _listed(url)
        fetched = _image(url, directory, objects)
    except (OSError, ValueError, ImportError) as error:
        raise BadInput([Problem(url, _said(error), "a checkpoint that can be read")]) from None
    try:
        source = open_source(directory / single if single else directory)
    except BadInput as error:  # of the object, and not of its image
        raise BadInput([replace(each, subject=each.subject.replace(str(directory), url)) for each in error.problems]) from None
    etags = {str(directory / each.name): each for each in objects}
    tensors = {}
    for name, tensor in source.tensors.items():
        if not isinstance(tensor, MappedTensor):
            raise BadInput(
                [Problem(f"{url}: {name}", "a tensor that is put together of others", "one range of bytes", _copied(url))]
            )
        found = etags[tensor.path]
        values = (tensor.offset, tensor.shape, tensor.dtype, tensor.stage)
        tensors[name] = RemoteTensor(found.name, *values, url=url, etag=found.etag)
    files = tuple(replace(file, seen=None) for file in source.files)
    weights = [each for each in objects if each.name.endswith(WEIGHTS)]
    unsure = "" if all(each.etag for each in weights) else "; its server gives no ETags, so that changes meanwhile go unnoticed"
    note = (
        f"{url}: {fetched:,} bytes of configuration and headers were read of {sum(each.size_bytes for each in objects):,}{unsure}"
    )
    place = f"{url}/{single}" if single else url
    config_name = source.config_name.replace(str(directory), url)
    return replace(source, tensors=tensors, files=files, url=place, config_name=config_name, notes=(*source.notes, note))


def fetch_range(url: str, name: str, start: int, end: int, etag: str) -> Any:
    """The bytes [start, end) of an object below a URL, as a buffer, if it still has this ETag ("": whatever it has).

    Raises SourceChanged where it has another, and OSError where it cannot be read after ATTEMPTS.
    """
    import obstore
    from obstore.exceptions import NotFoundError, PreconditionError

    options: Any = {"range": (start, end), **({"if_match": etag} if etag else {})}
    try:
        data = _again(lambda: obstore.get(_store(url), name, options=options).bytes(), f"{url}/{name}")
    except (PreconditionError, NotFoundError):
        raise SourceChanged([f"{url}/{name} (another object than the one that was opened)"]) from None
    if len(data) != end - start:
        raise SourceChanged([f"{url}/{name} ({len(data):,} bytes from {start:,}, not {end - start:,})"])
    return data


def _image(url: str, directory: Path, objects: list[Object]) -> int:
    """Make or bring up to date the local image of a checkpoint; returns how many bytes were fetched for it."""
    directory.mkdir(parents=True, exist_ok=True)
    known, fetched = read_object(directory / IMAGE), 0
    names = {each.name for each in objects}
    for path in directory.iterdir():
        if path.name not in names and path.name != IMAGE:
            path.unlink()
    made = {}
    for each in objects:
        path, mark = directory / each.name, [each.size_bytes, each.mtime, each.etag]
        if known.get(each.name) != mark or not path.exists() or not each.etag:
            new = path.with_name(f".{path.name}.new")
            with new.open("wb") as file:
                for start, data in _beginnings(url, each):
                    fetched += len(data)
                    file.seek(start)
                    file.write(data)
                file.truncate(each.size_bytes)
            os.utime(new, (each.mtime, each.mtime))
            new.replace(path)
        made[each.name] = mark
    (directory / IMAGE).write_text(json.dumps(made))
    return fetched


def _beginnings(url: str, each: Object) -> Iterator[tuple[int, bytes]]:
    """Fetch what opening an object needs of it, with its places: all of a small file, of one of weights the header.

    Of GGUF also the rotary factors, which are part of the configuration.
    """
    if not each.name.endswith(WEIGHTS):
        if each.size_bytes:
            yield 0, bytes(fetch_range(url, each.name, 0, each.size_bytes, each.etag))
        return
    file = _Beginning(url, each)
    if each.name.endswith(".gguf"):
        header = read_header(Path(each.name), cast("BinaryIO", file), each.size_bytes)
        yield 0, header.text
        for tensor in header.tensors:
            if tensor.name in READ and tensor.nbytes <= FIRST_BYTES:
                yield tensor.offset, bytes(fetch_range(url, each.name, tensor.offset, tensor.offset + tensor.nbytes, each.etag))
        return
    length = int.from_bytes(file.read(8), "little")
    yield 0, file.data[:8] + file.read(min(length, MAX_HEADER_BYTES))


class _Beginning:
    """The beginning of an object as a file that is read from the front, fetched as far as it is read."""

    def __init__(self, url: str, each: Object) -> None:
        self.url, self.each, self.data, self.at = url, each, b"", 0

    def read(self, size: int) -> bytes:
        """The next bytes; fewer at the end."""
        end = min(self.at + size, self.each.size_bytes)
        if end > len(self.data):
            more = min(max(end, len(self.data) + FIRST_BYTES), self.each.size_bytes)
            self.data += bytes(fetch_range(self.url, self.each.name, len(self.data), more, self.each.etag))
        self.at, start = end, self.at
        return self.data[start:end]


def _listed(url: str) -> list[Object]:
    """The files of a checkpoint, without what lies deeper. Raises BadInput where there is none, or none that can be read."""
    import obstore

    if urlsplit(url).scheme in ("http", "https"):
        objects = _asked(url)
    else:
        found = _again(lambda: obstore.list_with_delimiter(_store(url)), url)["objects"]
        objects = [_object(each) for each in found]
    weights = [each for each in objects if each.name.endswith(WEIGHTS)]
    if not weights and any(each.name.endswith(UNREAD) for each in objects):
        raise BadInput(
            [Problem(url, "weights in .bin or .pth files", "safetensors or GGUF, which are read by ranges", _copied(url))]
        )
    if not weights:
        names = ", ".join(sorted(each.name for each in objects)[:8]) or "nothing"
        raise BadInput([Problem(url, names, "a checkpoint of safetensors or GGUF")])
    return [each for each in objects if each.name.endswith(WEIGHTS) or each.size_bytes <= SMALL_BYTES]


def _asked(url: str) -> list[Object]:
    """The files at a web server, which has no listing: those with the usual names, and the shards that an index names."""
    found = {name: each for name in NAMES if (each := _head_of(url, name))}
    if INDEX in found:
        said = parse_json(bytes(fetch_range(url, INDEX, 0, found[INDEX].size_bytes, found[INDEX].etag)))
        shards = sorted({str(name) for name in said["weight_map"].values()}) if isinstance(said, dict) else []
    else:
        shards = ["model.safetensors"]
    for name in shards:
        found[name] = _existing(url, name)
    return list(found.values())


def _existing(url: str, name: str) -> Object:
    """An object that must be there, as its server describes it. Raises BadInput where it is not."""
    found = _head_of(url, name) if re.fullmatch(r"[\w.-]+", name) else None
    if found is None:
        raise BadInput([Problem(f"{url}/{name}", "no such file", "every file of weights")])
    return found


def _head_of(url: str, name: str) -> Object | None:
    """An object, as its server describes it; None where there is none."""
    import obstore

    try:
        return _object(_again(lambda: obstore.head(_store(url), name), f"{url}/{name}"))
    except FileNotFoundError:
        return None


def _object(said: Any) -> Object:
    return Object(said["path"].rpartition("/")[2], int(said["size"]), said["last_modified"].timestamp(), said.get("e_tag") or "")


def _again(work: Callable[[], T], what: str) -> T:
    """The result of a request, which is made again, after longer and longer waits, where that may help."""
    from obstore.exceptions import BaseError, NotFoundError, PermissionDeniedError, PreconditionError, UnauthenticatedError

    for attempt in range(ATTEMPTS):
        try:
            return work()
        except (NotFoundError, PreconditionError):
            raise
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise PermissionError(13, f"no permission to read it ({_said(error)})", what) from None
        except BaseError as error:
            if attempt + 1 == ATTEMPTS:
                raise OSError(5, f"{_said(error)}, {ATTEMPTS} times", what) from None
            time.sleep(FIRST_PAUSE_SECONDS * 2**attempt)
    raise AssertionError


@lru_cache(64)
def _store(url: str) -> Any:
    """The store at a URL, once a process; it makes requests again itself where a server is busy (5xx) or gone for a moment."""
    from obstore.store import HTTPStore, from_url

    options: Any = {"timeout": "120s", "connect_timeout": "20s"}
    retries: Any = {"max_retries": 8, "retry_timeout": timedelta(seconds=120)}
    parts = urlsplit(url)
    if parts.scheme in ("http", "https"):
        if parts.scheme == "http":
            options["allow_http"] = True
        if token := _hub_token(url):
            options["default_headers"] = {"Authorization": f"Bearer {token}"}
        return HTTPStore.from_url(url, client_options=options, retry_config=retries)
    if parts.scheme == "s3" and os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        options["allow_http"] = True
    return from_url(url, client_options=options, retry_config=retries)


def _resolved(url: str) -> str:
    """The address of a model's files on the Hub, at the commit that a revision is now, so that nothing changes meanwhile."""
    from huggingface_hub import HfApi, constants

    name, _, revision = url.removeprefix("hf://").strip("/").partition("@")
    try:
        commit = HfApi().model_info(name, revision=revision or None).sha
    except Exception as error:  # of the library or the network, whose text names no token
        raise BadInput([Problem(url, f"{type(error).__name__}", "a model on the Hub that can be read")]) from None
    return f"{constants.ENDPOINT}/{name}/resolve/{commit}"


def _hub_token(url: str) -> str:
    """The token of the Hub, for its own address alone."""
    from huggingface_hub import constants, get_token

    return (get_token() or "") if url.startswith(f"{constants.ENDPOINT}/") else ""


def _check(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise BadInput(
            [Problem(f"--model_dir {parts.scheme}://...", "a URL of no kind that is read", f"one of {', '.join(SCHEMES)}")]
        )
    if parts.username or parts.query or parts.fragment:
        expected = "a URL without a user, password or query: credentials come from the environment"
        raise BadInput([Problem(f"--model_dir {parts.scheme}://...", "a URL with a secret in it", expected)])
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


def _copied(url: str) -> str:
    return f"Copy {url} to a disk, and convert it there"


def _said(error: Exception) -> str:
    """The first line of an error, without addresses, which may be signed."""
    return re.sub(r"https?://\S+", "...", str(error).splitlines()[0] if str(error) else type(error).__name__)[:300]
