"""Read Meta's checkpoints: params.json, and consolidated.NN.pth, each one model-parallel rank's share of every tensor.

Facts: docs/format/checkpoint.md, section 3.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import BadInput, Problem
from pipeline.printed import many
from pipeline.tensor.placement import pieces, whole
from pipeline.tensor.tensors import LazyTensor, Source, SourceFile
from stages.read import torch_pickle
from stages.read.joined import JoinedTensor
from stages.read.json_file import json_file
from stages.read.source_reader import SourceReader

PARAMS = "params.json"
# At most three digits: each missing part up to the highest number is reported, so that number must not be huge.
_PART = re.compile(r"consolidated\.(\d{1,3})(\.pth)?")
# The axis on which a module's tensors are split over the parts. Each part has the norms whole. The embedding is split on the hidden
# axis in Llama 1 and 2, and on the vocabulary in Llama 3.
_AXES = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}
_NORMS = ("attention_norm", "ffn_norm", "norm")
_EMBEDDING = "tok_embeddings"
_MULTIPLE = 256  # Meta's code makes hidden_dim a multiple of this where params.json has no `multiple_of`
_COMPARED_BYTES = 8 << 20  # of two tensors, compared at a time


class Meta(SourceReader):
    """Directories as Meta publishes them."""

    name = "meta"
    title = "a Meta directory"

    def detect(self, location: Path) -> bool:
        """Return whether `location` is a directory with parts. A missing params.json is reported by `open_source`."""
        return location.is_dir() and bool(_numbered(location))

    def open_source(self, location: Path) -> Source:
        """Open a directory: read params.json and the index of every part. Raises BadInput with all problems found."""
        if not (location / PARAMS).is_file():
            raise BadInput(
                [Problem(str(location / PARAMS), "no such file", "the model's parameters", "Fetch it with the checkpoint")]
            )
        params, params_file = json_file(location / PARAMS)
        problems: list[Problem] = []
        parts, files = _open_parts(_parts(location), problems)
        if problems:
            raise BadInput(problems)
        tensors = {name: _join(name, parts, params.get("dim"), problems) for name in parts[0]}
        for number, part in enumerate(parts[1:], 1):
            for names, found in (
                (parts[0].keys() - part.keys(), f"no such tensor in part {number}"),
                (part.keys() - parts[0].keys(), f"a tensor of part {number} that part 0 does not have"),
            ):
                problems += [Problem(name, found, "a share in every part") for name in sorted(names)]
        config = _config(params, tensors, params_file.path, problems)
        if problems:
            raise BadInput(problems)
        return Source(
            kind=f"Meta checkpoint ({many(len(parts), 'part')})",
            location=location,
            container="meta",
            architecture="LlamaForCausalLM",
            config=config,
            config_name=str(params_file.path),
            tensors=tensors,
            files=(params_file, *files),
            dtype="bfloat16",  # whatever the files have, as in NVIDIA's converter
            companions=tuple(path for path in [location / "tokenizer.model"] if path.is_file()),
        )


def _numbered(location: Path) -> dict[int, list[Path]]:
    """Return the paths of each part by its number; more than one path for a number is an error that `_parts` reports."""
    paths: dict[int, list[Path]] = {}
    for path in sorted(location.iterdir()):
        match = _PART.fullmatch(path.name)
        if match and (match[2] or path.is_dir()):
            paths.setdefault(int(match[1]), []).append(path)
    return paths


def _parts(location: Path) -> list[list[Path]]:
    """Return the files of each part, in order: one file, or all in a directory. Raises BadInput for missing and repeated parts."""
    numbered = _numbered(location)
    if not numbered:
        names = ", ".join(sorted(path.name for path in location.iterdir())[:8])
        raise BadInput([Problem(str(location), names, "consolidated.00.pth and its other parts")])
    count = max(numbered) + 1
    absent = [location / f"consolidated.{number:02}.pth" for number in range(count) if number not in numbered]
    problems = [Problem(str(path), "no such file", f"one of {count} parts", "Fetch it") for path in absent]
    parts = []
    for number, (path, *others) in sorted(numbered.items()):
        problems += [Problem(str(other), f"part {number} again, beside {path.name}", "each part once") for other in others]
        parts.append(sorted(path.glob("consolidated-*.pth")) if path.is_dir() else [path])
        if not parts[-1]:
            problems.append(Problem(str(path), "a directory without consolidated-*.pth", "the files of a part"))
    if problems:
        raise BadInput(problems)
    return parts


def _open_parts(parts: Sequence[Sequence[Path]], problems: list[Problem]) -> tuple[list[dict[str, LazyTensor]], list[SourceFile]]:
    opened, files = [], []
    for paths in parts:
        part: dict[str, LazyTensor] = {}
        for path in paths:
            try:
                file, tensors = torch_pickle.open_file(path)
            except BadInput as error:
                problems += error.problems
                continue
            except OSError as error:
                problems.append(Problem(str(path), f"a file that cannot be read ({error.strerror})", "a readable file"))
                continue
            twice = sorted(tensors.keys() & part.keys())
            problems += [Problem(name, f"the tensor again in {path}", "one home in a part") for name in twice]
            part |= tensors
            files.append(file)
        opened.append(part)
    return opened, files


def _join(name: str, parts: Sequence[Mapping[str, LazyTensor]], dim: Any, problems: list[Problem]) -> LazyTensor:
    """Join a tensor's shares; adds to `problems` where their shapes or dtypes do not fit, or copies of one tensor differ."""
    shares = [part[name] for part in parts if name in part]
    first, module = shares[0], name.rpartition(".")[0].rpartition(".")[2]
    if module not in (*_AXES, *_NORMS, _EMBEDDING):
        return first  # an unknown module: refused later by its name, unless the family's table ignores it
    axis = _axis(module, first.shape, len(parts), dim)
    for number, share in enumerate(shares[1:], 1):
        if share.dtype != first.dtype or _without_axis(share.shape, axis) != _without_axis(first.shape, axis):
            found = f"{share.dtype} {list(share.shape)} in part {number}"
            problems.append(Problem(name, found, f"a share like part 0's, {first.dtype} {list(first.shape)}"))
            return first
        if axis is None and not all(_equal_pieces(share, first)):
            problems.append(Problem(name, f"other values in part {number} than in part 0", "the same: every part holds it whole"))
            return first
    return first if axis is None or len(shares) == 1 else JoinedTensor(tuple(shares), axis)


