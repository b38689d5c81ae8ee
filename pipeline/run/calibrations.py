"""A calibration by itself: a graph of its layers alone, and a file of the ranges that `--act_range` takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.calibration.layer_task import Reopened
from pipeline.calibration.plan import Calibration, CalibrationPlan, plan_calibration
from pipeline.errors import BadInput, Interrupted, Problem, SourceChanged
from pipeline.planning.dask_graph import stage_graph
from pipeline.planning.opening import type_of
from pipeline.printed import many
from pipeline.run.schedulers import run_synchronous
from pipeline.sinks.array_file import write_arrays
from pipeline.tensor.placement import whole
from pipeline.tensor.process import peak_memory_bytes
from pipeline.version import VERSION
from stages.read import find_source
from stages.read.act_ranges import GROUP_KEY
from stages.read.changing import changes
from stages.read.safetensors import file_metadata, open_file

KEY = "headrace.calibration"  # in the file's metadata: of what it was measured
Advance = Callable[[str, int, int], None]


@dataclass(frozen=True)
class RangesFile:
    """A file of ranges that can be made. `one_by_one`: experts are read one by one, as the memory is for no more."""

    plan: CalibrationPlan
    output: Path
    one_by_one: bool


@dataclass(frozen=True)
class Calibrated:
    """The result of a run. `resumed_layers`: those that an earlier run had done; `up_to_date`: the file was there already."""

    output: Path
    modules: int
    seconds: float
    peak_memory_bytes: int
    resumed_layers: int = 0
    up_to_date: bool = False


def plan_ranges(
    model_dir: Path | str, output: Path, asked: Calibration, memory_limit: int, revision: str | None, overwrite: bool = False
) -> RangesFile:
    """Plan a file of ranges; reads headers and the tokens, and writes nothing.

    `asked`: its dtype may be "auto", the source's. `overwrite`: the ranges of another calibration may be replaced.

    Raises BadInput with what is wrong with the source, the tokens, the memory limit or the place of the file.
    """
    source = find_source(model_dir, None, None, revision, True)
    asked = replace(asked, dtype=type_of(source)) if asked.dtype == "auto" else asked
    plan = plan_calibration(source, Reopened(source.url or source.location), asked)
    if problem := _in_the_way(output, plan, overwrite):
        raise BadInput([problem])
    one_by_one = plan.fits(memory_limit)
    if one_by_one is None:
        raise BadInput([plan.too_small(memory_limit)])
    return RangesFile(plan, output, one_by_one)


def calibrate(file: RangesFile, advance: Advance | None = None) -> Calibrated:
    """Make a file of ranges. `advance`: called with ("calibrate", layers done, layers in all) as each is done.

    Raises BadInput where activations are no numbers or another run is at work, SourceChanged where the source or the tokens changed
    meanwhile, Interrupted on Ctrl-C or SIGTERM, and OSError where the disk fails. A run that is stopped or killed goes on with the
    first layer that was not finished.
    """
    started, plan, output = time.perf_counter(), file.plan, file.output
    modules = sum(len(plan.model.linears(layer)) for layer in range(plan.layers))
    if output.is_file() and file_metadata(output).get(KEY) == plan.identity:
        return Calibrated(output, modules, 0.0, peak_memory_bytes(), up_to_date=True)
    scratch = plan.begin()
    try:
        resumed = plan.activations.layers_done
        graph = stage_graph((), calibrations=plan.calls(resumed, plan.layers, file.one_by_one))
        with closing(run_synchronous(graph)) as results:
            for done in results:
                if advance:
                    advance("calibrate", done.layer + 1, plan.layers)
        if changed := changes((*plan.source.files, plan.samples.file)):
            raise SourceChanged(changed)
        ranges: dict[str, np.ndarray] = {}
        for layer in range(plan.layers):
            _, tensors = open_file(plan.activations.ranges_of(layer))
            ranges |= {name: np.array(tensor.block(whole(tensor.shape))) for name, tensor in tensors.items()}
        write_arrays(output, ranges, _metadata(plan))
    except KeyboardInterrupt:
        scratch.close()
        done = f"{plan.activations.layers_done} of {many(plan.layers, 'layer')} done"
        raise Interrupted(f"interrupted; {output} is not written, {done}: run the same command again to go on") from None
    except BaseException:
        scratch.close()
        raise
    scratch.remove()
    return Calibrated(output, modules, time.perf_counter() - started, peak_memory_bytes(), resumed)


def _in_the_way(output: Path, plan: CalibrationPlan, overwrite: bool) -> Problem | None:
    """Why a file of ranges cannot be made in a place: there is none, or something else is there, which stays."""
    subject, remedy = f"--output {output}", "Choose another --output"
    if not output.parent.is_dir() or output.is_dir():
        return Problem(subject, "no place for a file", "a file in a directory that is there")
    if not output.exists():
        return None
    if any(_same(output, file.path) for file in (*plan.source.files, plan.samples.file)):
        return Problem(subject, "a file that the calibration reads", "a file of its own", remedy)
    key = file_metadata(output).get(KEY)
    if key is None:
        return Problem(subject, "a file that headrace calibrate did not write", "a file that is not there yet", remedy)
    if key != plan.identity and not overwrite:
        found, expected = "the ranges of another calibration", "a file that is not there yet, or that of this calibration"
        return Problem(subject, found, expected, f"{remedy}, or give --overwrite")
    return None


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # that of a source at a URL is not here
        return False


def _metadata(plan: CalibrationPlan) -> dict[str, str]:
    """The texts in the header of the file: of what the ranges were measured."""
    return {
        KEY: plan.identity,
        "dtype": plan.dtype,
        "samples": str(plan.samples.count),
        "tokens": str(plan.samples.length),
        "headrace": VERSION,
        **({GROUP_KEY: str(plan.awq.group_size)} if plan.awq else {}),
    }
