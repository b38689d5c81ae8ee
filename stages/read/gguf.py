"""Read GGUF files of llama.cpp: the metadata as the model's configuration, and the tensors as they are packed.

Unquantized tensors are mapped as float64, float32, float16 or bfloat16. Quantized ones are mapped as uint8 [rows, bytes of a row],
with the parameter named after the packing: a `weight` of type Q4_1 becomes `gguf_Q4_1`, which `unpack` recognises.
"""

from __future__ import annotations

import math
import re
import struct
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
from stages.read.mapped import MappedTensor
from stages.read.source_reader import SourceReader

MAGIC = b"GGUF"
SHORT_ARRAY = 1024  # of a metadata array with more values than this only the length is read
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
        metadata: dict[str, Any] = {}
        for path in _parts(location):
            try:
                status = path.stat()
                reader = _open(path)
            except BadInput as error:
                problems += error.problems
                continue
            metadata = metadata or _metadata(reader)
            for tensor in reader.tensors:
                kind, shape = tensor.tensor_type.name, tuple(int(n) for n in reversed(tensor.shape.tolist()))
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
                    bytes_by_type[kind] += int(tensor.n_bytes)
                dtype = PLAIN[kind].numpy if kind in PLAIN else np.dtype(np.uint8)
                stored = shape if kind in PLAIN else (*shape[:-1], int(tensor.n_bytes) // int(np.prod(shape[:-1])))
                tensors[name] = MappedTensor(str(path), int(tensor.data_offset), stored, dtype)
            with path.open("rb") as file:
                files.append(source_file(path, status, file.read(int(reader.data_offset))))
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


def _open(path: Path) -> Any:
    import gguf

    class _HeaderReader(gguf.GGUFReader):  # type: ignore[misc]
        """gguf's reader without the contents of long arrays: reading a vocabulary takes it seconds and hundreds of megabytes."""

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != gguf.GGUFValueType.ARRAY or self.byte_order != "I":
                return super()._get_field_parts(orig_offs, raw_type)
            kind, count = struct.unpack_from("<IQ", self.data, orig_offs)
            scalar = self.gguf_scalar_to_np.get(gguf.GGUFValueType(kind))
            if count * (8 if scalar is None else np.dtype(scalar).itemsize) > self.data.size - orig_offs:
                raise ValueError(f"an array of {count} values that reaches past the end")
            if count <= SHORT_ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            offset = orig_offs + 12
            if scalar is not None:
                offset += count * np.dtype(scalar).itemsize
            elif kind == gguf.GGUFValueType.STRING:
                for _ in range(count):
                    offset += 8 + struct.unpack_from("<Q", self.data, offset)[0]
            else:
                raise ValueError("an array of arrays")
            head = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
            return offset - orig_offs, head, [1], [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT64]

        def _build_tensors(self, start_offs: int, fields: Any) -> None:
            for field in fields:
                _, _, _, dims, raw_dtype, offset = field.parts
                kind = gguf.GGMLQuantizationType(raw_dtype[0])
                elements, size = gguf.GGML_QUANT_SIZES[kind]
                if len(dims) and int(dims[0]) % elements:
                    raise ValueError(
                        f"{field.name} with rows of {int(dims[0]):,} values, where {kind.name} has blocks of {elements}"
                    )
                end = start_offs + int(offset[0]) + math.prod(map(int, dims)) // elements * size
                if end > self.data.size:
                    raise ValueError(f"{field.name} up to byte {end:,} of {self.data.size:,}")
            super()._build_tensors(start_offs, fields)

    with naming(path), open_regular(path) as file:
        if file.read(4) != MAGIC:
            raise BadInput([_damaged(path, "a file that does not begin with GGUF")])
    try:
        with naming(path):
            reader = _HeaderReader(path)
        _metadata(reader)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, struct.error) as error:
        raise BadInput([_damaged(path, f"a header that cannot be read ({error})")]) from None
    if reader.byte_order != "I":
        raise BadInput([Problem(str(path), "a file of the other byte order", "a little-endian GGUF file")])
    if fault := _tiling(reader, path.stat().st_size):
        raise BadInput([_damaged(path, fault)])
    return reader


def _tiling(reader: Any, file_bytes: int) -> str:
    """Say the first place where tensors do not lie one behind the other, each from a multiple of the file's alignment; "" for none.

    As in llama.cpp's own reader; a gap or an overlap means a wrong offset, shape or type. Padding behind the last tensor may be
    missing, and nothing else follows it.
    """
    alignment, begin = int(reader.alignment), int(reader.data_offset)
    if alignment <= 0 or alignment & (alignment - 1):
        return f"general.alignment {alignment}, which is no power of 2"
    end, before = begin, "the header"
    for tensor in sorted(reader.tensors, key=lambda tensor: (int(tensor.data_offset), int(tensor.n_bytes))):
        start, nbytes = int(tensor.data_offset), int(tensor.n_bytes)
        expected = begin + -(-(end - begin) // alignment) * alignment
        if start != expected:
            place = f"{tensor.name} at byte {start:,}"
            if (start - begin) % alignment:
                return f"{place}, which is no multiple of {alignment} behind the header's end at {begin:,}"
            if start < expected:
                return f"{place}, inside {before}, which ends at {end:,}"
            return f"{place}, {start - expected:,} bytes of no tensor behind {before}"
        end, before = start + nbytes, str(tensor.name)
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


def _metadata(reader: Any) -> dict[str, Any]:
    values = {}
    for name, field in reader.fields.items():
        value = field.contents()
        if field.types[-1].name == "FLOAT32" and isinstance(value, float):
            value = float(str(np.float32(value)))  # 1e-05, not 9.999999747378752e-06
        values[name] = value
    return values


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


def _damaged(path: Path, found: str) -> Problem:
    return Problem(str(path), found, "a whole GGUF file", "The file is damaged or cut short: fetch it again")


READER = GgufFiles()
