"""Measure the kernels alone: `python -m benchmarks.kernels`.

Of each kernel, by processor time of one thread: GB/s of what it reads, how many times as fast as its NumPy twin, and how many times as
long as copying what it reads (into room that is there already) takes. What a number is worth on a busy machine is the ratio: the three
are measured in turns.

With `--peers`, or HEADRACE_PEERS in the environment, an interpreter that has optimum-quanto, compressed-tensors, torchao, bitsandbytes or
gguf times them at like work (benchmarks/peers.py).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from benchmarks.checking import checks
from benchmarks.measure import machine
from stages.quantization.kernels import compiled, twins
from stages.quantization.kernels.chosen import c_is_used, kernels_in_use
from stages.quantization.kernels.dispatch import Kernels
from stages.quantization.kernels.layout import kernel_layout

ROWS, FEATURES = 256, 4096  # 2 MB in 16 bits, about as much as a conversion does at a time
BF16, FP16, FP32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
Work = Callable[[Kernels], object]


def work() -> dict[str, tuple[np.ndarray, Work]]:
    """Name -> what is read, and the call of the kernel."""
    random = np.random.default_rng(0)
    numbers = random.standard_normal((ROWS, FEATURES), dtype=np.float32) * np.float32(0.02)
    brain, half = numbers.astype(BF16), numbers.astype(FP16)
    eight = (numbers * 1000).astype(FLOAT8)
    words = random.integers(0, 1 << 32, (FEATURES // 8, ROWS), dtype=np.uint64).astype(np.uint32)
    columns = np.ascontiguousarray(words.reshape(FEATURES, -1))
    stream = words.view(np.uint8).reshape(ROWS, -1)
    int8, int4 = kernel_layout(8, 80, False), kernel_layout(4, 80, False)
    scale = np.float32(1.5)
    packed = random.integers(0, 64, (ROWS // 4, 16 * 34 * 9 * 2), dtype=np.uint8)
    factors, scales = np.exp(random.standard_normal(FEATURES)), np.full(ROWS, 1000, dtype=np.float32)
    return {
        "int8 from bf16": (brain, lambda k: k.weight_only_codes(brain, int8, 1, "")),
        "int8 from fp16": (half, lambda k: k.weight_only_codes(half, int8, 1, "")),
        "int4 from bf16": (brain, lambda k: k.weight_only_codes(brain, int4, 1, "")),
        "scales of int8 from bf16": (brain, lambda k: k.weight_only_scales(brain, 8, 1, "")),
        "FP8 by row from bf16": (brain, lambda k: k.float8_codes(brain, 1, 1200.0, "")),
        "FP8 by row from fp32": (numbers, lambda k: k.float8_codes(numbers, 1, 1200.0, "")),
        "FP8 to another scale": (eight, lambda k: k.float8_rescaled(eight, scale, np.float32(2))),
        "SmoothQuant: columns of fp16": (half, lambda k: k.column_magnitudes(half)),
        "SmoothQuant: rows' magnitudes": (half, lambda k: k.smoothed_magnitudes(half, factors)),
        "SmoothQuant: fp16 times factors": (half, lambda k: k.smoothed(half, factors)),
        "SmoothQuant: codes by channel": (half, lambda k: k.smoothed_codes(half, scales, "float")),
        "SmoothQuant: codes by tensor": (half, lambda k: k.smoothed_codes(half, scales, "half")),
        "int4 codes arranged": (stream, lambda k: k.arranged(stream, int4)),
        "int8 codes arranged": (stream, lambda k: k.arranged(stream, int8)),
        "GPTQ unpacked": (words, lambda k: k.transposed(words)),
        "GPTQ to the kernel's order": (words, lambda k: k.arranged(k.transposed(words).view(np.uint8), int4)),
        "AWQ unpacked": (columns, lambda k: k.awq_codes(columns)),
        "AWQ to the kernel's order": (columns, lambda k: k.arranged(k.awq_codes(columns), int4)),
        **{
            f"GGUF {kind} to fp32": (packed[:, : packed.shape[1] // size * size].copy(), of_blocks(kind, packed, size))
            for kind, size in (("Q4_0", 18), ("Q8_0", 34), ("Q4_K", 144), ("Q6_K", 210))
        },
        "GGUF Q8_0 to bf16": (packed[:, : packed.shape[1] // 34 * 34].copy(), of_blocks("Q8_0", packed, 34, BF16)),
        "GGUF Q4_K to bf16": (packed[:, : packed.shape[1] // 144 * 144].copy(), of_blocks("Q4_K", packed, 144, BF16)),
        "bf16 to fp16": (brain, lambda k: k.cast(brain, FP16)),
        "fp16 to bf16": (half, lambda k: k.cast(half, BF16)),
        "fp32 to bf16": (numbers, lambda k: k.cast(numbers, BF16)),
        "fp32 to fp16": (numbers, lambda k: k.cast(numbers, FP16)),
        "bf16 to fp32": (brain, lambda k: k.cast(brain, FP32)),
        "float8 to fp32": (eight, lambda k: k.cast(eight, FP32)),
        "float8 to bf16": (eight, lambda k: k.cast(eight, BF16)),
    }


def of_blocks(kind: str, packed: np.ndarray, size: int, to: np.dtype = FP32) -> Work:
    blocks = packed[:, : packed.shape[1] // size * size].copy()
    return lambda k: k.gguf_numbers(blocks, kind, to)


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", default="", help="those whose name has this in it")
    parser.add_argument("--peers", default=os.environ.get("HEADRACE_PEERS"), help="an interpreter that has other libraries")
    arguments = parser.parse_args()
    print(machine())
    print(
        f"kernels: {kernels_in_use()}; one thread, blocks of {ROWS} x {FEATURES}, the best of {arguments.repeats} by processor time"
    )
    print(f"{'':36}{'GB/s':>8}{'x twin':>8}{'x copy':>8}")
    converting = {
        name: (source, lambda call=call: call(compiled), lambda call=call: call(twins)) for name, (source, call) in work().items()
    }
    for name, (source, fast, slow) in {**converting, **checks(ROWS, FEATURES)}.items():
        if arguments.only not in name:
            continue
        room, ours, twin, copy = np.empty_like(source), [], [], []
        for _ in range(arguments.repeats):
            copy.append(seconds(lambda room=room, source=source: np.copyto(room, source)))  # type: ignore[misc]
            twin.append(seconds(slow))
            if c_is_used():
                ours.append(seconds(fast))
        best = min(ours or twin)
        print(f"{name:36}{source.nbytes / best / 1e9:8.2f}{min(twin) / best:8.1f}{best / min(copy):8.1f}", flush=True)
    if arguments.peers:
        peers(arguments.peers, arguments.repeats)


def peers(interpreter: str, repeats: int) -> None:
    """Print the rates of other libraries, as an interpreter that has them measures them."""
    script = Path(__file__).with_name("peers.py")
    # Not as a module of ours: what this folder's files are called is what some libraries import.
    command = [interpreter, "-P", str(script), str(repeats)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        row = json.loads(line)
        name = f"{row['peer']} {row.get('version', '')}, {row['kind']}"
        print(f"{name:36}{row['rate']:8.2f}" if "rate" in row else f"{name:36}    not run: {row['missing']}", flush=True)
    process.wait()


if __name__ == "__main__":
    main()
