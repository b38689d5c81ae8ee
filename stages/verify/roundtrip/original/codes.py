"""Codes of packed weights: out of their 32-bit words, and into numbers by scales and zero points of groups."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class LastBlock(threading.local):
    """The block that was unpacked last, of whichever module; each thread keeps its own."""

    def __init__(self) -> None:
        self._last: tuple[Any, Tensor] | None = None

    def __reduce__(self) -> tuple[type[LastBlock], tuple[()]]:
        return LastBlock, ()

    def get(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """The value of `key`, made unless it is the last one."""
        if self._last is None or self._last[0] != key:
            self._last = None  # not two blocks at once
            self._last = (key, make())
        return self._last[1]


def unpack_codes(words: Tensor, bits: int) -> Tensor:
    """Unpack 32-bit words, int32 [..., n], to their codes, uint8 [..., n * 32 / bits], lowest bits first.

    `bits` is 2, 3, 4 or 8; codes of 3 bits go over the ends of words.
    """
    data = word_bytes(words)
    if bits < 4:
        each = (data.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
        codes = each.reshape(*data.shape[:-1], -1, bits) << torch.arange(bits, dtype=torch.uint8)
        return codes.sum(-1, dtype=torch.uint8)
    return data if bits == 8 else torch.stack([data & 15, data >> 4], -1).flatten(-2)


def word_bytes(words: Tensor) -> Tensor:
    """The bytes of 32-bit words, int32 [..., n], as uint8 [..., 4 n], the lowest first."""
    # Not contiguous(), which leaves the strides of axes of length 1 as they are.
    return words.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def dequantize(codes: Tensor, zeros: Tensor, scales: Tensor, index: Tensor | None) -> Tensor:
    """Compute (code - zero) * scale of each in-feature's group, float32 [rows, in_features].

    `codes`: uint8 [rows, in_features]. `zeros`, `scales`: float32 [rows, groups]. `index`: int64 [in_features], the group of each
    in-feature, or None where groups are consecutive in-features.
    """
    if index is not None:
        return (codes.float() - zeros[:, index]) * scales[:, index]
    by_group = codes.reshape(len(codes), zeros.shape[1], -1).float()
    return (by_group.sub_(zeros.unsqueeze(-1)).mul_(scales.unsqueeze(-1))).reshape(codes.shape)


def explicit_groups(index: Tensor | None, groups: int) -> Tensor | None:
    """The group of each in-feature, int64 [in_features]; None where groups are consecutive in-features."""
    if index is None or torch.equal(index, torch.arange(len(index)) // (len(index) // groups)):
        return None
    return index


def divides_evenly(features: int, groups: int) -> bool:
    """Whether `groups` equal groups make up the in-features."""
    return bool(groups) and not features % groups
