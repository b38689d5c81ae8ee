"""Read ranges of activations: a safetensors file with `<module>|x` float32 [in] and `<module>|y` float32 [out] of each linear.

They are the largest magnitudes of what the linear takes and gives, a channel each, over a calibration; `<module>|w` beside them, of
the weights, is not read. Where AWQ's scales were searched, `<module>|awq` float32 [in] is what the linear's weights are multiplied by,
and `<module>|awq_error` float32 [2], the errors without and with it, is not read. Modules have the source's names.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import BadInput, Problem
from pipeline.tensor.source_file import SourceFile
from pipeline.tensor.tensors import LazyTensor
from stages.read.safetensors import open_file

KINDS = ("x", "y", "w", "awq", "awq_error")
GROUP_KEY = "awq_group_size"  # in the file's metadata: of the groups that AWQ's scales were searched for


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
