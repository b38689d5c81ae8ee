"""PyTorch files made by hand, in both formats, of values that torch itself would not save; and the problems of such a file.

Each case is shown to the reader; the command line, which says what the reader raises, is shown one of each format.
"""

from __future__ import annotations

import collections
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import BadInput
from stages.read import torch_pickle
from tests.support import checkpoints
from tests.support.commands import one, tree

FILE = "pytorch_model.bin"
FLOATS = np.arange(12, dtype=np.float32).tobytes()
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
SYSTEM = {"protocol_version": PROTOCOL, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


def state_dict() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in checkpoints.values(checkpoints.LLAMA).items()}


class Storage:
    """Pickled as the persistent id of a storage, whatever it says."""

    def __init__(self, *identity: Any) -> None:
        self.identity = ("storage", *identity)


class Call:
    """Pickled as a call of `function`: run by whoever unpickles it."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.function, self.arguments, self.state = function, arguments, state

    def __reduce__(self) -> tuple[Any, ...]:
        return (self.function, self.arguments, self.state) if self.state is not None else (self.function, self.arguments)


def tensor(
    shape: Any = (3, 4),
    strides: Any = (4, 1),
    offset: Any = 0,
    *,
    kind: Any = torch.FloatStorage,
    key: Any = "0",
    count: Any = 12,
    more: tuple[Any, ...] = (),
    view: tuple[Any, ...] = (),
) -> Call:
    """A pickled float32 tensor of the storage "0", FLOATS, unless it is said to be another."""
    storage = Storage(kind, key, "cpu", count, *view)
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, shape, strides, False, collections.OrderedDict(), *more)


def pickled(value: Any, protocol: int = 2) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return value.identity if isinstance(value, Storage) else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol).dump(value)
    return buffer.getvalue()


def archive(value: Any, *, records: dict[str, bytes | None] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive of a pickled value, or of bytes of a pickle, with other records or, where one is None, without it."""
    data = value if isinstance(value, bytes) else pickled(value)
    held = {"data.pkl": data, "byteorder": b"little", "data/0": FLOATS, "version": b"3\n", **(records or {})}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in held.items():
            if content is not None:
                file.writestr(f"archive/{name}" if not name.startswith("/") else name[1:], content)
    return buffer.getvalue()


def legacy(
    value: Any, keys: Any = ("0",), storages: bytes | None = None, head: tuple[Any, ...] = (MAGIC, PROTOCOL, SYSTEM)
) -> bytes:
    parts = [*head, value, list(keys) if isinstance(keys, tuple) else keys]
    data = struct.pack("<q", 12) + FLOATS if storages is None else storages
    return b"".join(part if isinstance(part, bytes) else pickled(part) for part in parts) + data


def problems(path: Path) -> list[str]:
    """Every problem that the reader finds in a file; each is whole, and begins with the file's name. The file is as it was."""
    before = tree(path.parent)
    with pytest.raises(BadInput) as refusal:
        torch_pickle.open_file(path)
    assert tree(path.parent) == before
    found = [str(problem) for problem in refusal.value.problems]
    assert found
    assert all(text.startswith(f"{path}: ") and ": found " in text and "; expected " in text for text in found), found
    return found


def problem_of(model: Path) -> str:
    """The one problem of a model's file, without the file's name."""
    return one(problems(model / FILE)).removeprefix(f"{model / FILE}: ")


def problem(model: Path, content: bytes) -> str:
    """The same of a model with this file."""
    (model / FILE).write_bytes(content)
    return problem_of(model)


def model_directory(tmp_path: Path) -> Path:
    """A model directory whose weights are still to be written."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(checkpoints.LLAMA))
    return tmp_path / "model"
