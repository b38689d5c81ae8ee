"""Checkpoint: a TensorRT-LLM checkpoint that has been opened, as values. No tensor has been touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.tensor.tensors import LazyTensor


class FileTensor(LazyTensor, Protocol):
    """A tensor that lies as one run of bytes in a file."""

    @property
    def path(self) -> str: ...

    def viewed(self, shape: tuple[int, ...], dtype: np.dtype) -> LazyTensor:
        """The same bytes as an array of another shape and type."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """`config`: config.json. `ranks`: each rank file's tensors by name, rank 0 first. `provenance`: headrace.json, or nothing.

    `files`: the names of all files that are there. `assumed_sm`: the GPU generation of an output whose headrace.json names none.
    """

    directory: Path
    config: Mapping[str, Any]
    ranks: tuple[Mapping[str, FileTensor], ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    assumed_sm: int = 80

    @property
    def sm(self) -> int | str:
        """The GPU generation that integer weights are arranged for, or "any": as headrace.json has it, else the assumed one."""
        options = self.provenance.get("options")
        sm: int | str = options.get("sm", self.assumed_sm) if isinstance(options, Mapping) else self.assumed_sm
        return sm
