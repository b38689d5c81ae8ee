"""The tokens that a calibration runs, in samples of equal length: a file of them, or what the model's tokenizer makes of texts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.calibration.layer_task import INPUT_IDS as NAME
from pipeline.errors import BadInput, Problem
from pipeline.sinks.array_file import write_arrays
from pipeline.tensor.source_file import SourceFile
from stages.read.safetensors import open_file
from stages.read.texts import texts, texts_file
from stages.read.tokenizer import open_tokenizer

EXPECTED = f"a safetensors file with {NAME}, integers [samples, tokens]"


@dataclass(frozen=True)
class Texts:
    """A file of texts, and how many samples of how many tokens are made of them at most."""

    path: Path
    count: int = 512
    length: int = 512


@dataclass(frozen=True)
class Samples:
    """Samples of equal length, each read when it is asked for.

    `file`: where they are from. `tokens`: of a sample by its number, int64 [length]. `digest`: of tokens that are in no file.
    """

    file: SourceFile
    count: int
    length: int
    tokens: Callable[[int], np.ndarray] = field(repr=False)
    digest: str = ""


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
    count, length = tensor.shape

    def tokens(sample: int) -> np.ndarray:
        return np.asarray(tensor.block(((sample, sample + 1), (0, length)))).reshape(-1).astype(np.int64)

    return _checked(Samples(file, count, length, tokens), subject, vocabulary, positions)


def samples_of_texts(path: Path, tokenizer: Path, count: int, length: int, vocabulary: int, positions: int) -> Samples:
    """The first tokens of some texts, one text behind the other with the end of a text between, cut into `count` samples, or fewer.

    `tokenizer`: where it is. Raises BadInput where it is not there, or the texts have no sample of `length` tokens.
    """
    subject = f"--calib_dataset {path}"
    file, words = texts_file(path), open_tokenizer(tokenizer)
    end = [] if words.eos_token_id is None else [words.eos_token_id]
    found: list[int] = []
    for text in texts(path):
        found += [*words.encode(text), *end]
        if len(found) >= count * length:
            break
    whole = min(len(found) // length, count)
    if not whole:
        expected = f"{length} or more, of which a sample is made"
        raise BadInput([Problem(subject, f"{len(found)} tokens", expected, "Give more texts, or a smaller --calib_max_seq_length")])
    ids = np.array(found[: whole * length], dtype=np.int64).reshape(whole, length)
    digest = hashlib.sha256(ids.tobytes()).hexdigest()
    return _checked(Samples(file, whole, length, ids.__getitem__, digest), subject, vocabulary, positions)


def write_tokens(path: Path, samples: Samples) -> None:
    """Write samples as a file that `open_samples` opens. Raises OSError, naming it."""
    write_arrays(path, {NAME: np.stack([samples.tokens(number) for number in range(samples.count)])})


def _checked(samples: Samples, subject: str, vocabulary: int, positions: int) -> Samples:
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
