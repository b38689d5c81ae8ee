"""Run a calibration: layer by layer, all samples through one before the next is read; what was done before is taken up."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.calibration.plan import KEY, CalibrationPlan, metadata
from pipeline.errors import SourceChanged
from pipeline.model.dtypes import BY_TARGET
from pipeline.sinks.activations import ActivationScratch
from pipeline.sinks.array_file import write_arrays
from pipeline.tensor.placement import whole
from pipeline.watching.process import peak_memory_bytes
from stages.read.changing import changes
from stages.read.safetensors import file_metadata, open_file

Advance = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Calibrated:
    """The result of a run. `resumed_layers`: those that an earlier run had done; `up_to_date`: the file was there already."""

    output: Path
    modules: int
    seconds: float
    peak_memory_bytes: int
    resumed_layers: int = 0
    up_to_date: bool = False


def calibrate(plan: CalibrationPlan, advance: Advance | None = None) -> Calibrated:
    """Make the file of a plan. `advance`: called with ("calibrate", layers done, layers in all) as each is done.

    Raises BadInput where activations are no numbers or another run is at work, SourceChanged where the source or the tokens changed
    meanwhile, and OSError where the disk fails. A run that is killed goes on with the first layer that was not finished.
    """
    started = time.perf_counter()
    if plan.output.is_file() and file_metadata(plan.output).get(KEY) == plan.identity:
        return Calibrated(plan.output, _modules(plan), 0.0, peak_memory_bytes(), up_to_date=True)
    shape = (plan.samples.count, plan.samples.length, plan.hidden)
    scratch = ActivationScratch(plan.scratch, shape, BY_TARGET[plan.dtype].numpy, str(plan.source.location), plan.identity)
    try:
        resumed = scratch.layers_done
        for layer in range(resumed, plan.layers):
            _layer(plan, scratch, layer, first=layer == resumed)
            if advance:
                advance("calibrate", layer + 1, plan.layers)
        if changed := changes((*plan.source.files, plan.samples.file)):
            raise SourceChanged(changed)
        ranges: dict[str, np.ndarray] = {}
        for layer in range(plan.layers):
            _, tensors = open_file(scratch.ranges_of(layer))
            ranges |= {name: np.array(tensor.block(whole(tensor.shape))) for name, tensor in tensors.items()}
        write_arrays(plan.output, ranges, metadata(plan))
    except BaseException:
        scratch.close()
        raise
    scratch.remove()
    return Calibrated(plan.output, _modules(plan), time.perf_counter() - started, peak_memory_bytes(), resumed)


def _layer(plan: CalibrationPlan, scratch: ActivationScratch, layer: int, first: bool) -> None:
    """Run all samples through a layer. `first`: of this run, which has not yet seen what layers are given beside activations."""
    model, samples = plan.model, plan.samples
    if first and layer:
        model.embedded(samples.tokens(0))
    scratch.begin(layer)
    search = model.searching(plan.awq, samples.count * samples.length) if plan.awq else None
    with model.filled(layer, search) as seen:
        for sample in range(samples.count):
            given = scratch.read(layer - 1, sample) if layer else model.embedded(samples.tokens(sample))
            scratch.write(layer, sample, model.run(layer, given))
        ranges = seen.arrays() | dict(search.arrays() if search else ())
    scratch.finish(layer, ranges)


def _modules(plan: CalibrationPlan) -> int:
    return sum(len(plan.model.linears(layer)) for layer in range(plan.layers))
