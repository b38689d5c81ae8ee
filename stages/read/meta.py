"""Meta's checkpoints: params.json, and consolidated.NN.pth, each one model-parallel rank's share of every tensor.

Facts: TensorRT-LLM checkpoint format, section 3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import BadInput, Problem
from pipeline.placement import whole
from pipeline.tensors import LazyTensor, Source, SourceFile
from stages.read import torch_pickle
from stages.read.joined import JoinedTensor
from stages.read.json_file import json_file

PARAMS = "params.json"
_PART = re.compile(r"consolidated\.(\d+)(\.pth)?")
# The axis that a module's tensors are split on over the parts. What is not here each part holds whole; the embedding was split on
# the hidden axis for Llama 1 and 2 and is on the vocabulary for Llama 3.
_AXES = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}
_EMBEDDING = "tok_embeddings"
_SIZES = ("dim", "n_layers", "n_heads")


def detect(location: Path) -> bool:
    """Whether `location` is a directory with params.json and parts."""
    return location.is_dir() and (location / PARAMS).is_file() and bool(_numbered(location))


def open_source(location: Path) -> Source:
    """Open a directory: read params.json and index every part. Raises BadInput with all problems found."""
    if not (location / PARAMS).is_file():
        raise BadInput([Problem(str(location / PARAMS), "no such file", "the model's parameters", "Fetch it with the checkpoint")])
    params, params_file = json_file(location / PARAMS)
    problems: list[Problem] = []
    parts, files = _open_parts(_parts(location), problems)
    for key in _SIZES:
        if not isinstance(params.get(key), int) or isinstance(params.get(key), bool) or params[key] < 1:
            problems.append(Problem(f"{params_file.path}: {key}", repr(params.get(key)), "a whole number of 1 or more"))
    if problems:
        raise BadInput(problems)
    tensors = {name: _join(name, parts, params["dim"], problems) for name in parts[0]}
    for number, part in enumerate(parts[1:], 1):
        problems += [
            Problem(name, f"no such tensor in part {number}", "a share in every part") for name in parts[0].keys() - part.keys()
        ]
        problems += [
            Problem(name, f"the tensor in part {number} alone", "a share in every part") for name in part.keys() - parts[0].keys()
        ]
    if problems:
        raise BadInput(problems)
    return Source(
        kind=f"Meta checkpoint ({len(parts)} part{'s' if len(parts) > 1 else ''})",
        location=location,
        container="meta",
        architecture="LlamaForCausalLM",
        config=_config(params, tensors),
        config_name=str(params_file.path),
        tensors=tensors,
        files=(params_file, *files),
        dtype="bfloat16",  # whatever the files have: so the reference decides
        companions=tuple(path for path in [location / "tokenizer.model"] if path.is_file()),
    )


def _numbered(location: Path) -> dict[int, Path]:
    found = {}
    for path in sorted(location.iterdir()):
        match = _PART.fullmatch(path.name)
        if match and (match[2] or path.is_dir()):
            found[int(match[1])] = path
    return found


def _parts(location: Path) -> list[list[Path]]:
    """The files of each part, in order: one file, or a directory of several."""
    numbered = _numbered(location)
    if not numbered:
        names = ", ".join(sorted(path.name for path in location.iterdir())[:8])
        raise BadInput([Problem(str(location), names, "consolidated.00.pth and its other parts")])
    count = max(numbered) + 1
    missing = [Problem(str(location / f"consolidated.{n:02}.pth"), "no such file", f"one of {count} parts") for n in range(count)]
    missing = [problem for n, problem in enumerate(missing) if n not in numbered]
    parts = [[path] if path.is_file() else sorted(path.glob("consolidated-*.pth")) for _, path in sorted(numbered.items())]
    empty = [path for (_, path), held in zip(sorted(numbered.items()), parts, strict=True) if not held]
    missing += [Problem(str(path), "a directory without consolidated-*.pth", "the files of a part") for path in empty]
    if missing:
        raise BadInput(missing)
    return parts


def _open_parts(parts: Sequence[Sequence[Path]], problems: list[Problem]) -> tuple[list[dict[str, LazyTensor]], list[SourceFile]]:
    opened, files = [], []
    for paths in parts:
        held: dict[str, LazyTensor] = {}
        for path in paths:
            try:
                file, tensors = torch_pickle.open_file(path)
            except BadInput as error:
                problems += error.problems
                continue
            except OSError as error:
                problems.append(Problem(str(path), f"a file that cannot be read ({error.strerror})", "a readable file"))
                continue
            problems += [
                Problem(name, f"the tensor again in {path}", "one home in a part") for name in tensors.keys() & held.keys()
            ]
            held |= tensors
            files.append(file)
        opened.append(held)
    return opened, files


def _join(name: str, parts: Sequence[Mapping[str, LazyTensor]], dim: int, problems: list[Problem]) -> LazyTensor:
    """A tensor of all its shares. Shares whose shapes or types do not fit one another are a problem."""
    shares = [part[name] for part in parts if name in part]
    first = shares[0]
    axis = _axis(name, first.shape, len(parts), dim)
    for number, share in enumerate(shares[1:], 1):
        other = [n for i, n in enumerate(share.shape) if i != axis]
        if share.dtype != first.dtype or other != [n for i, n in enumerate(first.shape) if i != axis]:
            found = f"{share.dtype} {list(share.shape)} in part {number}"
            problems.append(Problem(name, found, f"a share like part 0's, {first.dtype} {list(first.shape)}"))
            return first
        if (
            axis is None
            and np.asarray(share.block(whole(share.shape))).tobytes() != np.asarray(first.block(whole(first.shape))).tobytes()
        ):
            problems.append(Problem(name, f"other values in part {number} than in part 0", "the same: every part holds it whole"))
            return first
    return first if axis is None or len(shares) == 1 else JoinedTensor(tuple(shares), axis)


def _axis(name: str, shape: Sequence[int], parts: int, dim: int) -> int | None:
    """The axis that a tensor is split on; None where each part holds it whole."""
    module = name.rpartition(".")[0].rpartition(".")[2]
    if module == _EMBEDDING and len(shape) == 2:
        return 1 if shape[1] * parts == dim else 0
    axis = _AXES.get(module)
    return axis if axis is not None and axis < len(shape) else None


def _config(params: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> dict[str, Any]:
    """params.json, and what it leaves to be computed."""
    config = dict(params)
    embedding = tensors.get(f"{_EMBEDDING}.weight")
    if config.get("vocab_size", -1) == -1:
        config["vocab_size"] = embedding.shape[0] if embedding else 32000
    if config.get("hidden_dim") is None:
        multiple, factor = config.get("multiple_of", 1), config.get("ffn_dim_multiplier") or 1
        config["hidden_dim"] = -(-int(int(8 * config["dim"] / 3) * factor) // multiple) * multiple
    if config.get("use_scaled_rope"):
        config["rope_scaling"] = {"type": "llama3"}
    return config
