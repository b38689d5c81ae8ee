"""TOML files: those that people write, read into a model with every mistake named by file and key, and job files for children."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import BadInput, Problem, WriteFailed
from pipeline.planning.wrong_values import place, unknown_name, unlike, wrong_value


class Table(BaseModel):
    """A table of a file: its keys are its fields, and nothing else."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Model = TypeVar("Model", bound=BaseModel)


def validate(model: type[Model], values: Mapping[str, Any], file: str) -> Model:
    """The values as a model. Raises BadInput with every key that is wrong, missing or unknown."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise BadInput([_problem(detail, file, model) for detail in unlike(error.errors())]) from None


def _problem(detail: Mapping[str, Any], file: str, model: type[BaseModel]) -> Problem:
    key = place(detail["loc"])
    subject = f"{file}: {key}" if key else file
    if detail["type"] == "extra_forbidden":
        names = _keys(model, detail["loc"][:-1])
        return unknown_name(subject, str(detail["loc"][-1]), names, "a key that headrace does not have", ", ".join(names))
    return wrong_value(subject, detail)


def _keys(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """The keys of the table at a path of the model."""
    kind: Any = model
    for part in path:
        if isinstance(part, str) and isinstance(kind, type) and issubclass(kind, BaseModel):
            annotation: Any = kind.model_fields[part].annotation
            arguments = [each for each in getattr(annotation, "__args__", ()) if isinstance(each, type)]
            kind = next((each for each in [annotation, *arguments] if isinstance(each, type) and issubclass(each, BaseModel)), None)
    return sorted(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else ["no more"]


def job_file(options: Mapping[str, Any]) -> str:
    """The text of a job file with these options, plain values of a Job's fields. Raises ValueError for a name that is not UTF-8."""
    lines = [f"{key} = {_value(value)}" for key, value in options.items() if key != "target"]
    for table in options.get("target", ()):
        lines += ["", "[[target]]", *(f"{key} = {_value(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def write_job(file: Path, options: Mapping[str, Any]) -> None:
    """Write a job file, with its directory. Raises OSError, and ValueError as `job_file`."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(job_file(options))


def printable(text: str) -> str:
    """A name of a file as text: bytes of it that are no UTF-8 as backslash escapes."""
    return text.encode(errors="backslashreplace").decode()


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_value(key)} = {_value(each)}' for key, each in value.items())}}}"
    if isinstance(value, str):
        value.encode()  # what is no UTF-8 stands in surrogates, which TOML does not know, nor the store
    # What JSON escapes, TOML's basic strings escape alike; DEL they escape too.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")


def check_writable(subject: str, file: Path) -> None:
    """Check that a file can be written, leaving all as it is. Raises BadInput."""
    try:
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not file.exists():
            with tempfile.TemporaryFile(dir=file.parent):
                pass
        elif not os.access(file, os.W_OK):  # a pipe must not be opened twice
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise BadInput([Problem(subject, error.strerror or "an error", "a file that can be written")]) from None


def write_json(subject: str, file: Path, values: Any) -> None:
    """Write values as JSON. Raises WriteFailed where the file cannot be written."""
    try:
        file.write_text(json.dumps(values, indent=2) + "\n")
    except OSError as error:
        raise WriteFailed(f"{subject}: {error.strerror or 'an error'}") from None
