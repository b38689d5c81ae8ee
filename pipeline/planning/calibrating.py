"""A calibration as a part of a conversion's plan: its memory beside the conversion's, and how much of it a run has left to do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipeline.errors import BadInput, Problem
from pipeline.model.awq_settings import AwqSettings
from pipeline.model.unsaid import TOLD
from pipeline.planning.opening import OpenedSource

if TYPE_CHECKING:
    from pipeline.calibration.layer_task import LayerCall, Reopened
    from pipeline.calibration.plan import CalibrationPlan
    from pipeline.planning.memory import Budget

SHARED_BYTES = 64 << 20  # of a process, which what a calibration and what a conversion take by themselves both count


@dataclass(frozen=True)
class Calibrating:
    """The calibration of a conversion.

    Attributes
    ----------
    plan
        What is measured, and how.
    needed
        The ranges that targets have scales of, by layer.
    one_by_one
        Whether a mixture's experts are read one by one, as the memory is for no more.
    """

    plan: CalibrationPlan
    needed: Mapping[int, tuple[str, ...]]
    one_by_one: bool = False

    @property
    def layers(self) -> int:
        """How many layers are run: up to the last of which something is needed."""
        return max(self.needed, default=-1) + 1

    def calls(self, first: int = 0, last: int | None = None) -> tuple[LayerCall, ...]:
        """The tasks of the layers from `first` up to `last`, which is not among them."""
        last = self.layers if last is None else last
        return self.plan.calls(first, last, self.one_by_one, self.needed)

    def unfit(self, last: int | None = None) -> list[Problem]:
        """The problems of the layers that an earlier run has measured, for whichever targets: no scale can be made of a range.

        `last`: only of the layers before it.
        """
        from pipeline.calibration.layer_task import unfit

        problems: list[Problem] = []
        for call in self.calls(0, min(self.plan.activations.layers_done, self.layers if last is None else last)):
            with contextlib.suppress(FileNotFoundError):  # the run that it is of has just ended
                problems += unfit(call)
        return problems

    def summary(self) -> dict[str, Any]:
        """Plain values."""
        return self.plan.summary(self.one_by_one)


def bounded(
    calibrating: Calibrating | None, limit_bytes: int, budgeted: Callable[[int], Budget]
) -> tuple[Calibrating | None, Budget]:
    """How a calibration is done under a limit, and what that leaves to the conversion beside it.

    `budgeted`: of the bytes that something else takes. Raises BadInput where there is no room for one of them, or for both.
    """
    alone = budgeted(0)
    if calibrating is None:
        return None, alone
    plan = calibrating.plan
    for one_by_one in dict.fromkeys((False, plan.least_bytes < plan.most_bytes)):
        beside = plan.peak_bytes(one_by_one) - SHARED_BYTES
        if limit_bytes >= alone.least_bytes + beside:
            return replace(calibrating, one_by_one=one_by_one), budgeted(beside)
    raise BadInput([plan.too_small(limit_bytes, alone.least_bytes - SHARED_BYTES)])


def plan_calibrating(opened: OpenedSource, awq: AwqSettings | None = None) -> CalibrationPlan:
    """Plan the calibration of a job's source. `awq`: AWQ's scales are searched, too.

    Raises BadInput where transformers cannot run it, or of wrong tokens.
    """
    from pipeline.calibration.plan import Calibration, plan_calibration
    from pipeline.calibration.tokens import Texts

    job, source = opened.job, opened.source
    if source.in_memory and job.elsewhere:
        found = "a model in the memory of this process, and workers elsewhere"
        raise BadInput([Problem("--calibration_tokens", found, "workers in this process", "Leave out --scheduler")])
    texts = Texts(job.calib_dataset, job.calib_size, job.calib_max_seq_length) if job.calib_dataset else None
    place = source.location
    last = source.url.rpartition("/")[2] or (place.name if place.is_dir() else place.stem)
    name = f"{last}-calibrate"
    dtype = opened.auto_dtype if job.calibration_dtype == "auto" else job.calibration_dtype
    asked = Calibration(job.calibration_tokens, texts, job.scratch_directory, name, dtype, job.calibration_device, awq)
    reopened = _reopened(opened)
    return plan_calibration(reopened.again(), reopened, asked)


def _reopened(opened: OpenedSource) -> Reopened:
    from pipeline.calibration.layer_task import Reopened

    job, source = opened.job, opened.source
    if source.in_memory:
        return Reopened(live=source)
    told = tuple((key, value) for key in TOLD.get(source.container, ()) if (value := job.unsaid()[key]) is not None)
    place = None if job.meta_ckpt_dir else source.url or source.location
    return Reopened(place, job.meta_ckpt_dir, job.quant_ckpt_path, told=told)
