"""The plan of a calibration, before it does anything: its source, its samples, its tasks, and the memory and time that it takes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.calibration.awq import awq_bytes, awq_flops, awq_problems
from pipeline.calibration.layer_task import LayerCall, Reopened
from pipeline.calibration.tokens import Samples, Texts, open_samples, samples_of_texts, write_tokens
from pipeline.errors import BadInput, Problem
from pipeline.model.awq_settings import AwqSettings
from pipeline.model.dtypes import BY_TARGET
from pipeline.sinks.activations import TOKENS, Activations, ActivationScratch
from pipeline.tensor.tensors import Source
from pipeline.version import VERSION
from stages.calibrate.layers import LayeredModel
from stages.calibrate.speed import flops_per_second
from stages.verify.roundtrip.original import Original

MIB = 1 << 20
# A process with torch and transformers and a tiny model: measured on Linux with torch 2.13 and transformers 5.23, 370 MiB.
BASE_BYTES = 440 * MIB
BLOCK_BYTES = 96 * MIB  # of weights on their way from the source's type to the model's
READ_BYTES_PER_SECOND = 1 << 30  # of weights that are read and brought to the model's type, in an estimate


@dataclass(frozen=True)
class Calibration:
    """A request for a calibration.

    Attributes
    ----------
    tokens, texts
        One of them: a file of tokens, or texts that the model's own tokenizer makes tokens of.
    dtype
        TensorRT-LLM's name of the type that the model is run in.
    device
        Where, by torch's name.
    scratch
        The directory in which it has its scratch.
    name
        The beginning of that scratch's name.
    awq
        What AWQ's scales are searched for, too.
    """

    tokens: Path | None
    texts: Texts | None
    scratch: Path
    name: str
    dtype: str
    device: str = "cpu"
    awq: AwqSettings | None = None


@dataclass(frozen=True)
class CalibrationPlan:
    """A calibration that can be run.

    Attributes
    ----------
    source
        The model.
    samples
        What it is run on.
    dtype, device
        TensorRT-LLM's name of the type that it is run in, and where, by torch's name.
    activations
        Its scratch.
    layers, layer_bytes
        How many layers there are, and the bytes of the largest one's weights.
    least_bytes, most_bytes
        The memory that it takes, with a mixture's experts one by one, and with all of a layer's; beside that of a process with
        nothing but torch. The same for other models.
    awq
        What AWQ's scales are searched for; None where they are not.
    """

    source: Source
    reopened: Reopened
    samples: Samples
    dtype: str
    device: str
    activations: Activations
    layers: int
    layer_bytes: int
    least_bytes: int
    most_bytes: int
    model: LayeredModel = field(repr=False, compare=False)
    awq: AwqSettings | None = None

    @property
    def identity(self) -> str:
        """Of all that the ranges depend on."""
        return self.activations.identity

    def peak_bytes(self, one_by_one: bool) -> int:
        """The memory of a process that does nothing else."""
        return BASE_BYTES + (self.least_bytes if one_by_one else self.most_bytes)

    def fits(self, limit_bytes: int) -> bool | None:
        """Whether experts are to be read one by one under a limit; None where it does not fit so either."""
        for one_by_one in dict.fromkeys((False, self.least_bytes < self.most_bytes)):
            if self.peak_bytes(one_by_one) <= limit_bytes:
                return one_by_one
        return None

    def too_small(self, limit_bytes: int, beside: int = 0) -> Problem:
        """The problem of a limit that a layer does not fit in. `beside`: what else is held at the same time."""
        wanted = -(-(self.peak_bytes(True) + beside) // MIB)
        layer = self.layer_bytes - (self.most_bytes - self.least_bytes)
        what = f"a layer of {layer // MIB} MiB{' without its experts' if self.least_bytes < self.most_bytes else ''}"
        found = f"{limit_bytes // MIB} MiB, for {what} and samples of {self.samples.length} tokens"
        remedy = f"Give --memory_limit {wanted}MiB, or shorter samples{' or a smaller --awq_tokens' if self.awq else ''}"
        return Problem("--memory_limit", found, f"{wanted} MiB or more", remedy)

    @property
    def tokens(self) -> Path:
        """The file of the samples: their own, or, of what was made of texts, one in scratch."""
        return self.activations.directory / TOKENS if self.samples.digest else self.samples.file.path

    def begin(self, keep: bool = False, outputs: Iterable[str] = ()) -> ActivationScratch:
        """Open and lock the scratch, with the file of the samples where that is its own. `keep`, `outputs`: as there."""
        scratch = ActivationScratch(self.activations, keep, outputs)
        try:
            if not self.tokens.is_file():
                write_tokens(self.tokens, self.samples)
        except BaseException:
            scratch.close()
            raise
        return scratch

    def calls(
        self, first: int, last: int, one_by_one: bool, needed: Mapping[int, Collection[str]] | None = None
    ) -> tuple[LayerCall, ...]:
        """The tasks of the layers from `first` up to `last`, which is not among them. `needed`: of LayerCall, by layer."""
        return tuple(
            LayerCall(
                layer,
                self.layers,
                self.reopened,
                self.dtype,
                self.device,
                self.tokens,
                self.activations,
                tuple(needed.get(layer, ())) if needed else (),
                one_by_one,
                self.awq,
            )
            for layer in range(first, last)
        )

    @cached_property
    def _rate(self) -> float:
        return flops_per_second(self.dtype, self.samples.length, self.model.hidden, self.device)

    def layer_seconds(self, one_by_one: bool) -> float:
        """An estimate of a layer's time by how fast this machine multiplies matrices, which is measured now."""
        sizes, tokens = self.model.sizes(), self.samples.count * self.samples.length
        read = sizes.total + (sizes.experts * (self.samples.count - 1) if one_by_one else 0)
        work = tokens * self.model.token_flops(self.samples.length) + (awq_flops(self.model, self.awq, tokens) if self.awq else 0)
        return work / self._rate + read / READ_BYTES_PER_SECOND

    def summary(self, one_by_one: bool) -> dict[str, Any]:
        """The plan as plain values."""
        each = self.layer_seconds(one_by_one)
        return {
            "source": self.source.place,
            "dtype": self.dtype,
            "device": self.device,
            "samples": self.samples.count,
            "tokens": self.samples.length,
            "layers": self.layers,
            "layer_bytes": self.layer_bytes,
            "experts_one_by_one": one_by_one,
            "peak_bytes": self.peak_bytes(one_by_one),
            "scratch": str(self.activations.directory),
            "scratch_bytes": self.activations.nbytes,
            "layer_seconds": each,
            "seconds": each * self.layers,
        }


