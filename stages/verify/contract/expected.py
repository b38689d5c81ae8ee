"""The shapes and types that the loader accepts for one tensor of a rank file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class TensorHeader(Protocol):
    """The shape and type of a tensor by its file's header."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...


@dataclass(frozen=True)
class TensorForm:
    """A shape, and a type by NumPy's name for it: "bfloat16", "float8_e4m3fn"."""

    shape: tuple[int, ...]
    dtype: str

    def fits(self, tensor: TensorHeader) -> bool:
        """Whether a tensor is of this form."""
        return tensor.shape == self.shape and tensor.dtype.name == self.dtype

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class ExpectedTensor:
    """The forms that a tensor may have, the usual one first.

    `required`: False for a tensor that the loader computes itself, and checks only where the file has it. `bare`: another form,
    allowed where the file has none of `partners`, tensors of the same module; these are not asked for then either.
    """

    forms: tuple[TensorForm, ...]
    required: bool = True
    bare: TensorForm | None = None
    partners: tuple[str, ...] = ()

    def fits(self, tensor: TensorHeader) -> bool:
        """Whether a tensor has one of the forms."""
        return any(form.fits(tensor) for form in self.forms)

    def __str__(self) -> str:
        return " or ".join(map(str, self.forms))


def single_form(shape: Sequence[int], dtype: str, required: bool = True) -> ExpectedTensor:
    """Expect a tensor of a single form."""
    return ExpectedTensor((TensorForm(tuple(shape), dtype),), required)
