"""Read GGUF files of llama.cpp: the metadata as the model's configuration, and the tensors as they are packed.

Unquantized tensors are mapped as float64, float32, float16 or bfloat16. Quantized ones are mapped as uint8 [rows, bytes of a row],
with the parameter named after the packing: a `weight` of type Q4_1 becomes `gguf_Q4_1`, which `unpack` recognises.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.documents import open_regular
from pipeline.errors import BadInput, Problem
from pipeline.model.dtypes import BY_SAFETENSORS
from pipeline.tensor.source_file import SourceFile, source_file
from pipeline.tensor.system_errors import naming
from pipeline.tensor.tensors import LazyTensor, Source
from stages.read.gguf_config import READ, gguf_config
from stages.read.gguf_header import MAGIC, GgufHeader, damaged, read_header
from stages.read.mapped import MappedTensor
from stages.read.source_reader import SourceReader

PLAIN = {name: BY_SAFETENSORS[name] for name in ("F64", "F32", "F16", "BF16")}  # GGUF calls them the same
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
PREFIX = "gguf_"  # of the parameter of a packed weight, before the name of its type
COUNT = "split.tensors.count"
SHOWN = 5  # missing parts that are named
# Matrices of one row, which llama.cpp's converter wrote as vectors until 2026.
ONE_ROW = re.compile(r"blk\.\d+\.ffn_gate_inp_shexp\.weight")


class GgufFiles(SourceReader):
    """Files, and directories of them."""

    name = "gguf"
    title = "a GGUF file"

    def detect(self, location: Path) -> bool:
        """Return whether `location` is a GGUF file or a directory that has any."""
        if location.is_file():
            with naming(location), location.open("rb") as file:
                return file.read(4) == MAGIC or location.suffix == ".gguf"
        return location.is_dir() and any(location.glob("*.gguf"))

    def open_source(self, location: Path) -> Source:
        """Open a file, or all files of a model that was split into several. Raises BadInput with all problems found."""
        problems: list[Problem] = []
        tensors: dict[str, LazyTensor] = {}
        found: set[str] = set()  # names as the files have them: those of packed tensors get another, by their type
        bytes_by_type: Counter[str] = Counter()
        unpackable: dict[str, bool] = {}
        files: list[SourceFile] = []
        metadata: Mapping[str, Any] = {}
        counts: dict[Path, Any] = {}  # of the model's tensors, by the part that says so
        paths = _parts(location)
        for number, path in enumerate(paths):
            try:
                file, header = _open(path)
            except BadInput as error:
                problems += error.problems
                continue
            if problem := _split_problem(path, number, len(paths), header.metadata):
                problems.append(problem)
            files.append(file)
            metadata = metadata or header.metadata
            if COUNT in header.metadata:
                counts[path] = header.metadata[COUNT]
            for tensor in header.tensors:
                kind, shape = tensor.kind, tensor.shape
                module, _, parameter = tensor.name.rpartition(".")
                name = tensor.name if kind in PLAIN else f"{module}.{PREFIX}{kind}"
                if tensor.name in found:
                    problems.append(Problem(tensor.name, f"the tensor again in {path.name}", "one home"))
                found.add(tensor.name)
                if kind in PLAIN and parameter.startswith(PREFIX):
                    problems.append(Problem(tensor.name, f"type {kind} under the name of packed weights", "a name of llama.cpp's"))
                if kind not in PLAIN and (parameter != "weight" or tensor.name in READ):
                    problems.append(Problem(tensor.name, f"type {kind}", "an unpacked type: only weights are packed"))
                if kind not in PLAIN and kind not in unpackable:
                    unpackable[kind] = not _undecodable(kind)
                if not unpackable.get(kind, True):
                    problems.append(Problem(tensor.name, f"type {kind}", "a type of weights that the gguf package unpacks"))
                if len(shape) > 1:
                    bytes_by_type[kind] += tensor.nbytes
                dtype = PLAIN[kind].numpy if kind in PLAIN else np.dtype(np.uint8)
                if ONE_ROW.fullmatch(tensor.name) and len(shape) == 1:
                    shape = (1, *shape)
                stored = shape if kind in PLAIN else (*shape[:-1], tensor.row_bytes)
                tensors[name] = MappedTensor(str(path), tensor.offset, stored, dtype)
        if len(paths) > 1 and not problems:  # of a file alone the count is not read, as in llama.cpp
            problems += _count_problems(counts, len(found))
        if problems:
            raise BadInput(problems)
        architecture = str(metadata.get("general.architecture", ""))
        config = gguf_config(metadata, architecture, tensors, location)
        commonest = bytes_by_type.most_common(1)[0][0] if bytes_by_type else ""
        return Source(
            kind=f"GGUF ({commonest})",
            location=location,
            container="gguf",
            architecture=architecture + ("+experts" if config.get("expert_count") and not architecture.endswith("moe") else ""),
            config=config,
            config_name=str(location),
            tensors=tensors,
            files=tuple(files),
            dtype=(PLAIN[commonest].target or None) if commonest in PLAIN else None,
        )


def _parts(location: Path) -> list[Path]:
    """The files of one model: those of its parts, whichever of them or their directory is named.

    Raises BadInput naming parts that are missing, or the models in a directory of several.
    """
    paths = [location] if location.is_file() else sorted(location.glob("*.gguf"))
    models = dict.fromkeys((path.parent, *_numbered(path)) for path in paths)
    if len(models) > 1:
        names = ", ".join(path.name for path in paths)
        raise BadInput([Problem(str(location), names, "one GGUF model", "Name the file itself with --model_dir")])
    folder, _, count = next(iter(models))
    if not count:
        return paths
    parts = [folder / name for name in part_names(paths[0].name)]
    missing = [path.name for path in parts if not path.is_file()]
    if missing:
        shown = ", ".join(missing[:SHOWN]) + (f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else "")
        found = f"{count - len(missing)} of {count} parts; there is no {shown}"
        subject = str(folder / f"{_numbered(paths[0])[0]}-*")
        raise BadInput([Problem(subject, found, "all parts of the model", "Fetch the parts that are missing")])
    return parts


def part_names(name: str) -> list[str]:
    """The names of all parts of a model, of which `name` is one; the name itself of a file that is no part."""
    stem, count = _numbered(Path(name))
    return [f"{stem}-{n:05}-of-{count:05}.gguf" for n in range(1, count + 1)] or [name]


def _numbered(path: Path) -> tuple[str, int]:
    """The name of a part without its number, and how many parts there are; 0 for a file that is no part."""
    split = _SPLIT.search(path.name)
    return (path.name[: split.start()], int(split[2])) if split and 0 < int(split[1]) <= int(split[2]) else (path.name, 0)


def _split_problem(path: Path, number: int, count: int, metadata: Mapping[str, Any]) -> Problem | None:
    """Say where a file calls itself another part than its name does; None where it does not. `number`: from 0."""
    said = metadata.get("split.no", number), metadata.get("split.count", count)
    if said == (number, count) or (count == 1 and said == (0, 0)):  # 0 parts: made of several by llama.cpp's own tool
        return None
    expected = f"{number} and {count}, as the file is named" if count > 1 else "0 and 1: a whole model, as the file is named"
    remedy = "Give the parts the names that they were written with: NAME-00001-of-0000N.gguf"
    return Problem(f"{path}: split.no and split.count", f"{said[0]} and {said[1]}", expected, remedy)


def _count_problems(counts: Mapping[Path, Any], found: int) -> list[Problem]:
    """Say where a part has another number of tensors for the whole model than all parts have together; `found` is the latter."""
    remedy = "The parts are not of one model, or one is cut short: fetch them again"
    return [
        Problem(f"{path}: {COUNT}", repr(count), f"{found}, as all parts have together", remedy)
        for path, count in counts.items()
        if count != found
    ][:1]


def _open(path: Path) -> tuple[SourceFile, GgufHeader]:
    """Read a file's header. Raises BadInput where it is damaged, or its tensors do not tile the file."""
    with naming(path), open_regular(path) as file:
        status = os.fstat(file.fileno())
        try:
            header = read_header(path, file, status.st_size)
        except (ValueError, MemoryError) as error:
            raise BadInput([damaged(path, f"a header that cannot be read ({error})")]) from None
    if fault := _tiling(header, status.st_size):
        raise BadInput([damaged(path, fault)])
    return source_file(path, status, header.text), header