def plan_calibration(source: Source, reopened: Reopened, asked: Calibration) -> CalibrationPlan:
    """Plan a calibration of a source that is open; reads headers and the tokens, and writes nothing.

    Raises BadInput with what is wrong with the source or the tokens.
    """
    original = Original(source)
    dtype = asked.dtype
    model = LayeredModel(original.config, original, dtype, asked.device)
    if asked.awq and (problems := list(awq_problems(model, original.config, asked.awq))):
        raise BadInput(problems)
    samples = _samples(source, model, asked)
    files = [file.fingerprint() for file in (*source.files, samples.file)]
    more = [*reopened.told, *([vars(asked.awq)] if asked.awq else [])]
    decides = json.dumps([VERSION, dtype, asked.device, files, samples.digest, *more], sort_keys=True)
    identity = hashlib.sha256(decides.encode()).hexdigest()
    sizes, block = model.sizes(), BLOCK_BYTES + samples.length * model.token_bytes(samples.length)
    block += awq_bytes(model, asked.awq, samples.count * samples.length, samples.length) if asked.awq else 0
    return CalibrationPlan(
        source,
        reopened,
        samples,
        dtype,
        asked.device,
        Activations(
            asked.scratch / f"{asked.name}-{identity[:12]}.zarr",
            (samples.count, samples.length, model.hidden),
            BY_TARGET[dtype].numpy,
            source.place,
            identity,
        ),
        len(model),
        sizes.total,
        sizes.total - sizes.experts + sizes.one_expert + block,
        sizes.total + block,
        model,
        asked.awq,
    )


def _samples(source: Source, model: LayeredModel, asked: Calibration) -> Samples:
    """The samples of one of the two. Raises BadInput where there is neither, or both."""
    if (asked.tokens is None) == (asked.texts is None):
        found = "nothing" if asked.tokens is None else "--calib_dataset too"
        raise BadInput([Problem("--calibration_tokens", found, "one of --calibration_tokens and --calib_dataset")])
    if asked.tokens is not None:
        return open_samples(asked.tokens, model.vocabulary, model.positions)
    assert asked.texts is not None, "one of the two"
    length = min(asked.texts.length, model.positions)
    return samples_of_texts(asked.texts.path, source.location, asked.texts.count, length, model.vocabulary, model.positions)
