"""The plan of a calibration, before it does anything: its source, its samples, and the memory that it takes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.calibration.tokens import Samples, open_samples, samples_of_texts
from pipeline.errors import BadInput, Problem
from pipeline.model.dtypes import BY_TARGET, auto_dtype
from pipeline.planning.memory import MIB
from pipeline.tensor.tensors import Source
from pipeline.version import VERSION
from stages.read import find_source
from stages.verify.roundtrip.original import Original

if TYPE_CHECKING:
    from stages.calibrate.layers import LayeredModel

# A process with torch and transformers and a tiny model: measured on Linux with torch 2.13 and transformers 5.23, 370 MiB.
BASE_BYTES = 440 * MIB
BLOCK_BYTES = 96 * MIB  # of weights on their way from the source's type to the model's
KEY = "headrace.calibration"  # in the file's metadata: of what it was measured
HUGGING_FACE = "a Hugging Face model, whose modules have the names of transformers' own"


@dataclass(frozen=True)
class Texts:
    """A file of texts, and how many samples of how many tokens are made of them at most."""

    path: Path
    count: int = 512
    length: int = 512


@dataclass(frozen=True)
class CalibrationPlan:
    """A calibration that can be run.

    Attributes
    ----------
    source, original
        The model, and its weights as numbers.
    samples
        What it is run on.
    dtype
        TensorRT-LLM's name of the type that it is run in.
    output, scratch
        The file that is made, and the directory of its scratch.
    identity
        Of all that the ranges depend on.
    layers, layer_bytes, peak_bytes, scratch_bytes
        How many layers there are, the bytes of one's weights, and the memory and the disk space that the run takes.
    """

    source: Source
    original: Original
    samples: Samples
    dtype: str
    output: Path
    scratch: Path
    identity: str
    layers: int
    layer_bytes: int
    peak_bytes: int
    scratch_bytes: int
    hidden: int
    model: LayeredModel = field(repr=False, compare=False)

    def summary(self) -> dict[str, Any]:
        """The plan as plain values."""
        return {
            "source": str(self.source.location),
            "output": str(self.output),
            "dtype": self.dtype,
            "samples": self.samples.count,
            "tokens": self.samples.length,
            "layers": self.layers,
            "layer_bytes": self.layer_bytes,
            "peak_bytes": self.peak_bytes,
            "scratch": str(self.scratch),
            "scratch_bytes": self.scratch_bytes,
        }


def plan_calibration(
    model_dir: Path | str,
    output: Path,
    calibration_tokens: Path | None,
    dtype: str = "auto",
    memory_limit: int = 2 << 30,
    scratch: Path | None = None,
    revision: str | None = None,
    texts: Texts | None = None,
) -> CalibrationPlan:
    """Plan a calibration; reads headers and the tokens, and writes nothing.

    `calibration_tokens`: a file of tokens; or else `texts`, which the model's own tokenizer makes tokens of.

    Raises BadInput with what is wrong with the source, the tokens, or the memory limit.
    """
    from stages.calibrate.layers import LayeredModel

    source = find_source(model_dir, None, None, revision, True)
    if source.container != "huggingface":
        raise BadInput([Problem(str(model_dir), f"a {source.kind}", HUGGING_FACE)])
    original = Original(source)
    dtype = auto_dtype(source.dtype) if dtype == "auto" else dtype
    model = LayeredModel(original.config, original, dtype)
    modules = {name.module for name in source.named}
    lacking = next((name for number in range(len(model)) for name in model.linears(number) if name not in modules), None)
    if lacking:
        found = f"{source.architecture}, whose checkpoint has no module {lacking}"
        raise BadInput([Problem(str(model_dir), found, HUGGING_FACE, "Calibrate the Hugging Face model that it was made of")])
    samples = _samples(source, model, calibration_tokens, texts)
    if not output.parent.is_dir() or output.is_dir():
        raise BadInput([Problem(f"--output {output}", "no place for a file", "a file in a directory that is there")])
    itemsize = BY_TARGET[dtype].numpy.itemsize
    hidden = model.hidden
    peak = BASE_BYTES + BLOCK_BYTES + model.layer_bytes() + samples.length * model.token_bytes(samples.length)
    if peak > memory_limit:
        wanted = -(-peak // MIB)
        found = f"{memory_limit // MIB} MiB, for a layer of {model.layer_bytes() // MIB} MiB and samples of {samples.length} tokens"
        remedy = f"Give --memory_limit {wanted}MiB, or shorter samples"
        raise BadInput([Problem("--memory_limit", found, f"{wanted} MiB or more", remedy)])
    held = samples.count * samples.length * hidden * itemsize
    files = [file.fingerprint() for file in (*source.files, samples.file)]
    decides = json.dumps([VERSION, dtype, files, samples.digest], sort_keys=True)
    identity = hashlib.sha256(decides.encode()).hexdigest()
    place = scratch or output.parent / ".headrace-scratch"
    return CalibrationPlan(
        source,
        original,
        samples,
        dtype,
        output,
        place / f"{output.name}-{identity[:12]}.zarr",
        identity,
        len(model),
        model.layer_bytes(),
        peak,
        2 * held,
        hidden,
        model,
    )


def _samples(source: Source, model: LayeredModel, tokens: Path | None, texts: Texts | None) -> Samples:
    """The samples of one of the two. Raises BadInput where there is neither, or both."""
    if (tokens is None) == (texts is None):
        found = "nothing" if tokens is None else "--calib_dataset too"
        raise BadInput([Problem("--calibration_tokens", found, "one of --calibration_tokens and --calib_dataset")])
    if tokens is not None:
        return open_samples(tokens, model.vocabulary, model.positions)
    assert texts is not None, "one of the two"
    length = min(texts.length, model.positions)
    return samples_of_texts(texts.path, source.location, texts.count, length, model.vocabulary, model.positions)


def metadata(plan: CalibrationPlan) -> Mapping[str, str]:
    """The texts in the header of the file: of what the ranges were measured."""
    return {
        KEY: plan.identity,
        "dtype": plan.dtype,
        "samples": str(plan.samples.count),
        "tokens": str(plan.samples.length),
        "headrace": VERSION,
    }
