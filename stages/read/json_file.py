"""Read a checkpoint's JSON files, with a fingerprint of each that tells a changed file from an unchanged one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.documents import parse_json, read_document
from pipeline.errors import BadInput, Problem
from pipeline.tensor.source_file import SourceFile, source_file
from pipeline.tensor.system_errors import REMEDIES


def json_file(path: Path) -> tuple[dict[str, Any], SourceFile]:
    """Return the object in a JSON file and the file's fingerprint.

    Raises BadInput where it cannot be read, is no regular file, or holds no object.
    """
    try:
        text, status = read_document(path)
        value = parse_json(text)
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, "")
        raise BadInput([Problem(str(path), f"what cannot be read ({error.strerror})", "a JSON file", remedy)]) from None
    except ValueError as error:
        raise BadInput([Problem(str(path), f"text that is not JSON ({error})", "a JSON object")]) from None
    if not isinstance(value, dict):
        raise BadInput([Problem(str(path), f"a JSON {type(value).__name__}", "a JSON object")])
    return value, source_file(path, status, text)
