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
from stages.read.gguf_header import MAGIC, GgufHeader, damaged, read_header
from stages.read.mapped import MappedTensor
from stages.read.source_reader import SourceReader

PLAIN = {name: BY_SAFETENSORS[name] for name in ("F64", "F32", "F16", "BF16")}  # GGUF calls them the same
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


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
        bytes_by_type: Counter[str] = Counter()
        unpackable: dict[str, bool] = {}
        files: list[SourceFile] = []
        metadata: Mapping[str, Any] = {}
        for path in _parts(location):
            try:
                file, header = _open(path)
            except BadInput as error:
                problems += error.problems
                continue
            files.append(file)
            metadata = metadata or header.metadata
            for tensor in header.tensors:
                kind, shape = tensor.kind, tensor.shape
                module, _, parameter = tensor.name.rpartition(".")
                name = tensor.name if kind in PLAIN else f"{module}.gguf_{kind}"
                if name in tensors:
                    problems.append(Problem(tensor.name, f"the tensor again in {path.name}", "one home"))
                if kind not in PLAIN and parameter != "weight":
                    problems.append(Problem(tensor.name, f"type {kind}", "an unpacked type: only weights are packed"))
                if kind not in PLAIN and kind not in unpackable:
                    unpackable[kind] = not _undecodable(kind)
                if not unpackable.get(kind, True):
                    problems.append(Problem(tensor.name, f"type {kind}", "a type of weights that the gguf package unpacks"))
                if len(shape) > 1:
                    bytes_by_type[kind] += tensor.nbytes
                dtype = PLAIN[kind].numpy if kind in PLAIN else np.dtype(np.uint8)
                stored = shape if kind in PLAIN else (*shape[:-1], tensor.row_bytes)
                tensors[name] = MappedTensor(str(path), tensor.offset, stored, dtype)
        if problems:
            raise BadInput(problems)
        architecture = str(metadata.get("general.architecture", ""))
        config = _config(metadata, architecture, tensors, location)
        commonest = bytes_by_type.most_common(1)[0][0] if bytes_by_type else ""
        return Source(
            kind=f"GGUF ({commonest})",
            location=location,
            container="gguf",
            architecture=architecture + ("+experts" if config.get("expert_count") else ""),
            config=config,
            config_name=str(location),
            tensors=tensors,
            files=tuple(files),
            dtype=(PLAIN[commonest].target or None) if commonest in PLAIN else None,
        )


def _parts(location: Path) -> list[Path]:
    paths = [location] if location.is_file() else sorted(location.glob("*.gguf"))
    split = _SPLIT.search(paths[0].name)
    if split:
        stem, count = paths[0].name[: split.start()], int(split[2])
        paths = [paths[0].parent / f"{stem}-{n:05}-of-{count:05}.gguf" for n in range(1, count + 1)]
        missing = [Problem(str(path), "no such file", f"one of {count} parts") for path in paths if not path.is_file()]
        if missing:
            raise BadInput(missing)
    elif len(paths) > 1:
        names = ", ".join(path.name for path in paths)
        raise BadInput([Problem(str(location), names, "one GGUF model", "Name the file itself with --model_dir")])
    return paths


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


def _config(metadata: Mapping[str, Any], architecture: str, tensors: Mapping[str, LazyTensor], location: Path) -> dict[str, Any]:
    """Return the configuration: the architecture's keys without their prefix, and what GGUF keeps elsewhere under further keys."""
    prefix = f"{architecture}."
    config = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    if "tokenizer.ggml.tokens" in metadata:
        tokens = metadata["tokenizer.ggml.tokens"]
        # The reader gives a long array's length in its place.
        config.setdefault("vocab_size", len(tokens) if isinstance(tokens, list) else tokens)
    config["attention.bias"] = "blk.0.attn_q.bias" in tensors
    scaling = _rope_scaling(config, tensors.get("rope_freqs.weight"), location)
    if scaling:
        config["rope_scaling"] = scaling
    return config


def _rope_scaling(config: Mapping[str, Any], factors: LazyTensor | None, location: Path) -> dict[str, Any] | None:
    """Return the scaling of rotary positions as config.json would have it; None where there is none.

    GGUF has it as metadata (linear scaling) or as a tensor of frequency factors (Llama 3.1). In the latter case the parameters are
    recovered from the factors and checked against every one. Raises BadInput for any other kind of scaling.
    """
    kind = config.get("rope.scaling.type", "none")
    if factors is None:
        if kind == "none":
            return None
        factor = config.get("rope.scaling.factor")
        if kind == "linear" and isinstance(factor, int | float) and not isinstance(factor, bool):
            return {"rope_type": "linear", "factor": float(factor)}
        raise BadInput([Problem(f"{location}: rope.scaling.type", str(kind), "none, linear with a factor, or Llama 3.1's factors")])
    stored = np.asarray(factors.block(tuple((0, n) for n in factors.shape)), dtype=np.float64)
    if not stored.size or not np.all(np.isfinite(stored)) or stored.min() < 1:
        raise BadInput([Problem(f"{location}: rope_freqs.weight", f"{stored.size} factors", "factors of 1 or more")])
    base = config.get("rope.freq_base", 10000.0)
    if isinstance(base, bool) or not isinstance(base, int | float) or not base > 0:
        raise BadInput([Problem(f"{location}: rope.freq_base", repr(base), "a number greater than 0")])
    scaling = {
        "factor": float(round(float(stored.max()), 3)),
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    if not np.allclose(stored, llama3_factors(float(base), 2 * stored.size, scaling), rtol=1e-3):
        expected = "the factors of a llama3 scaling with bands 1 to 4 of 8192 positions"
        raise BadInput([Problem(f"{location}: rope_freqs.weight", f"factors {stored.min():g} to {stored.max():g}", expected)])
    return scaling


def llama3_factors(base: float, head_size: int, scaling: Mapping[str, Any]) -> np.ndarray:
    """Return the factors by which Llama 3.1 divides the rotary frequencies: float64 [head_size / 2]."""
    wavelengths = 2 * np.pi * base ** (np.arange(0, head_size, 2) / head_size)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (scaling["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    factors: np.ndarray = 1 / (np.clip(smooth, 0, 1) * (1 - 1 / scaling["factor"]) + 1 / scaling["factor"])
    return factors


READER = GgufFiles()
