"""Read a job file in TOML, and make the paths of a job absolute."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.documents import read_toml_file
from pipeline.errors import BadInput, Problem
from pipeline.planning import engine_options
from pipeline.planning.home import at_home, from_folder
from pipeline.tensor.remote_path import RemotePath, as_path, url_fault

# Options that are paths, and those that are lists of them.
PATHS = {
    "model_dir",
    "meta_ckpt_dir",
    "quant_ckpt_path",
    "act_range",
    "calibration_tokens",
    "calib_dataset",
    "output_dir",
    "performance_report",
    "scratch",
}
LISTS_OF_PATHS = {"scratch_outputs"}
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?")  # with a tag: one of several GGUF models


def absolute_path(value: Any) -> Any:
    """Return a path made absolute from the current directory, links left as they are; anything but a string or path unchanged.

    Raises ValueError for an empty string, and for a home directory that is not known.
    """
    if not isinstance(value, str | Path):
        return value
    if not str(value):
        raise ValueError("a path that is not empty")
    return Path(os.path.abspath(at_home(value)))  # noqa: PTH100 (links stay as they are)


def output_place(value: Any) -> Any:
    """Return a URL as a RemotePath, `file://` ones aside; else an absolute path.

    Raises ValueError for a URL of no place for outputs.
    """
    if isinstance(value, RemotePath) or not isinstance(value, str) or "://" not in value:
        return value if isinstance(value, RemotePath) else absolute_path(value)
    if value.startswith("file://"):
        return absolute_path(value.removeprefix("file://"))
    if fault := url_fault(value):
        raise ValueError(fault)
    return as_path(value)


def model_name(value: Any) -> Any:
    """Return a URL, or the id of a model on the Hugging Face Hub where no such path exists, as it is; else an absolute path."""
    if isinstance(value, str) and ("://" in value or HUB_ID.fullmatch(value)) and not Path(value).exists():
        return value
    return absolute_path(value)


def revision_problems(model: Path | str | None, revision: str | None) -> list[Problem]:
    """Say that a revision stands beside what is no model on the Hub, or beside a URL, which names its own."""
    subject, expected = f"--revision {revision}", "a model on the Hub, org/name"
    if revision and not isinstance(model, str):
        return [Problem(subject, f"the local path {model}", expected)]
    if revision and "://" in str(model):
        return [Problem(subject, "a URL beside it", f"hf://org/name@revision, or {expected}")]
    return []


def scratch_root(value: Any) -> Any:
    """Return a URL without a trailing slash, or the absolute path of a directory or `file://` URL, as a string."""
    if not isinstance(value, str | Path):
        return value
    if isinstance(value, str) and "://" in value:
        return value.removeprefix("file://").rstrip("/") if value.startswith("file://") else value.rstrip("/")
    return str(absolute_path(value))


def read_job_file(file: Path) -> dict[str, Any]:
    """Read the options of a TOML job file, with paths relative to the file made absolute.

    A `[scratch]` table becomes the options `scratch`, `scratch_after` and `keep_scratch`. Values are not checked here. Raises
    BadInput where the file cannot be read, is not TOML, or its `[scratch]` table has an unknown key.
    """
    values = read_toml_file(file, "a job file")
    scratch = values.pop("scratch", None)
    if isinstance(scratch, dict):
        names = {"dir": "scratch", "after": "scratch_after", "keep": "keep_scratch"}
        unknown = sorted(set(scratch) - set(names))
        if unknown:
            raise BadInput([Problem(f"{file}: scratch.{unknown[0]}", "an option that headrace does not have", ", ".join(names))])
        values |= {names[key]: value for key, value in scratch.items()}
    elif scratch is not None:
        values["scratch"] = scratch
    return anchored(values, file.absolute().parent)


def anchored(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return options with their paths made absolute from `folder`, that of the file which they are from.

    `[[target]]` and `[engine]` tables are included. A `model_dir` that is no path there may be a model on the Hub, and is kept.
    """
    result = dict(values)
    if isinstance(values.get("target"), list):
        result["target"] = [anchored(table, folder) if isinstance(table, dict) else table for table in values["target"]]
    if isinstance(values.get("engine"), dict):
        result["engine"] = engine_options.anchored(values["engine"], folder)
    if isinstance(values.get("cluster"), dict) and isinstance(tls := values["cluster"].get("tls"), dict):
        files = {key: str(from_folder(value, folder)) if isinstance(value, str) else value for key, value in tls.items()}
        result["cluster"] = {**values["cluster"], "tls": files}
    for key in PATHS & set(values):
        result[key] = _place(values[key], folder, key)
    for key in LISTS_OF_PATHS & set(values):
        if isinstance(values[key], list):
            result[key] = [_place(each, folder, key) for each in values[key]]
    return result


def _place(value: Any, folder: Path, key: str) -> Any:
    """A path made absolute from `folder`; a URL, a model on the Hub, or what is no path at all, as it is."""
    if not isinstance(value, str) or "://" in value:
        return value
    path = from_folder(value, folder)
    return value if key == "model_dir" and HUB_ID.fullmatch(value) and not Path(path).exists() else path
