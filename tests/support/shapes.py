"""Shapes of published models (tests/data/shapes): each as a directory whose headers are true and whose values are holes of a file.

Holes are read as zeros and take no room on the disk, so that a directory of 900 GB takes that of its headers.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.places import DATA

SHARD_BYTES = 5_000_000_000
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "I16": 2, "I32": 4, "U32": 4, "I64": 8}
_RANGES = re.compile(r"\{([0-9,-]+)\}")


@dataclass(frozen=True)
class Held:
    """A tensor of a shape: its name, type by safetensors' name, and what its values are where they say how others lie."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: tuple[Any, ...] = ()

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]

    def bytes(self) -> bytes:
        """The values of a tensor that has some: `seq`/`perm` n: groups of n, in order or mixed; `fill`/`raw`: as given."""
        kind, *rest = self.values
        if kind in ("seq", "perm"):
            groups = np.arange(self.shape[0], dtype=np.int32) // rest[0]
            return (np.random.default_rng(1).permutation(groups) if kind == "perm" else groups).tobytes()
        made = np.full(self.shape, rest[1], rest[0]) if kind == "fill" else np.asarray(rest[1], rest[0]).reshape(self.shape)
        return made.tobytes()


@dataclass(frozen=True)
class Shape:
    """A published model without its values. `extra`: the JSON files beside config.json, by name."""

    name: str
    group: str
    config: Mapping[str, Any]
    extra: Mapping[str, Any]
    rows: Sequence[Sequence[Any]]

    def tensors(self) -> Iterator[Held]:
        """Every tensor; a row's name stands for all that its ranges `{0-31,40}` name."""
        for pattern, dtype, shape, *values in self.rows:
            texts = _RANGES.split(pattern)
            for numbers in product(*map(_numbers, texts[1::2])):
                name = "".join(f"{text}{number}" for text, number in zip(texts[::2], (*numbers, ""), strict=True))
                yield Held(name, dtype, tuple(shape), tuple(values[0]) if values else ())

    def build(self, directory: Path) -> Path:
        """Write it as a directory of safetensors, with an index where it takes several files."""
        directory.mkdir(parents=True)
        for name, content in {"config.json": self.config, **self.extra}.items():
            (directory / name).write_text(json.dumps(content))
        shards: list[list[Held]] = [[]]
        room = SHARD_BYTES
        for tensor in self.tensors():
            if tensor.nbytes > room and shards[-1]:
                shards.append([])
                room = SHARD_BYTES
            shards[-1].append(tensor)
            room -= tensor.nbytes
        if len(shards) == 1:
            _write(directory / "model.safetensors", shards[0])
            return directory
        weight_map = {}
        for number, held in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            _write(directory / file, held)
            weight_map |= dict.fromkeys((tensor.name for tensor in held), file)
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in self.tensors())}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        return directory


@cache
def shapes() -> Mapping[str, Shape]:
    """All shapes by name."""
    with (DATA / "shapes" / "models.jsonl").open() as lines:
        rows = [json.loads(line) for line in lines]
    return {row["name"]: Shape(row["name"], row["group"], row["config"], row["extra"], row["tensors"]) for row in rows}


def _numbers(ranges: str) -> Iterator[int]:
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def _write(path: Path, tensors: Sequence[Held]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(start + end)
        for tensor in tensors:
            if tensor.values:
                os.pwrite(file.fileno(), tensor.bytes(), start + header[tensor.name]["data_offsets"][0])
