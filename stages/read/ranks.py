"""Open a TensorRT-LLM checkpoint: config.json, rank{N}.safetensors and, where headrace wrote it, headrace.json."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.documents import parse_json, read_document
from pipeline.errors import BadInput, Problem
from pipeline.tensor.checkpoint import Checkpoint
from pipeline.tensor.remote_path import RemotePath
from stages.read.mapped import MappedTensor
from stages.read.remote import image_of, remote_tensor
from stages.read.safetensors import open_file

NULLABLE = ("quantization", "moe")  # tables of config.json


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read a checkpoint's config.json and the headers of its rank files. Their contents are not checked against each other.

    Context-parallel ranks share files, as in the loader of TensorRT-LLM (PretrainedModel.from_checkpoint). Raises BadInput naming
    all files that are missing or cannot be read.
    """
    if isinstance(directory, RemotePath):
        return _open_remote(directory)
    return _open_here(directory)


def _open_remote(directory: RemotePath) -> Checkpoint:
    """Read a checkpoint below a URL: its headers here, its tensors by ranges of bytes, if the objects are those of now."""
    url = str(directory)
    place, objects = image_of(url)
    try:
        found = _open_here(place)
    except BadInput as error:
        raise BadInput([replace(each, subject=each.subject.replace(str(place), url)) for each in error.problems]) from None
    etags = {each.name: each.etag for each in objects}
    ranks = tuple(
        {name: remote_tensor(tensor, url, etags) for name, tensor in rank.items() if isinstance(tensor, MappedTensor)}
        for rank in found.ranks
    )
    return Checkpoint(directory, found.config, ranks, found.provenance, tuple(sorted(etags)))


def _open_here(directory: Path) -> Checkpoint:
    config = _object(directory / "config.json", "a finished TensorRT-LLM checkpoint")
    _refuse_sources(directory, config)
    provenance = _object(directory / "headrace.json", "") if (directory / "headrace.json").exists() else {}
    # To the loader a table that is null is none, so that it is none to all who read it.
    config = {key: value for key, value in config.items() if value is not None or key not in NULLABLE}
    mapping = config["mapping"] if isinstance(config.get("mapping"), Mapping) else {}
    count = mapping.get("world_size")
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= 1 << 16:
        raise BadInput([Problem(f"{directory / 'config.json'}: mapping.world_size", repr(count), "the number of ranks")])
    cp_size = mapping.get("cp_size", 1)
    if isinstance(cp_size, int) and cp_size > 1 and count % cp_size == 0:  # any other value is reported by the verifier
        count //= cp_size
    problems, ranks = [], []
    for number in range(count):
        path = directory / f"rank{number}.safetensors"
        try:
            ranks.append(open_file(path)[1])
        except OSError as error:
            problems.append(Problem(str(path), error.strerror or str(error), f"the file of rank {number} of {count}"))
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)
    return Checkpoint(directory, config, tuple(ranks), provenance, tuple(sorted(path.name for path in directory.iterdir())))


def refuse_source(directory: Path) -> None:
    """Raise BadInput for a directory that is no output but a source, with what to do with it; not for one that cannot be read."""
    config: Any = None
    with suppress(OSError, ValueError, BadInput):
        config = parse_json(read_document(directory / "config.json")[0])
    if isinstance(config, dict):
        _refuse_sources(directory, config)


def _refuse_sources(directory: Path, config: Mapping[str, Any]) -> None:
    """Raise BadInput where config.json is Hugging Face's, whose keys TensorRT-LLM's has not."""
    named = config.get("architectures")
    if "mapping" in config or "architecture" in config or not (isinstance(named, list) or "model_type" in config):
        return
    what = f" ({named[0]})" if isinstance(named, list) and named else ""
    found = f"a Hugging Face checkpoint{what}, which is a source"
    remedy = f"Convert it first, as by headrace convert --model_dir {directory} --output_dir ranks"
    raise BadInput([Problem(str(directory), found, "what headrace convert wrote: config.json and rank{N}.safetensors", remedy)])


def _object(path: Path, expected: str) -> dict[str, Any]:
    """Read a JSON object. Raises BadInput where it cannot be read; `expected`: what the message then says was expected."""
    try:
        text, _ = read_document(path)
        if not text.strip(b"\0 \n"):  # a power cut leaves a file of no bytes, or of zeros
            wanted = expected or "what headrace wrote there"
            raise BadInput([Problem(str(path), "an empty file", wanted, "The checkpoint is not complete: convert it again")])
        value = parse_json(text)
    except OSError as error:
        raise BadInput([Problem(str(path), error.strerror or str(error), expected or "a readable file")]) from None
    except ValueError as error:
        raise BadInput([Problem(str(path), f"no JSON ({error})", "a JSON object")]) from None
    if not isinstance(value, dict):
        raise BadInput([Problem(str(path), f"a JSON {type(value).__name__}", "a JSON object")])
    return value
