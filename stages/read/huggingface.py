"""Hugging Face checkpoint directories: config.json and safetensors shards, with or without an index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.dtypes import BY_TARGET
from pipeline.errors import BadInput, Problem
from pipeline.tensors import LazyTensor, Source, SourceFile
from stages.read import safetensors

INDEX = "model.safetensors.index.json"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
)


def detect(location: Path) -> bool:
    """Whether `location` is a directory that Hugging Face tools would load: it has a config.json or safetensors files."""
    return location.is_dir() and ((location / "config.json").exists() or any(location.glob("*.safetensors")))


def open_source(location: Path) -> Source:
    """Open a directory: read config.json, the index, and every shard's header. Raises BadInput with all problems found."""
    config, config_file = _config(location / "config.json")
    problems: list[Problem] = []
    shards, listed = _shards(location, problems)
    tensors: dict[str, LazyTensor] = {}
    homes: dict[str, Path] = {}
    files = [config_file]
    for path in shards:
        try:
            file, found = safetensors.open_file(path)
        except BadInput as error:
            problems += error.problems
            continue
        except OSError as error:
            problems.append(Problem(str(path), f"a file that cannot be read ({error.strerror})", "a readable file"))
            continue
        files.append(file)
        for name, tensor in found.items():
            if name in homes:
                remedy = "Remove one of the files, or the tensor from one of them"
                problems.append(Problem(name, f"the tensor in both {homes[name].name} and {path.name}", "one home", remedy))
            homes[name] = path
            tensors[name] = tensor
    opened = {str(file.path.relative_to(location)) for file in files}
    problems += [
        Problem(name, f"no such tensor in {file}", f"the tensor there, as {INDEX} says", "Fetch both again")
        for name, file in listed.items()
        if file in opened and name not in homes
    ]
    architecture = _architecture(config, config_file.path, problems)
    dtype = _dtype(config, config_file.path, problems)
    if problems:
        raise BadInput(problems)
    return Source(
        kind="Hugging Face safetensors",
        location=location,
        container="huggingface",
        architecture=architecture,
        config=config,
        config_name=str(config_file.path),
        tensors=tensors,
        files=tuple(files),
        dtype=dtype,
        companions=tuple(location / name for name in TOKENIZER if (location / name).is_file()),
    )


def _config(path: Path) -> tuple[dict[str, Any], SourceFile]:
    if not path.is_file():
        raise BadInput([Problem(str(path), "no such file", "the model's configuration", "Fetch it with the checkpoint")])
    config, text = _json_object(path)
    status = path.stat()
    return config, SourceFile(path, status.st_size, status.st_mtime_ns, hashlib.sha256(text).hexdigest())


def _architecture(config: Mapping[str, Any], path: Path, problems: list[Problem]) -> str:
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures and isinstance(architectures[0], str):
        return architectures[0]
    problems.append(Problem(f"{path}: architectures", repr(architectures), 'a list such as ["LlamaForCausalLM"]'))
    return ""


def _dtype(config: Mapping[str, Any], path: Path, problems: list[Problem]) -> str | None:
    """`torch_dtype`, or `dtype` as transformers 5 writes it; None where there is neither."""
    key = next((key for key in ("torch_dtype", "dtype") if config.get(key) is not None), None)
    if key is None:
        return None
    name = str(config[key]).removeprefix("torch.")
    if not isinstance(config[key], str) or name not in BY_TARGET:
        problems.append(Problem(f"{path}: {key}", repr(config[key]), f"one of {', '.join(sorted(BY_TARGET))}"))
    return name


def _shards(location: Path, problems: list[Problem]) -> tuple[list[Path], dict[str, str]]:
    """The shard files, and which file the index says each tensor is in (nothing where there is no index)."""
    index = location / INDEX
    if not index.exists():
        single = location / "model.safetensors"
        paths = [single] if single.exists() else sorted(location.glob("*.safetensors"))
        if not paths:
            names = ", ".join(sorted(path.name for path in location.iterdir())[:8]) or "nothing"
            problems.append(Problem(str(location), names, f"model.safetensors, or shards and {INDEX}"))
        return paths, {}
    listed = _json_object(index)[0].get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        problems.append(Problem(f"{index}: weight_map", str(listed)[:80], "tensor names and the file of each"))
        return [], {}
    paths = []
    for file in sorted(set(listed.values())):
        # Lexically: a shard may well be a link to elsewhere, as in the Hub's cache, but the index may not lead out by itself.
        parts = PurePosixPath(file).parts
        if not parts or file.startswith("/") or ".." in parts or "\\" in file:
            problems.append(Problem(str(index), f"the shard {file!r}", "a file inside the directory"))
        elif not _is_file(location / file):
            count = sum(1 for home in listed.values() if home == file)
            problems.append(
                Problem(str(location / file), "no such file", f"the {count} tensors that {INDEX} says it holds", "Fetch it")
            )
        else:
            paths.append(location / file)
    return paths, listed


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the file system
        return False


def _json_object(path: Path) -> tuple[dict[str, Any], bytes]:
    try:
        text = path.read_bytes()
        value = json.loads(text)
    except OSError as error:
        raise BadInput([Problem(str(path), f"what cannot be read ({error.strerror})", "a JSON file")]) from None
    except (ValueError, RecursionError) as error:
        raise BadInput([Problem(str(path), f"text that is not JSON ({error})", "a JSON object")]) from None
    if not isinstance(value, dict):
        raise BadInput([Problem(str(path), f"a JSON {type(value).__name__}", "a JSON object")])
    return value, text
