"""Time other libraries at the work of the kernels, one thread: run by `benchmarks.kernels` with the interpreter that has them.

Prints a line of JSON for each: its name, what it does, and GB/s of what it reads by processor time; or why it was not run. Blocks and
types are those of `benchmarks.kernels`; codes are not in the order of TensorRT-LLM's kernels, which these libraries do not write.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

ROWS, FEATURES, GROUP = 256, 4096, 128
Work = tuple[int, Callable[[], Any]]  # the bytes that are read, and the work


def brain() -> Any:
    import torch

    return (torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)


def quanto(kind: str) -> Work:
    from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qint4, qint8, quantize_weight

    values = brain()
    if kind == "int8":
        return values.nbytes, lambda: quantize_weight(values, qint8, 0, AbsmaxOptimizer()(values, qint8, 0))
    return values.nbytes, lambda: quantize_weight(values, qint4, 0, *MaxOptimizer()(values, qint4, 0, GROUP), group_size=GROUP)


def compressed(kind: str) -> Work:
    import torch
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize

    values = brain()
    bits, largest, dtype = (8, 448.0, torch.float8_e4m3fn) if kind == "float8" else (int(kind[3:]), 0.0, torch.int8)
    args = QuantizationArgs(num_bits=bits, type="float" if kind == "float8" else "int", symmetric=True, strategy="channel")
    steps = largest or float((1 << (bits - 1)) - 1)

    def work() -> Any:
        scale = values.abs().amax(1, keepdim=True) / steps
        return quantize(values, scale, torch.zeros_like(scale), args, dtype=dtype)

    return values.nbytes, work


def packed(kind: str) -> Work:
    import torch

    try:
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    except ImportError:
        from compressed_tensors.compressors.quantized_compressors.pack_quantized import unpack_from_int32
    words = torch.randint(-(1 << 31), 1 << 31, (ROWS, FEATURES // 8), dtype=torch.int64).to(torch.int32)
    return words.nbytes, lambda: unpack_from_int32(words, int(kind[3:]), torch.Size((ROWS, FEATURES)))


def torchao(kind: str) -> Work:
    import torch
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = torch.nn.Linear(FEATURES, ROWS, bias=False, dtype=torch.bfloat16)
    weight = torch.nn.Parameter(brain(), requires_grad=False)

    def work() -> Any:
        assert kind == "int8"
        layer.weight = weight
        return quantize_(layer, Int8WeightOnlyConfig())

    return weight.nbytes, work


def bitsandbytes(kind: str) -> Work:
    import torch
    from bitsandbytes import functional

    values = brain()
    if kind == "int8":
        half = values.to(torch.float16)
        return half.nbytes, lambda: functional.int8_vectorwise_quant(half)
    return values.nbytes, lambda: functional.quantize_4bit(values, blocksize=64, quant_type="nf4")


def gguf_blocks(kind: str) -> Work:
    import gguf
    import numpy as np

    type_ = gguf.GGMLQuantizationType[kind]
    elements, size = gguf.GGML_QUANT_SIZES[type_]
    blocks = np.random.default_rng(0).integers(0, 64, (ROWS, FEATURES // elements * size), dtype=np.uint8)
    return blocks.nbytes, lambda: gguf.quants.dequantize(blocks, type_)


PEERS: list[tuple[str, Callable[[str], Work], tuple[str, ...]]] = [
    ("optimum-quanto", quanto, ("int8", "int4")),
    ("compressed-tensors", compressed, ("int8", "int4", "float8")),
    ("compressed-tensors, unpacking", packed, ("int4",)),
    ("torchao", torchao, ("int8",)),
    ("bitsandbytes", bitsandbytes, ("int8", "nf4")),
    ("gguf", gguf_blocks, ("Q4_0", "Q8_0", "Q4_K", "Q6_K")),
]


def rate(nbytes: int, work: Callable[[], Any], repeats: int) -> float:
    """GB/s of the best of some runs, by processor time."""
    best = float("inf")
    for _ in range(repeats + 1):  # the first prepares
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return nbytes / best / 1e9


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    for name, make, kinds in PEERS:
        for kind in kinds:
            row: dict[str, Any] = {"peer": name, "kind": kind}
            try:
                row["version"] = version(name.partition(",")[0])
                row["rate"] = rate(*make(kind), repeats)
            except PackageNotFoundError:
                row["missing"] = "not installed"
            except Exception as error:  # whatever a library says, the others are run
                row["missing"] = f"{type(error).__name__}: {error}"[:120]
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        import torch
    except ImportError:
        pass
    else:
        torch.set_num_threads(1)
        torch.manual_seed(0)
    main()
