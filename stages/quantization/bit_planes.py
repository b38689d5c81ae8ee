"""GPTQModel's planar words (`gptq_p`): each 32 codes of `bits` bits are `bits` words, first all words of their lowest bits.

The planes of a width are the powers of two that it is the sum of, the widest first: 3 bits are 2 and 1, 6 are 4 and 2, 7 are 4, 2
and 1. A plane's words hold its part of consecutive codes, lowest first. Of 2, 4 and 8 bits there is one plane, so that words are
those of the other formats. Facts: docs/format/quantized-layouts.md, section 5b.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

BLOCK = 32  # codes
PLANAR = "gptq_p"
_ALWAYS = (5, 6, 7)  # bits, of which no other format has codes


def checkpoint_format(settings: Mapping[str, Any]) -> Any:
    """The format of GPTQ's words and zero points by the settings; later versions of GPTQModel call it `format` alone."""
    return settings.get("checkpoint_format", settings.get("format"))


def planar(settings: Mapping[str, Any], bits: float) -> bool:
    """Whether codes of a width are in planes of which there are several."""
    return bits in _ALWAYS or (bits == 3 and checkpoint_format(settings) == PLANAR)


def from_planes(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [..., n * bits] to uint8 [..., n * 32]."""
    blocks = words.reshape(*words.shape[:-1], -1, bits)
    codes = np.zeros((*blocks.shape[:-1], BLOCK), dtype=np.uint8)
    start = offset = 0
    for width in (each for each in (4, 2, 1) if bits & each):
        data = np.ascontiguousarray(blocks[..., start : start + width]).view(np.uint8)
        for place in range(8 // width):
            codes[..., place :: 8 // width] |= (data >> np.uint8(place * width) & np.uint8((1 << width) - 1)) << np.uint8(offset)
        start, offset = start + width, offset + width
    return codes.reshape(*words.shape[:-1], -1)
