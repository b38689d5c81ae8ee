"""What the loader asks of one tensor of a rank file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Stored(Protocol):
    """What a file's header says of a tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...


@dataclass(frozen=True)
class Form:
    """A shape and a type, by NumPy's name for it ("bfloat16", "float8_e4m3fn")."""

    shape: tuple[int, ...]
    dtype: str

    def fits(self, tensor: Stored) -> bool:
        """Whether a tensor is of this form."""
        return tensor.shape == self.shape and tensor.dtype.name == self.dtype

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Expected:
    """One tensor: the forms that it may have, the usual one first.

    `required`: False for what the loader computes itself, and checks where it is there. `bare`: the form that it may have instead
    where none of `partners`, tensors of the same module, is in the file; then they are not asked for either.
    """

    forms: tuple[Form, ...]
    required: bool = True
    bare: Form | None = None
    partners: tuple[str, ...] = ()

    def fits(self, tensor: Stored) -> bool:
        """Whether a tensor has one of the forms."""
        return any(form.fits(tensor) for form in self.forms)

    def __str__(self) -> str:
        return " or ".join(map(str, self.forms))


def one(shape: Sequence[int], dtype: str, required: bool = True) -> Expected:
    """A tensor that has a single form."""
    return Expected((Form(tuple(shape), dtype),), required)
