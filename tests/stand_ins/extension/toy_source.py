"""A folder of NumPy files, one a tensor, with the model's configuration in model.json."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from pipeline.errors import BadInput, Problem
from pipeline.tensor.source_file import SourceFile, source_file
from pipeline.tensor.tensors import Source
from stages.read.json_file import json_file
from stages.read.mapped import MappedTensor
from stages.read.source_reader import SourceReader


class NumpyFolder(SourceReader):
    """Tensors have Hugging Face's names, and so has the configuration."""

    name = "numpy-folder"
    title = "a folder of .npy files with a model.json"

    def detect(self, location: Path) -> bool:
        return (location / "model.json").is_file()

    def open_source(self, location: Path) -> Source:
        config, config_file = json_file(location / "model.json")
        tensors, files, problems = {}, [config_file], []
        for path in sorted(location.glob("*.npy")):
            try:
                tensors[path.stem], file = open_file(path)
                files.append(file)
            except ValueError as error:
                problems.append(Problem(str(path), f"a header that cannot be read ({error})", "a NumPy file in C order"))
        if problems:
            raise BadInput(problems)
        return Source(
            kind="NumPy folder",
            location=location,
            container="huggingface",
            architecture=config["architectures"][0],
            config=config,
            config_name=str(config_file.path),
            tensors=tensors,
            files=tuple(files),
            dtype=config["torch_dtype"],
        )


def open_file(path: Path) -> tuple[MappedTensor, SourceFile]:
    """A file's array, unread, and what tells the file from a changed one. Raises ValueError where it is none."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("another version than 1.0")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        offset = file.tell()
        file.seek(0)
        head = file.read(offset)
    if fortran or dtype.hasobject:
        raise ValueError("Fortran order, or objects")
    return MappedTensor(str(path), offset, shape, dtype), source_file(path, status, head)


READER = NumpyFolder()
