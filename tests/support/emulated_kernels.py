"""A plugin of pytest: the kernels in C of another processor, run by an emulator, take the place of the module that is built.

HEADRACE_TEST_PROGRAM is the command of the program of emulated_kernels.c. What the module checks of its arguments is not in it.
"""

from __future__ import annotations

import importlib
import os
import shlex
import subprocess
import sys
from types import ModuleType
from typing import Any

import numpy as np

NAME = "stages.quantization.kernels._kernels"
TYPES = ("bfloat16", "float16", "float32", "float8_e4m3fn")


def joined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The bytes of two arrays."""
    return np.concatenate([np.ascontiguousarray(each).reshape(-1).view(np.uint8) for each in (first, second)])


class Emulated(ModuleType):
    """The functions of the module, each a job of one process that lasts as long as the tests."""

    def __init__(self) -> None:
        super().__init__(NAME)
        command = shlex.split(os.environ["HEADRACE_TEST_PROGRAM"])
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        words = self.process.stdout.readline().decode().split()
        self.blocks = {name: (int(size), int(count)) for name, size, count in zip(*(words[n::3] for n in range(3)), strict=True)}

    def run(self, name: str, values: np.ndarray, out: np.ndarray, *numbers: float) -> bool:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        data = np.ascontiguousarray(values).tobytes()
        line = " ".join([name, str(len(data)), str(out.nbytes), str(len(numbers)), *(float(n).hex() for n in numbers)])
        self.process.stdin.write(line.encode() + b"\n" + data)
        self.process.stdin.flush()
        (said,) = self.process.stdout.read(1)
        result = self.process.stdout.read(out.nbytes)
        assert said in (0, 1)
        assert len(result) == out.nbytes
        out[...] = np.frombuffer(result, dtype=out.dtype).reshape(out.shape)
        return said == 0

    def weight_only_scales(self, values: np.ndarray, kind: str, segments: int, bits: int, out: np.ndarray) -> bool:
        return self.run("weight_only_scales", values, out, *values.shape, segments, TYPES.index(kind), bits)

    def weight_only_codes(
        self,
        values: np.ndarray,
        kind: str,
        segments: int,
        bits: int,
        columns: int,
        mixed: bool,
        scales: np.ndarray,
        out: np.ndarray,
    ) -> bool:
        numbers = (*values.shape, segments, TYPES.index(kind), bits, columns, mixed)
        return self.both("weight_only_codes", values, scales, out, *numbers)

    def both(self, name: str, values: np.ndarray, scales: np.ndarray, out: np.ndarray, *numbers: float) -> bool:
        """Run a job that answers scales, and codes behind them."""
        room = np.empty(scales.nbytes + out.nbytes, np.uint8)
        fine = self.run(name, values, room, *numbers)
        scales.reshape(-1)[...] = room[: scales.nbytes].view(np.float32)
        out.reshape(-1)[...] = room[scales.nbytes :]
        return fine

    def float8_scales(self, values: np.ndarray, kind: str, segments: int, clamp: float, out: np.ndarray) -> bool:
        return self.run("float8_scales", values, out, *values.shape, segments, TYPES.index(kind), clamp)

    def float8_codes(self, values: np.ndarray, kind: str, segments: int, clamp: float, scales: np.ndarray, out: np.ndarray) -> bool:
        return self.both("float8_codes", values, scales, out, *values.shape, segments, TYPES.index(kind), clamp)

    def float8_rescaled(self, codes: np.ndarray, scale: float, common: float, out: np.ndarray) -> None:
        self.run("float8_rescaled", codes, out, codes.size, scale, common)

    def cast(self, values: np.ndarray, kind: str, to: str, out: np.ndarray) -> None:
        self.run("cast", values, out, values.size, TYPES.index(kind), TYPES.index(to))

    def arranged(self, stream: np.ndarray, bits: int, columns: int, mixed: bool, out: np.ndarray) -> None:
        self.run("arranged", stream, out, *stream.shape, bits, columns, mixed)

    def transposed(self, words: np.ndarray, out: np.ndarray) -> None:
        self.run("transposed", words, out, *words.shape)

    def awq_codes(self, words: np.ndarray, out: np.ndarray) -> None:
        self.run("awq_codes", words, out, *words.shape)

    def gguf_numbers(self, blocks: np.ndarray, kind: str, to: str, out: np.ndarray) -> None:
        name, numbers = ("gguf_numbers", ()) if to == "float32" else ("gguf_cast", (TYPES.index(to),))
        self.run(name, blocks, out, blocks.size // self.blocks[kind][0], list(self.blocks).index(kind), *numbers)

    def column_magnitudes(self, values: np.ndarray, out: np.ndarray) -> None:
        self.run("column_magnitudes", values, out, *values.shape)

    def smoothed_magnitudes(self, values: np.ndarray, factors: np.ndarray, out: np.ndarray) -> None:
        self.run("smoothed_magnitudes", joined(factors, values), out, *values.shape)

    def smoothed(self, values: np.ndarray, factors: np.ndarray, most: np.ndarray, out: np.ndarray) -> None:
        room = np.empty(most.size + out.size, np.uint16)
        self.run("smoothed", joined(factors, values), room, *values.shape)
        most.reshape(-1)[...], out.reshape(-1)[...] = room[: most.size], room[most.size :]

    def smoothed_codes(self, values: np.ndarray, scales: np.ndarray, product: str, out: np.ndarray) -> None:
        self.run("smoothed_codes", joined(scales, values), out, *values.shape, product == "divided", product != "float")

    def gguf_types(self) -> dict[str, tuple[int, int]]:
        return self.blocks

    def level(self) -> Any:
        return "emulated"

    def levels(self) -> list[str]:
        return ["emulated"]

    def use(self, level: str) -> str:
        return level


module = Emulated()
package, _, name = NAME.rpartition(".")
sys.modules[NAME] = module
setattr(importlib.import_module(package), name, module)
