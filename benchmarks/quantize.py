"""Measure the speed and memory of quantizing and repacking weights: `python -m benchmarks.quantize`.

First the work of one core on blocks in memory, against NumPy row by row; then whole conversions of 8B-shaped checkpoints to TP 2
against `cp -r` of the source's bytes, in alternating pairs.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from benchmarks.measure import machine, pairs, run
from benchmarks.models import make, make_packed, weights
from pipeline.tensor.tensors import Block
from stages.quantization.kernels.layout import kernel_layout
from stages.quantization.sources import awq, gptq
from stages.quantization.targets import groupwise, weight_only

HEADRACE = [sys.executable, "-m", "pipeline.cli", "convert", "--quiet", "--tp_size", "2"]
IN, OUT = 4096, 2048  # the shape of a block: 16 MB of bf16


class ArrayBlock(Block):
    """An array in memory as a block."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.shape, self.dtype = values, values.shape, values.dtype

    def read(self, region: tuple[tuple[int, int], ...]) -> np.ndarray:
        return self.values[tuple(slice(start, stop) for start, stop in region)]


def best(work: Callable[[], object], repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def kernels() -> None:
    """Print the speed of one core on blocks in memory, in GB/s of source."""
    random = np.random.default_rng(0)
    values = (random.standard_normal((OUT, IN), dtype=np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    words = random.integers(-(1 << 31), 1 << 31, (IN // 8, OUT), dtype=np.int64).astype(np.int32)
    columns = random.integers(-(1 << 31), 1 << 31, (IN, OUT // 8), dtype=np.int64).astype(np.int32)

    def weight_only_(bits: int) -> Callable[[], object]:
        layout = kernel_layout(bits, 80, False)
        region = ((0, OUT // layout.columns), (0, layout.columns * IN * bits // 8))
        return lambda: weight_only.codes_of(region, ArrayBlock(values), layout, "w", 1)

    def repack(read: Callable[..., np.ndarray], source: np.ndarray) -> Callable[[], object]:
        layout = kernel_layout(4, 80, False)
        region = ((0, OUT // layout.columns), (0, layout.columns * IN // 2))
        codes = ((0, OUT), (0, IN // 2))
        return lambda: groupwise.arranged(region, ArrayBlock(read(codes, ArrayBlock(source))), layout)

    for name, work, source in (
        ("int8 from bf16", weight_only_(8), values),
        ("int4 from bf16", weight_only_(4), values),
        ("GPTQ repack", repack(gptq.read_codes, words), words),
        ("AWQ repack", repack(awq.read_codes, columns), columns),
    ):
        seconds, naive = best(work), naive_rows(name, values, words, columns)
        rate = source.nbytes / seconds / 1e9
        print(f"{name}: {rate:.2f} GB/s of source a core, {naive / seconds:.0f} x as fast as NumPy row by row", flush=True)


def naive_rows(name: str, values: np.ndarray, words: np.ndarray, columns: np.ndarray) -> float:
    """Estimate the seconds that the same block takes row by row, from some of its rows."""
    rows = 16
    permuted = np.arange(32).reshape(4, 4, 2).swapaxes(0, 1).reshape(-1)

    def quantized(bits: int) -> None:
        for row in values[:rows].astype(np.float32):
            scale = np.abs(row).max() / 2 ** (bits - 1)
            codes = np.clip(np.trunc(row / scale + np.copysign(0.5, row)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(np.int8)
            _ = codes.reshape(-1, 32)[:, permuted]

    def repacked(source: np.ndarray, along: int) -> None:
        for row in range(rows):
            packed = source[:, row] if along == 0 else source[:, row // 8]
            codes = np.array([(word >> (4 * nibble)) & 15 for word in packed.tolist() for nibble in range(8 if along == 0 else 1)])
            _ = codes.reshape(-1, 32)[:, permuted]

    work = {
        "int8 from bf16": lambda: quantized(8),
        "int4 from bf16": lambda: quantized(4),
        "GPTQ repack": lambda: repacked(words, 0),
        "AWQ repack": lambda: repacked(columns, 1),
    }[name]
    return best(work, 3) * OUT / rows


def conversions(work: Path, count: int, layers: int) -> None:
    dense, output = work / "dense", work / "output"
    total = make(dense, "8B", layers=layers, noise=weights())
    for precision in ("int8", "int4"):
        command = [*HEADRACE, "--model_dir", str(dense), "--output_dir", str(output), "--use_weight_only"]
        command += ["--weight_only_precision", precision]
        report(f"{precision} weight-only from bf16", command, dense, output, total, count)
    command = [*HEADRACE, "--model_dir", str(dense), "--output_dir", str(output), "--use_fp8_rowwise"]
    report("FP8 rowwise from bf16", command, dense, output, total, count)
    shutil.rmtree(dense)
    for method in ("gptq", "awq"):
        source = work / method
        make_packed(source, "8B", 2 * layers, method)
        total = sum(path.stat().st_size for path in source.iterdir())
        command = [*HEADRACE, "--model_dir", str(source), "--output_dir", str(output)]
        report(f"{method.upper()} repack", command, source, output, total, count)
        shutil.rmtree(source)


def scratch(work: Path, layers: int) -> None:
    """Measure what a cut after `unpack` costs or saves where several targets take the same unpacked weights."""
    source, job = work / "gptq", work / "job.toml"
    make_packed(source, "8B", 2 * layers, "gptq")
    for count in (1, 2, 4):
        sizes = [1, 2, 4, 8][:count]
        tables = "".join(f'[[target]]\noutput_dir = "{work}/out{size}"\ntp_size = {size}\n' for size in sizes)
        job.write_text(f'model_dir = "{source}"\nscheduler = "threads"\nscratch = "{work}/scratch"\n{tables}')
        seconds = {}
        for after in ("none", "unpack"):
            command = [sys.executable, "-m", "pipeline.cli", "convert", str(job), "--quiet", "--scratch_after", after]
            times = []
            for _ in range(3):
                times.append(run(command).seconds)
                for size in sizes:
                    shutil.rmtree(work / f"out{size}")
            seconds[after] = sorted(times)[1]
        ratio = seconds["unpack"] / seconds["none"]
        print(f"GPTQ, {count} targets: {seconds['none']:.1f} s without a cut, {ratio:.2f} x that with one after unpack", flush=True)
    shutil.rmtree(source)


def report(name: str, command: list[str], source: Path, output: Path, total: int, count: int) -> None:
    for scheduler in ("threads", "local"):
        run([*command, "--scheduler", scheduler], remove=output)
        shutil.rmtree(output)
        measured = pairs([*command, "--scheduler", scheduler], output, source, count)
        rates = sorted(total / one.seconds / 1e9 for one in measured.ours)
        print(
            f"{name}, {total / 1e9:.1f} GB, {scheduler}: {rates[len(rates) // 2]:.2f} GB/s of source; {measured.row()}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=5, help="of the 8B-shaped bf16 model; twice as many of the packed ones")
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="a directory with 20 GB free")
    parser.add_argument("--only", choices=["kernels", "conversions", "scratch"], help="one part")
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    print(machine())
    if arguments.only in (None, "kernels"):
        kernels()
    if arguments.only != "kernels":
        work.mkdir(parents=True, exist_ok=True)
        if arguments.only != "scratch":
            conversions(work, arguments.pairs, arguments.layers)
        if arguments.only != "conversions":
            scratch(work, arguments.layers)
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