def _tiling(header: GgufHeader, file_bytes: int) -> str:
    """Say the first place where tensors do not lie one behind the other, each from a multiple of the file's alignment; "" for none.

    As in llama.cpp's own reader; a gap or an overlap means a wrong offset, shape or type. Padding behind the last tensor may be
    missing, and nothing else follows it.
    """
    alignment, begin = header.alignment, header.data_offset
    end, before = begin, "the header"
    for tensor in sorted(header.tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        expected = begin + -(-(end - begin) // alignment) * alignment
        if tensor.offset != expected:
            place = f"{tensor.name} at byte {tensor.offset:,}"
            if (tensor.offset - begin) % alignment:
                return f"{place}, which is no multiple of {alignment} behind the header's end at {begin:,}"
            if tensor.offset < expected:
                return f"{place}, inside {before}, which ends at {end:,}"
            return f"{place}, {tensor.offset - expected:,} bytes of no tensor behind {before}"
        end, before = tensor.offset + tensor.nbytes, tensor.name
    rest = file_bytes - (begin + -(-(end - begin) // alignment) * alignment)
    return f"{rest:,} bytes of no tensor behind {before}, the last one" if rest > 0 else ""


def _undecodable(kind: str) -> bool:
    """Return whether the gguf package cannot unpack this type into values."""
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[number][1]), dtype=np.uint8), number)
    except (NotImplementedError, ValueError, TypeError):
        return True
    return False


READER = GgufFiles()
