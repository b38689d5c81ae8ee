"""The local image of a checkpoint at a URL: its small files whole, and files of weights that are empty but for their headers."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast
from urllib.parse import urlsplit

from pipeline.documents import parse_json, read_object
from pipeline.errors import BadInput, Problem
from stages.read.gguf_config import READ
from stages.read.gguf_header import read_header
from stages.read.object_store import Object, fetch_range, head, listed
from stages.read.quantizer import FILES as QUANTIZERS

WEIGHTS = (".safetensors", ".gguf")
UNREAD = (".bin", ".pth", ".pt")
SMALL_BYTES = 64 << 20  # of a file that is fetched whole
FIRST_BYTES = 1 << 20  # of a header, fetched at once
MAX_HEADER_BYTES = 100_000_000  # of safetensors, as its library has it
INDEX = "model.safetensors.index.json"
# What a server without listings is asked for.
NAMES = ("config.json", "generation_config.json", *QUANTIZERS, "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
         "special_tokens_map.json", "chat_template.jinja", INDEX)  # fmt: skip
IMAGE = "headrace-image.json"


def make_image(url: str, directory: Path, objects: list[Object]) -> int:
    """Make or bring up to date the local image of a checkpoint; returns how many bytes were fetched for it."""
    directory.mkdir(parents=True, exist_ok=True)
    known, fetched = read_object(directory / IMAGE), 0
    names = {each.name for each in objects}
    for path in directory.iterdir():
        if path.name not in names and path.name != IMAGE and not path.name.startswith("."):  # another process's
            path.unlink(missing_ok=True)
    made = {}
    for each in objects:
        path, mark = directory / each.name, [each.size_bytes, each.mtime, each.etag]
        if known.get(each.name) != mark or not path.exists() or not each.etag:
            new = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
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


def checkpoint_files(url: str) -> list[Object]:
    """The files of a checkpoint, without what lies deeper. Raises BadInput where there is none, or none that can be read."""
    objects = _asked(url) if urlsplit(url).scheme in ("http", "https") else listed(url)
    weights = [each for each in objects if each.name.endswith(WEIGHTS)]
    if not weights and any(each.name.endswith(UNREAD) for each in objects):
        raise BadInput(
            [Problem(url, "weights in .bin or .pth files", "safetensors or GGUF, which are read by ranges", copied(url))]
        )
    if not weights:
        names = ", ".join(sorted(each.name for each in objects)[:8]) or "nothing"
        raise BadInput([Problem(url, names, "a checkpoint of safetensors or GGUF")])
    return [each for each in objects if each.name.endswith(WEIGHTS) or each.size_bytes <= SMALL_BYTES]


def _asked(url: str) -> list[Object]:
    """The files at a web server, which has no listing: those with the usual names, and the shards that an index names."""
    found = {name: each for name in NAMES if (each := head(url, name))}
    if INDEX in found:
        said = parse_json(bytes(fetch_range(url, INDEX, 0, found[INDEX].size_bytes, found[INDEX].etag)))
        placed = said.get("weight_map") if isinstance(said, dict) else None
        if not isinstance(placed, dict):
            raise BadInput([Problem(f"{url}/{INDEX}", "no weight_map", "the file of each tensor, by its name")])
        shards = sorted(map(str, set(placed.values())))
    else:
        shards = ["model.safetensors"]
    for name in shards:
        found[name] = existing_object(url, name)
    return list(found.values())


def existing_object(url: str, name: str) -> Object:
    """An object that must be there, as its server describes it. Raises BadInput where it is not."""
    found = head(url, name) if re.fullmatch(r"[\w.-]+", name) else None
    if found is None:
        raise BadInput([Problem(f"{url}/{name}", "no such file", "every file of weights")])
    return found


def copied(url: str) -> str:
    """The advice about what is not read by ranges."""
    return f"Copy {url} to a disk, and convert it there"
