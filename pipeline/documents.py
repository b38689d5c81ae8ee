"""JSON and TOML of strangers: regular files alone, and bounded in bytes, depth, values and digits.

A parser takes what it is given: a sparse file of gigabytes, fifty million empty lists, a number of a million digits, or a key of
fifty thousand parts take its memory and hours of its time, and a pipe makes it wait for ever. So a file's kind and size are looked
at before it is read, and what can be counted is counted before it is parsed.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import BadInput, Problem

MAX_BYTES = 100_000_000  # of a JSON text: the limit that the safetensors library has for a header
MAX_TOML_BYTES = 4 << 20  # of a text that people write
MAX_VALUES = 5_000_000  # brackets, braces and commas: the headers of the largest mixtures have a million and a half
MAX_DEPTH = 64  # of lists and objects in one another
MAX_DIGITS = 100  # of a number
LFS = b"version https://git-lfs.github.com/spec/v1"

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# A key of more parts than MAX_DEPTH; the quantifiers give nothing back, so that the search goes through a text once.
_PART = r"""(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+"""
_LONG_KEY = re.compile(rf"""(?<![\w"'-])(?:{_PART}\.[ \t]*+){{{MAX_DEPTH}}}{_PART}""")


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, if it is a regular file and not what Git LFS keeps in the place of one.

    A pipe, a socket or a device is not opened. Raises BadInput for these and for a pointer of Git LFS, OSError where the file
    cannot be opened.
    """
    _check_kind(path, os.stat(path).st_mode)  # noqa: PTH116 (a path may be of another kind by now: looked at again below)
    # With O_NONBLOCK, a pipe that has taken the file's place since does not wait for a writer.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    try:
        status = os.fstat(file.fileno())
        _check_kind(path, status.st_mode)
        if status.st_size < 1024 and file.read(len(LFS)) == LFS:
            remedy = "Run `git lfs install` and `git lfs pull` in the repository, or fetch the file with `hf download`"
            raise BadInput([Problem(str(path), "a pointer of Git LFS, in the place of the file", "the file itself", remedy)])
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def _check_kind(path: Path, mode: int) -> None:
    kind = _KINDS.get(stat.S_IFMT(mode))
    if kind:
        raise BadInput([Problem(str(path), kind, "a regular file")])


def read_document(path: Path, most_bytes: int = MAX_BYTES) -> tuple[bytes, os.stat_result]:
    """Read a whole file of at most `most_bytes`; return its bytes and its state. Raises as `open_regular`, BadInput for more."""
    with open_regular(path) as file:
        status = os.fstat(file.fileno())
        # Room for as much is taken at once as is asked for, which is no more than the file has.
        data = file.read(min(status.st_size, most_bytes) + 1) if status.st_size <= most_bytes else b""
        if len(data) > most_bytes or status.st_size > most_bytes:
            raise BadInput([Problem(str(path), f"{max(status.st_size, len(data)):,} bytes", f"at most {most_bytes:,}")])
    return data, status


def parse_json(
    data: bytes | str,
    *,
    pairs: Callable[[list[tuple[str, Any]]], Any] | None = None,
    constant: Callable[[str], Any] | None = None,
    integer: Callable[[str], int] = int,
) -> Any:
    """Parse a JSON text.

    Parameters
    ----------
    data
        The text, in UTF-8 where it is bytes.
    pairs, constant, integer
        What json.loads calls `object_pairs_hook`, `parse_constant` and `parse_int`, for readers that are stricter.

    Raises
    ------
    ValueError
        The text is no JSON, or has more bytes, values, depth or digits than any checkpoint.
    """
    text = data if isinstance(data, str) else data.decode("utf-8-sig")
    if len(text) > MAX_BYTES:
        raise ValueError(f"{len(text):,} characters, more than {MAX_BYTES:,}")
    # Those inside strings are counted too: the limit is far above what any file has.
    values = text.count("[") + text.count("{") + text.count(",")
    if values > MAX_VALUES:
        raise ValueError(f"{values:,} values, more than {MAX_VALUES:,}")
    try:
        value = json.loads(
            text,
            object_pairs_hook=pairs,
            parse_constant=constant,
            parse_int=lambda digits: integer(_bounded(digits)),
            parse_float=lambda digits: float(_bounded(digits)),
        )
    except RecursionError:
        raise ValueError(_too_deep()) from None
    check_depth(value)
    return value


def read_json(path: Path) -> Any:
    """Read and parse a JSON file. Raises OSError, BadInput and ValueError as `read_document` and `parse_json`."""
    return parse_json(read_document(path)[0])


def read_object(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file; empty where there is no such file, or it is unfit to be read or no object."""
    try:
        value = read_json(path)
    except (OSError, ValueError, BadInput):
        return {}
    return value if isinstance(value, dict) else {}


def read_toml_file(path: Path, expected: str) -> dict[str, Any]:
    """Read a TOML file that somebody wrote.

    `expected`: what the file should be, for messages. Raises BadInput where it cannot be read, is no TOML, or has more bytes, depth
    or digits than anybody writes.
    """
    try:
        text = read_document(path, MAX_TOML_BYTES)[0].decode()
        if _LONG_KEY.search(text):
            raise ValueError(f"a key of more than {MAX_DEPTH} parts")
        value = tomllib.loads(text)
        check_depth(value)
    except IsADirectoryError:
        remedy = "A checkpoint is given by an option: --model_dir"
        raise BadInput([Problem(str(path), "a directory", f"{expected}, in TOML", remedy)]) from None
    except OSError as error:
        raise BadInput([Problem(str(path), error.strerror or "an error", expected)]) from None
    except RecursionError:
        raise BadInput([Problem(str(path), f"text that is not TOML ({_too_deep()})", expected)]) from None
    except ValueError as error:
        raise BadInput([Problem(str(path), f"text that is not TOML ({error})", expected)]) from None
    return value


def check_depth(value: Any) -> None:
    """Raise ValueError where lists and objects are more than MAX_DEPTH deep: what prints or compares them would fail."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inner += [one for one in each.values() if isinstance(one, dict | list)]
            elif isinstance(each, list):
                inner += [one for one in each if isinstance(one, dict | list)]
        if not inner:
            return
        level = inner
    raise ValueError(_too_deep())


def _too_deep() -> str:
    return f"lists or objects more than {MAX_DEPTH} deep"


def _bounded(digits: str) -> str:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return digits
