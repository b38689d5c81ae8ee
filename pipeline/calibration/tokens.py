"""The tokens that a calibration runs: a safetensors file with `input_ids`, integers [samples, tokens]."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import BadInput, Problem
from pipeline.tensor.source_file import SourceFile
from pipeline.tensor.tensors import LazyTensor
from stages.read.safetensors import open_file

NAME = "input_ids"
EXPECTED = f"a safetensors file with {NAME}, integers [samples, tokens]"


@dataclass(frozen=True)
class Samples:
    """Samples of equal length, each read when it is asked for. `file`: where they are from."""

    file: SourceFile
    tensor: LazyTensor

    @property
    def count(self) -> int:
        return self.tensor.shape[0]

    @property
    def length(self) -> int:
        return self.tensor.shape[1]

    def tokens(self, sample: int) -> np.ndarray:
        """int64 [tokens]."""
        return np.asarray(self.tensor.block(((sample, sample + 1), (0, self.length)))).reshape(-1).astype(np.int64)


def open_samples(path: Path, vocabulary: int, positions: int) -> Samples:
    """Open a file of tokens. Raises BadInput where it is none, or holds tokens or lengths that the model has not."""
    subject = f"--calibration_tokens {path}"
    try:
        file, tensors = open_file(path)
    except OSError as error:
        raise BadInput([Problem(subject, f"a file that cannot be read ({error.strerror})", EXPECTED)]) from None
    tensor = tensors.get(NAME)
    if tensor is None:
        raise BadInput([Problem(subject, f"no {NAME} among {len(tensors)} tensors", EXPECTED)])
    if len(tensor.shape) != 2 or not all(tensor.shape) or tensor.dtype.kind not in "iu":
        raise BadInput([Problem(subject, f"{NAME} {tensor.dtype} {list(tensor.shape)}", EXPECTED)])
    samples = Samples(file, tensor)
    if samples.length > positions:
        found = f"samples of {samples.length} tokens"
        raise BadInput([Problem(subject, found, f"at most {positions}, the positions that the model has", "Give shorter ones")])
    for sample in range(samples.count):
        tokens = samples.tokens(sample)
        if tokens.min() < 0 or tokens.max() >= vocabulary:
            found = f"tokens from {tokens.min()} to {tokens.max()} in sample {sample}"
            remedy = "Give tokens of this model's own tokenizer"
            raise BadInput([Problem(subject, found, f"some of 0 to {vocabulary - 1}", remedy)])
    return samples
