"""How fast this machine multiplies matrices, for an estimate of what a calibration takes."""

from __future__ import annotations

import time

import torch

from stages.calibrate.layers import TYPES

SECONDS = 0.2  # of measuring
WIDTH = 4096  # of the matrix, at most


def flops_per_second(dtype: str, tokens: int, width: int, device: str) -> float:
    """Floating point operations a second of a product [tokens, width] x [width, width], in a type by its name."""
    width, tokens = min(width, WIDTH), max(tokens, 1)
    given = torch.ones((tokens, width), dtype=TYPES[dtype], device=device)
    weight = torch.ones((width, width), dtype=TYPES[dtype], device=device)
    with torch.no_grad():
        torch.nn.functional.linear(given, weight)  # the first one prepares
        done, started = 0, time.perf_counter()
        while (seconds := time.perf_counter() - started) < SECONDS:
            result = torch.nn.functional.linear(given, weight)
            done += 1
            result[0, 0].item()  # waits for a device
    return 2.0 * tokens * width * width * done / seconds
