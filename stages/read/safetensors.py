"""Read safetensors files: the header, checked as strictly as the format allows, and the tensors as mapped byte ranges.

A file is 8 bytes of header length (little-endian), a JSON header, then the tensors' bytes without gaps. Only the header is read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.documents import open_regular, parse_json
from pipeline.errors import BadInput, Problem
from pipeline.model.dtypes import BY_SAFETENSORS
from pipeline.printed import many
from pipeline.tensor.source_file import SourceFile, source_file
from pipeline.tensor.system_errors import naming
from stages.read.mapped import MappedTensor

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
UNREAD_TYPES = {"C64", "F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}  # of the library, that no tensor here may have
MAX_AXES = 8  # more than any checkpoint has, fewer than NumPy allows
MAX_SIZE = 1 << 62  # of a number in a header, so that products of sizes stay printable


def open_file(path: Path) -> tuple[SourceFile, dict[str, MappedTensor]]:
    """Read and check one file's header; return the file's fingerprint and its tensors by name.

    Raises BadInput with every problem of the file, and OSError where it cannot be read.
    """
    with naming(path), open_regular(path) as file:
        status = os.fstat(file.fileno())
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8:
            raise BadInput([_damaged(path, f"{status.st_size} bytes", "at least 8: the header's length")])
        if length > min(status.st_size - 8, MAX_HEADER_BYTES):
            found = f"a header of {length:,} bytes in a file of {status.st_size:,}"
            raise BadInput([_damaged(path, found, "a header inside the file, of at most 100 MB")])
        header = file.read(length)
    tensors, problems = parse_header(header, status.st_size - 8 - length, path)
    if problems:
        raise BadInput(problems)
    return source_file(path, status, prefix + header), tensors


def file_metadata(path: Path) -> dict[str, str]:
    """The texts in the header of a file, by name; none of what is no such file."""
    try:
        with open_regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
            held = parse_json(file.read(min(length, MAX_HEADER_BYTES)).decode("utf-8")).get("__metadata__", {})
    except (OSError, ValueError, AttributeError, BadInput):
        return {}
    return {key: value for key, value in held.items() if isinstance(value, str)} if isinstance(held, dict) else {}


def parse_header(header: bytes, data_bytes: int, path: Path) -> tuple[dict[str, MappedTensor], list[Problem]]:
    """Return the tensors by name, and all problems, of a header that is followed by `data_bytes` bytes of data. Never raises."""
    try:
        text = header.decode("utf-8")
        entries = parse_json(text, pairs=_no_duplicates, constant=_no_constant, integer=_number)
        json.dumps(entries, ensure_ascii=False).encode()  # raises for half a surrogate pair
    except ValueError as error:
        return {}, [_damaged(path, f"a header that is not JSON ({error})", "a JSON object")]
    if not isinstance(entries, Mapping):
        return {}, [_damaged(path, f"a header that is a JSON {type(entries).__name__}", "a JSON object")]
    tensors, problems, ranges = {}, [], []
    outside: list[tuple[int, int, str]] = []
    unknown: dict[str, list[str]] = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            if not isinstance(entry, Mapping) or not all(isinstance(value, str) for value in entry.values()):
                problems.append(_damaged(path, f"{str(entry)[:80]}", "an object of strings", name))
            continue
        try:
            dtype, shape, start, stop = _entry(entry)
        except ValueError as error:
            problems.append(_damaged(path, str(error), "a dtype, a shape and data_offsets", name))
            continue
        row = BY_SAFETENSORS.get(dtype)
        if row is None:
            unknown.setdefault(dtype, []).append(name)
        elif not 0 <= start <= stop <= data_bytes:
            outside.append((start, stop, name))
        elif stop - start != math.prod(shape) * row.numpy.itemsize:
            expected = f"{math.prod(shape) * row.numpy.itemsize:,} for {dtype} {list(shape)}"
            problems.append(_damaged(path, f"{stop - start:,} bytes", expected, name))
        else:
            ranges.append((start, stop, name))
            tensors[name] = MappedTensor(str(path), 8 + len(header) + start, shape, row.numpy)
    problems += _outside(outside, data_bytes, path)
    problems = [*(_unknown_type(path, dtype, names) for dtype, names in unknown.items()), *problems]
    if not problems:
        problems = _tiling(sorted(ranges), data_bytes, path)
    return tensors, problems


def _outside(ranges: list[tuple[int, int, str]], data_bytes: int, path: Path) -> list[Problem]:
    """The problem of tensors that are not inside the file: one, however many they are, as a file that is cut short has many."""
    if len(ranges) < 2:
        expected = f"offsets inside the file's {data_bytes:,} bytes of data"
        return [_damaged(path, f"data_offsets [{start}, {stop}]", expected, name) for start, stop, name in ranges]
    end = max(stop for _, stop, _ in ranges)
    found = f"{data_bytes:,} bytes of data, behind which {many(len(ranges), 'tensor')} would end ({ranges[0][2]}, ...)"
    return [_damaged(path, found, f"{end:,}, where the last tensor ends")]


def _entry(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Return an entry's dtype, shape, and first and last offset. Raises ValueError where it is not as the format has it."""
    if not isinstance(entry, Mapping) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"an entry {str(entry)[:80]}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    for values, key in ((shape, "shape"), (offsets, "data_offsets")):
        if not isinstance(values, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in values):
            raise ValueError(f"{key} {str(values)[:80]}")
    if len(offsets) != 2 or any(n < 0 for n in shape):
        raise ValueError(f"shape {str(shape)[:80]}, data_offsets {str(offsets)[:80]}")
    if len(shape) > MAX_AXES or math.prod(filter(None, shape)) > MAX_SIZE or max(offsets) > MAX_SIZE:
        raise ValueError(f"a shape of {len(shape)} axes or of more elements than a file can hold")
    return str(entry["dtype"])[:80], tuple(shape), offsets[0], offsets[1]


def _tiling(ranges: list[tuple[int, int, str]], data_bytes: int, path: Path) -> list[Problem]:
    """Check that the tensors' byte ranges have no gaps and no overlaps; either means a file cut short or a wrong header."""
    problems, end = [], 0
    for start, stop, name in ranges:
        if start != end:
            fault = "overlapping the tensor before it" if start < end else f"after {start - end:,} bytes of no tensor"
            problems.append(_damaged(path, f"data_offsets [{start}, {stop}] {fault}", f"data from byte {end}", name))
        end = max(end, stop)
    if end != data_bytes:
        problems.append(_damaged(path, f"{data_bytes:,} bytes of data", f"{end:,}, where the last tensor ends"))
    return problems


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key that stands twice")
    return result


def _no_constant(text: str) -> None:
    raise ValueError(f"{text}, which JSON does not have")


def _number(text: str) -> int:
    if text == "-0":
        raise ValueError("-0, which is no size")
    return int(text)


def _unknown_type(path: Path, dtype: str, names: list[str]) -> Problem:
    count = f" and {len(names) - 1} more" if len(names) > 1 else ""
    remedy = (
        "headrace reads no values of this type of safetensors: convert the model that it was made from"
        if dtype in UNREAD_TYPES
        else "The file is damaged, or of a later version of safetensors: save it again with types from this list"
    )
    return Problem(f"{path}: {names[0]}{count}", f"dtype {dtype!r}", f"one of {', '.join(BY_SAFETENSORS)}", remedy)


def _damaged(path: Path, found: str, expected: str, tensor: str = "") -> Problem:
    subject = f"{path}: {tensor}" if tensor else str(path)
    return Problem(subject, found, expected, "The file is damaged or cut short: fetch it again")
