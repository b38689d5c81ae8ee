"""Read ranges of activations: a safetensors file with `<module>|x` float32 [in] and `<module>|y` float32 [out] of each linear.

They are the largest magnitudes of what the linear takes and gives, a channel each, over a calibration; `<module>|w` beside them, of
the weights, is not read. Where AWQ's scales were searched, `<module>|awq` float32 [in] is what the linear's weights are
multiplied by, and `<module>|awq_error` float32 [2], the errors without and with it, is not read. Modules have the source's names.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from pipeline.errors import BadInput, Problem
from pipeline.tensor.placement import Region
from pipeline.tensor.source_file import SourceFile
from pipeline.tensor.tensors import Block, LazyTensor, View
from stages.read.mapped import MappedTensor
from stages.read.safetensors import open_file

KINDS = ("x", "y", "w", "awq", "awq_error")
LARGEST_SCALE = 1 << 14  # of AWQ's
GROUP_KEY = "awq_group_size"  # in the file's metadata: of the groups that AWQ's scales were searched for


class PendingRange(Block):
    """float32 [n]: a range that a calibration measures in the same run, as "<module>|x" of the file at `path` when it has.

    `layer`: the decoder layer whose task writes that file; whoever reads it waits for that.
    """

    def __init__(self, path: Path, name: str, size: int, layer: int) -> None:
        self.path, self.name, self.layer = path, name, layer
        self.shape, self.dtype = (size,), np.dtype(np.float32)

    def block(self, region: Region) -> Block:
        """A part of it, unread."""
        return View(self, region)

    def read(self, region: Region) -> np.ndarray:
        """The values. Raises OSError where the file is not there."""
        status = self.path.stat()
        tensor = _measured(self.path, status.st_ino, status.st_mtime_ns)[self.name]
        return np.asarray(tensor.block(region))


@lru_cache(maxsize=8)
def _measured(path: Path, inode: int, mtime_ns: int) -> dict[str, MappedTensor]:  # noqa: ARG001 (another file is read anew)
    """The tensors of a file, whose header all of a mixture's experts have in common."""
    return open_file(path)[1]


def no_magnitudes(values: np.ndarray) -> str:
    """Why values are no largest magnitudes; "" where they are."""
    if not np.isfinite(values).all():
        return "a value that is not finite (NaN or infinity)"
    if (values < 0).any():
        return "a value below 0"
    return "" if values.any() else "nothing but zeros, of which no scale can be made"


def no_scales(values: np.ndarray) -> str:
    """Why values are no scales of AWQ's; "" where they are."""
    if not np.isfinite(values).all():
        return "a value that is not finite (NaN or infinity)"
    if (values <= 0).any():
        return "a value that is not above 0"
    wide = (values > LARGEST_SCALE).any() or (values < 1 / LARGEST_SCALE).any()
    return f"a value outside 1/{LARGEST_SCALE} to {LARGEST_SCALE}, whose inverse float16 does not hold" if wide else ""


def open_ranges(path: Path) -> tuple[SourceFile, dict[tuple[str, str], LazyTensor]]:
    """The file, and its tensors by module and kind (KINDS); only the header is read.

    Raises BadInput where it is no such file, or has other tensors.
    """
    expected = "a safetensors file of <module>|x and <module>|y, as `headrace calibrate` writes it"
    try:
        file, tensors = open_file(path)
    except OSError as error:
        raise BadInput([Problem(f"--act_range {path}", f"a file that cannot be read ({error.strerror})", expected)]) from None
    result: dict[tuple[str, str], LazyTensor] = {}
    for name, tensor in tensors.items():
        module, bar, kind = name.rpartition("|")
        if not bar or kind not in KINDS:
            raise BadInput([Problem(f"--act_range {path}", f"a tensor {name}", expected, "Give the file of the calibration")])
        result[module, kind] = tensor
    if not result:
        raise BadInput([Problem(f"--act_range {path}", "a file without tensors", expected)])
    return file, result
