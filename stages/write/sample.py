"""Try the work of a task for a moment: values are made and summed as `write` does, and go to memory in the place of files."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import numpy as np
import xxhash

from pipeline.tensor.placement import intersect, pieces, shift, slices, whole
from pipeline.tensor.tensors import Block
from stages.write import WRITE_BYTES
from stages.write.deliveries import BlockWrite


def try_blocks(work: Sequence[BlockWrite], blocks: Sequence[Sequence[Block]], seconds: float) -> tuple[int, float]:
    """Do a task's work until `seconds` have passed, at least its first piece; returns the bytes that were made, and the seconds.

    Parameters are those of `write_blocks`. No file is written. Raises OSError where the source cannot be read.
    """
    begun, made = time.perf_counter(), 0
    memory = os.memfd_create("headrace-sample") if hasattr(os, "memfd_create") else -1
    try:
        for item, versions in zip(work, blocks, strict=True):
            for piece in pieces(whole(versions[0].shape), item.itemsize, item.piece_bytes, item.row_multiple):
                for block, sink in zip(versions, item.deliveries, strict=True):
                    values = block.read(piece)
                    for delivery in sink:
                        common = intersect(delivery.source, piece)
                        if common is not None:
                            part = np.ascontiguousarray(values[slices(shift(common, [start for start, _ in piece], -1))])
                            made += _store(part.reshape(-1).view(np.uint8).data, memory)
                if time.perf_counter() - begun >= seconds:
                    return made, time.perf_counter() - begun
        return made, time.perf_counter() - begun
    finally:
        if memory >= 0:
            os.close(memory)


def _store(data: memoryview, memory: int) -> int:
    """Sum bytes, and write them over those of before; returns how many they are."""
    xxhash.xxh3_64(data).digest()
    for start in range(0, len(data) if memory >= 0 else 0, WRITE_BYTES):
        os.pwrite(memory, data[start : start + WRITE_BYTES], start)
    return len(data)