def _axis(module: str, shape: Sequence[int], parts: int, dim: Any) -> int | None:
    """Return the axis on which a tensor is split over the parts; None where each part has all of it."""
    if module == _EMBEDDING and len(shape) == 2:
        return 1 if shape[1] * parts == dim else 0
    axis = _AXES.get(module)
    return axis if axis is not None and axis < len(shape) else None


def _without_axis(shape: Sequence[int], axis: int | None) -> list[int | None]:
    """Return a shape with None for the length of the split axis, in which parts may differ."""
    return [None if number == axis else length for number, length in enumerate(shape)]


def _equal_pieces(a: LazyTensor, b: LazyTensor) -> Iterator[bool]:
    """Yield, piece by piece, whether two tensors of the same shape and dtype have the same bytes."""
    for piece in pieces(whole(a.shape), a.dtype.itemsize, _COMPARED_BYTES):
        yield np.asarray(a.block(piece)).tobytes() == np.asarray(b.block(piece)).tobytes()


def _config(params: Mapping[str, Any], tensors: Mapping[str, LazyTensor], file: Path, problems: list[Problem]) -> dict[str, Any]:
    """Return params.json with the sizes that it leaves to be computed."""
    config = dict(params)
    embedding = tensors.get(f"{_EMBEDDING}.weight")
    if config.get("vocab_size") in (None, -1):
        config["vocab_size"] = embedding.shape[0] if embedding is not None and embedding.shape else 32000
    if config.get("hidden_dim") is None:
        config["hidden_dim"] = _hidden_dim(params, file, problems)
    if config.get("use_scaled_rope"):
        config["rope_scaling"] = {"type": "llama3"}
    return config


def _hidden_dim(params: Mapping[str, Any], file: Path, problems: list[Problem]) -> int | None:
    """Return the number of rows of w1 as Meta's code computes it; None where it cannot.

    That is added to `problems`, unless `dim` is missing or no integer, which is reported when the sizes are read.
    """
    given: dict[str, Any] = {key: params.get(key) for key in ("dim", "multiple_of", "ffn_dim_multiplier")}
    dim, multiple, factor = given.values()
    try:
        multiple, factor = _MULTIPLE if multiple is None else multiple, 1 if factor is None else factor
        rows: int = -(-int(int(8 * dim / 3) * factor) // multiple) * multiple
        return rows
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        if isinstance(dim, int):
            found = ", ".join(f"{key} {value!r}" for key, value in given.items())
            problems.append(Problem(f"{file}: hidden_dim", f"none, and {found}", "the rows of w1, or numbers that give them"))
    return None


READER = Meta()
