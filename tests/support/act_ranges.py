"""Files of ranges of activations, as a calibration writes them, with seeded values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.support.quantized_checkpoints import LINEAR as LINEAR
from tests.support.quantized_checkpoints import Arrays, linear


def ranges(tensors: Arrays, seed: int = 0) -> Arrays:
    """`<module>|x` and `<module>|y` of each linear, some channels far larger than others; q, k and v, gate and up take the same."""
    random, found, shared = np.random.default_rng(seed), dict[str, np.ndarray](), dict[str, np.ndarray]()
    for name, weight in tensors.items():
        if linear(name):
            module = name.removesuffix(".weight")
            around, _, own = module.rpartition(".")
            place = f"{around} {'o' if own.startswith(('o_', 'down', 'w2')) else ''}"
            inputs = shared.setdefault(place, np.exp(random.normal(0, 1, weight.shape[1])).astype(np.float32))
            found[f"{module}|x"] = inputs
            found[f"{module}|y"] = np.exp(random.normal(0, 1, len(weight))).astype(np.float32)
    return found


def write(path: Path, tensors: Arrays, seed: int = 0) -> Path:
    """The file of `ranges`; returns its path."""
    save_file(ranges(tensors, seed), path)
    return path


def scales(tensors: Arrays, seed: int = 0) -> Arrays:
    """`<module>|awq` of each linear, as AWQ's search finds them: above and below 1; q, k and v, gate and up have the same."""
    found = ranges(tensors, seed)
    return {f"{name[:-2]}|awq": np.sqrt(values) for name, values in found.items() if name.endswith("|x")}


def write_scales(path: Path, tensors: Arrays, group_size: int = 64, seed: int = 0) -> Path:
    """The file of `scales`, searched for groups of a size; returns its path."""
    save_file(scales(tensors, seed), path, metadata={"awq_group_size": str(group_size)})
    return path
