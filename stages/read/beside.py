"""Read a quantized checkpoint together with the model that it was made from: its modules replace those of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from pipeline.errors import BadInput, Problem
from pipeline.tensor.tensors import LazyTensor, Source, SourceFile
from stages.read import safetensors, torch_pickle
from stages.read.huggingface import open_tensors
from stages.read.json_file import json_file
from stages.read.quantizer import KEY, quantizer_settings

_OPENERS: Mapping[str, Callable[[Path], tuple[SourceFile, Mapping[str, LazyTensor]]]] = {
    ".safetensors": safetensors.open_file,
    ".bin": torch_pickle.open_file,
    ".pt": torch_pickle.open_file,
}


def open_beside(base: Source, path: Path) -> Source:
    """Return `base` with every module that the file or directory at `path` has taken from there, and its quantization settings.

    NVIDIA's converter reads the model's configuration and the quantized checkpoint's tensors; modules that the latter lacks, such
    as embeddings, come from the model. Raises BadInput where `path` cannot be read, or `base` is not a Hugging Face model.
    """
    if base.container != "huggingface":
        raise BadInput([Problem("--quant_ckpt_path", f"a {base.kind} as --model_dir", "a Hugging Face model")])
    tensors, files = _open(path)
    modules = {name.rpartition(".")[0] for name in tensors}
    unreplaced = {name: tensor for name, tensor in base.tensors.items() if name.rpartition(".")[0] not in modules}
    directory = path if path.is_dir() else path.parent
    own_config, config_file = json_file(directory / "config.json") if (directory / "config.json").is_file() else ({}, None)
    settings, settings_files = quantizer_settings(directory, own_config)
    config = {**base.config, KEY: settings} if settings else base.config
    return dataclasses.replace(
        base,
        kind=f"{base.kind} with {path.name}",
        config=config,
        tensors={**unreplaced, **tensors},
        called={module: name for module, name in base.called.items() if module not in modules},
        files=(*base.files, *files, *settings_files, *((config_file,) if config_file else ())),
    )


def _open(path: Path) -> tuple[Mapping[str, LazyTensor], tuple[SourceFile, ...]]:
    problems: list[Problem] = []
    try:
        path.stat()
    except OSError as error:  # also a name that is too long for the file system
        found = f"what cannot be opened ({error.strerror})"
        raise BadInput([Problem(f"--quant_ckpt_path {path}", found, "a quantized checkpoint")]) from None
    if path.is_dir():
        tensors, files = open_tensors(path, problems)
        if problems:
            raise BadInput(problems)
        return tensors, files
    opener = _OPENERS.get(path.suffix)
    if opener is None:
        found = f"a {path.suffix} file" if path.suffix else "a file without a suffix"
        raise BadInput([Problem(f"--quant_ckpt_path {path}", found, f"one of {', '.join(_OPENERS)}")])
    try:
        file, in_file = opener(path)
    except OSError as error:
        raise BadInput([Problem(str(path), f"a file that cannot be read ({error.strerror})", "a readable file")]) from None
    return in_file, (file,)
