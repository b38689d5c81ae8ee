"""The task `calibrate` of a graph: all samples through one decoder layer, which leaves activations and ranges in scratch.

A task is given what it needs to open the model anew, on whichever worker, and hands on what it has open to the task of the next
layer where that runs in the same process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import BadInput, Problem, WriteFailed
from pipeline.model.awq_settings import AwqSettings
from pipeline.sinks.activations import Activations
from pipeline.tensor.metering import collect, meter
from pipeline.tensor.placement import whole
from pipeline.tensor.tensors import Source
from stages.read import find_source
from stages.read.act_ranges import no_magnitudes
from stages.read.safetensors import open_file

if TYPE_CHECKING:
    from stages.calibrate.layers import LayeredModel

STAGE = "calibrate"
INPUT_IDS = "input_ids"


@dataclass(frozen=True)
class Reopened:
    """A source as workers open it again: by its place, or, of a model in memory, the source itself.

    `told`: what the job says of the model, which its configuration does not, by its keys.
    """

    place: Path | str | None = None
    meta: Path | None = None
    beside: Path | None = None
    live: Source | None = None
    told: tuple[tuple[str, Any], ...] = ()

    def again(self) -> Source:
        """The source. Raises BadInput where it is gone."""
        source = self.live or find_source(self.place, self.meta, self.beside, None, False)
        return replace(source, config={**source.config, **dict(self.told)}) if self.told else source


@dataclass(frozen=True)
class LayerCall:
    """All that the task of a layer is told.

    Attributes
    ----------
    layer, layers
        Its number, and how many there are.
    source, dtype, device
        The model, the type that it is run in by TensorRT-LLM's name, and where.
    tokens
        A safetensors file with input_ids.
    activations
        The scratch that it reads and writes.
    needed
        The ranges of this layer that a target has a scale of: some channel of each must be more than zero.
    one_by_one
        Whether experts are read one by one.
    awq
        What AWQ's scales are searched for; None where they are not.
    """

    layer: int
    layers: int
    source: Reopened
    dtype: str
    device: str
    tokens: Path
    activations: Activations
    needed: tuple[str, ...] = ()
    one_by_one: bool = False
    awq: AwqSettings | None = None


class Opened:
    """A model that is calibrated, and its samples."""

    def __init__(self, call: LayerCall) -> None:
        from stages.calibrate.layers import LayeredModel
        from stages.verify.roundtrip.original import Original

        original = Original(call.source.again())
        self.model: LayeredModel = LayeredModel(original.config, original, call.dtype, call.device)
        self._tensor = open_file(call.tokens)[1][INPUT_IDS]

    def tokens(self, sample: int) -> np.ndarray:
        """The tokens of a sample, int64."""
        region = ((sample, sample + 1), (0, self._tensor.shape[1]))
        return np.asarray(self._tensor.block(region)).reshape(-1).astype(np.int64)

    def run(self, call: LayerCall) -> dict[str, np.ndarray]:
        """The ranges of a layer, all of whose activations are in scratch then."""
        model, files, layer = self.model, call.activations, call.layer
        if layer and not model.began:
            model.embedded(self.tokens(0))  # which tells what layers are given beside activations
        files.begin(layer)
        search = model.searching(call.awq, files.shape[0] * files.shape[1]) if call.awq else None
        with model.filled(layer, call.one_by_one, search) as seen:
            for sample in range(files.shape[0]):
                given = files.read(layer - 1, sample) if layer else model.embedded(self.tokens(sample))
                files.write(layer, sample, model.run(layer, given))
            found = dict(search.arrays()) if search else {}
        return seen.arrays() | found


@dataclass(frozen=True)
class LayerDone:
    """The result of the task of a layer. `opened` goes to the next one in the same process, and nowhere else."""

    layer: int
    layers: int
    metrics: Mapping[tuple[str, str], float] = field(default_factory=dict)
    opened: Opened | None = field(default=None, repr=False, compare=False)

    @property
    def seconds(self) -> float:
        """The time that the layer took."""
        return self.metrics.get((STAGE, "seconds"), 0.0)

    def __reduce__(self) -> tuple[Any, ...]:
        return LayerDone, (self.layer, self.layers, dict(self.metrics))


def calibrate_layer(call: LayerCall, before: LayerDone | None = None) -> LayerDone:
    """Run all samples through a layer. `before`: the result of the layer before it, where that is of the same run.

    Raises BadInput where activations are no numbers or a range that is needed has nothing but zeros, WriteFailed where the model
    cannot be run on this machine, and OSError where the disk fails.
    """
    done = LayerDone(call.layer, call.layers)
    if call.activations.ranges_of(call.layer).is_file():  # by a worker that is lost
        return done
    with collect() as metrics:
        opened = (before.opened if before else None) or _opened(call)
        sizes = opened.model.sizes()
        with meter(STAGE, sizes.total):
            ranges = opened.run(call)
            if problems := _unfit(call, ranges):
                raise BadInput(problems)
            call.activations.finish(call.layer, ranges)
    own = {key: value for key, value in metrics.items() if key[0] == STAGE}
    return LayerDone(call.layer, call.layers, own, opened)


def _opened(call: LayerCall) -> Opened:
    """The model of a call. Raises WriteFailed where this machine lacks what the plan was made with: source, device or library."""
    try:
        return Opened(call)
    except BadInput as error:
        found = "; ".join(map(str, error.problems))
    except ImportError as error:
        found = str(error)
    raise WriteFailed(
        f"layer {call.layer} cannot be measured on {os.uname().nodename}: {found}; mend this and run the same command again"
    )


def unfit(call: LayerCall) -> list[Problem]:
    """The problems of a layer that an earlier run has measured, for whichever targets: no scale can be made of what is needed now.

    Raises OSError where its file cannot be read.
    """
    tensors = open_file(call.activations.ranges_of(call.layer))[1]
    return _unfit(call, {name: np.asarray(tensors[name].block(whole(tensors[name].shape))) for name in call.needed})


def _unfit(call: LayerCall, ranges: Mapping[str, np.ndarray]) -> list[Problem]:
    expected, remedy = "activations of which a scale can be made", "Give more tokens, or other ones"
    return [Problem(name, found, expected, remedy) for name in call.needed if (found := no_magnitudes(ranges[name]))]
