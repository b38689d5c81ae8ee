"""Turns jobs into conversions: jobs of one source become one conversion, and all are put in the order in which they are done.

Jobs that differ by their targets alone become one conversion with a [[target]] for each: the source is read and unpacked once.
Each is planned by itself first, so that one that is refused does not take the others with it. Conversions of one source that
cannot be one, as their other options differ, follow one another; where the source is packed, the first leaves its unpacked tensors
in scratch that they share.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import BadInput, Problem
from pipeline.jobs.files import job_file, printable
from pipeline.jobs.requests import Request
from pipeline.jobs.rows import Conversion, Unit
from pipeline.planning.job import Job, make_job
from pipeline.planning.make_plan import make_plan
from pipeline.planning.plans import Plan
from pipeline.planning.target_options import Shape
from pipeline.sinks.output_checks import check_taken
from pipeline.sinks.scratch import DEFAULT_ROOT

_OF_A_TARGET = {*Shape.model_fields, "output_dir", "target"}
_OF_A_SOURCE = ("model_dir", "meta_ckpt_dir", "quant_ckpt_path", "revision")


@dataclass(frozen=True)
class _Planned:
    """A job with its plan, for some requests. Without a plan it has problems, or is of a model on the Hub that is not here yet."""

    names: tuple[str, ...]
    where: str
    job: Job | None
    plan: Plan | None = None
    problems: tuple[Problem, ...] = ()
    parts: tuple[_Planned, ...] = ()

    @property
    def to_do(self) -> bool:
        """Whether there is a plan, and something left of it to do."""
        return self.plan is not None and not self.problems and not self.up_to_date

    @property
    def up_to_date(self) -> bool:
        return bool(self.plan and self.job and self.plan.up_to_date and not self.job.overwrite)


def make_units(requests: Sequence[Request], max_memory: int | None = None) -> list[Unit]:
    """The conversions of these requests, in the order in which they are to be done; those that are refused among them.

    `max_memory`: what one conversion may use at most, in bytes. Opens headers only, and writes nothing.
    """
    planned = [_plan(request, max_memory) for request in _distinct(requests)]
    units: list[Unit] = []
    for of_source in _grouped(planned, _source_key):
        merged = [each for alike in _grouped(of_source, _merge_key) for each in _merge(alike)]
        shared = _share([each for each in merged if each.to_do])
        units += [_unit(*shared.get(id(each), (each, "", False))) for each in merged]
    return units


def _distinct(requests: Sequence[Request]) -> list[Request]:
    """Requests without those asked for twice; of those that differ and write one directory all but the first are refused."""
    result: list[Request] = []
    written: dict[str, Request] = {}
    for request in requests:
        outputs = [str(target.output_dir) for target in request.job.targets] if request.job else []
        taken = next((output for output in outputs if output in written), None)
        if taken is None:
            written |= dict.fromkeys(outputs, request)
            result.append(request)
        elif written[taken].job != request.job:
            found = f"two jobs that differ, {written[taken].where} and {request.where}"
            problem = Problem(f"output_dir {taken}", found, "a directory for each")
            result.append(replace(request, job=None, problems=(problem,)))
    return result


def _plan(request: Request, max_memory: int | None) -> _Planned:
    names, job = (request.name,), request.job
    if job is None:
        return _Planned(names, request.where, None, problems=request.problems)
    if max_memory is not None and job.memory_limit > max_memory:
        job = make_job({**job.model_dump(exclude_unset=True), "memory_limit": max_memory})
    try:
        job_file(_options(job))
    except ValueError:
        found = printable(str([job.model_dir, *(target.output_dir for target in job.targets)]))
        return _Planned(names, request.where, None, problems=(Problem(request.where, found, "names in UTF-8"),))
    try:
        plan = make_plan(job)
    except BadInput as error:
        # What is on the Hub and not here is planned by `convert`, once it has fetched it.
        absent = isinstance(job.model_dir, str) and all(each.subject.startswith(job.model_dir) for each in error.problems)
        return _Planned(names, request.where, job, problems=() if absent else error.problems)
    taken = check_taken([target.output for target in plan.targets], job.overwrite)
    return _Planned(names, request.where, job, plan, tuple(taken))


def _grouped(planned: Iterable[_Planned], key: Callable[[_Planned], str]) -> list[list[_Planned]]:
    """The jobs of each key, in the order in which the keys first came."""
    groups: dict[str, list[_Planned]] = {}
    for each in planned:
        groups.setdefault(key(each), []).append(each)
    return list(groups.values())


def _source_key(planned: _Planned) -> str:
    if planned.job is None:
        return planned.where
    values = [getattr(planned.job, name) for name in _OF_A_SOURCE]
    return json.dumps([str(value.resolve() if isinstance(value, Path) else value) for value in values])


def _merge_key(planned: _Planned) -> str:
    if planned.job is None or planned.plan is None or planned.problems:
        return f"alone {id(planned)}"
    return json.dumps(planned.job.model_dump(mode="json", exclude=_OF_A_TARGET), sort_keys=True)


def _merge(alike: Sequence[_Planned]) -> list[_Planned]:
    """Jobs that differ by their targets alone as one conversion, where all of them together can be planned."""
    jobs = [each.job for each in alike if each.job]
    if len(alike) == 1:
        return list(alike)
    shared = jobs[0].model_dump(exclude=_OF_A_TARGET, exclude_unset=True)
    targets = [target.model_dump(mode="json", exclude_defaults=True) for job in jobs for target in job.targets]
    try:
        job = make_job({**shared, "target": targets})
        plan = make_plan(job)
    except BadInput:  # as for more memory than they need one by one
        return list(alike)
    names = tuple(name for each in alike for name in each.names)
    return [_Planned(names, alike[0].where, job, plan, parts=tuple(alike))]


def _share(alike: Sequence[_Planned]) -> dict[int, tuple[_Planned, str, bool]]:
    """Conversions of one packed source with a cut after unpack that is the same for all, by the id of what each was before.

    With each goes the cut's place, and whether a job asks for it to be kept. Nothing where there is but one, where a job says
    itself what to do with scratch, or where they would not share it.
    """
    jobs = [each.job for each in alike if each.job]
    chosen = any("scratch_after" in job.model_fields_set for job in jobs)
    if len(jobs) < 2 or chosen or not all(each.plan and each.plan.packed for each in alike):
        return {}
    root = jobs[0].scratch or str(jobs[0].targets[0].output_dir.parent / DEFAULT_ROOT)
    cut = {"scratch_after": ("unpack",), "keep_scratch": True, "scratch": root}
    try:
        changed = [make_job({**job.model_dump(exclude_unset=True), **cut}) for job in jobs]
        again = [replace(each, job=job, plan=make_plan(job)) for each, job in zip(alike, changed, strict=True)]
    except BadInput:
        return {}
    places = {tuple(cut.place for cut in each.plan.scratch) for each in again if each.plan}
    if len(places) > 1:
        return {}
    ((place,),) = places
    keep = any(job.keep_scratch for job in jobs)
    return {id(before): (after, place, keep) for before, after in zip(alike, again, strict=True)}


def _unit(planned: _Planned, shared: str = "", keep: bool = False) -> Unit:
    job, plan = planned.job, planned.plan
    error = str(BadInput(planned.problems)) if planned.problems else ""
    if job is None:
        name, where = printable(planned.names[0]), printable(planned.where)
        return Unit(Conversion(name, where, (), {"request": where, "name": name}, (), {}, 0), (name,), error=printable(error))
    parts = tuple(_unit(part) for part in planned.parts)
    source = str(job.meta_ckpt_dir or job.model_dir)
    kept = keep if shared else job.keep_scratch
    cuts = plan.scratch if plan and not kept else ()
    conversion = Conversion(
        name=planned.names[0] if not parts else f"{Path(source).name} ({len(parts)} jobs)",
        source=source,
        outputs=tuple(str(target.output_dir) for target in job.targets),
        options=_options(job),
        resources=(*(str(target.output_dir.resolve()) for target in job.targets), *filter(None, [shared])),
        room=_room(plan) if plan else {},
        peak_memory_bytes=plan.budget.peak_bytes if plan else 0 if error else int(job.memory_limit),
        scratch=tuple(cut.place for cut in cuts),
        parts=tuple((part.members[0], len(part.conversion.outputs)) for part in parts),
    )
    return Unit(conversion, planned.names, planned.up_to_date, error, parts, shared)


def _options(job: Job) -> dict[str, Any]:
    """A job's options as plain values, without those that are the defaults: what names it in the store, and its job file."""
    return job.model_dump(mode="json", exclude_defaults=True)


def _room(plan: Plan) -> dict[str, int]:
    """The bytes that a plan needs on local disks, by directory."""
    sinks = [sink for phase in plan.phases for sink in phase.sinks if not sink.complete]
    return {str(sink.directory): sink.local_bytes for sink in sinks if sink.local_bytes}
