"""Turns jobs into units: jobs of one source become one conversion, and all are put in the order in which they are done.

Jobs that differ by their targets alone become one conversion with a [[target]] for each: the source is read and unpacked once.
Each is planned by itself first, so that one that is refused does not take the others with it. Conversions of one source that
cannot be one, as their other options differ, follow one another; where the source is packed, the first leaves its unpacked tensors
in scratch that they share.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import BadInput, Problem
from pipeline.jobs.files import job_file, printable
from pipeline.jobs.requests import Request
from pipeline.planning.engine_options import job_requests
from pipeline.planning.job import Job, make_job
from pipeline.planning.make_plan import make_plan
from pipeline.planning.plans import Plan
from pipeline.planning.target_options import Shape
from pipeline.sinks.output_checks import check_taken

_OF_A_TARGET = {*Shape.model_fields, "output_dir", "target"}
_OF_A_SOURCE = ("model_dir", "meta_ckpt_dir", "quant_ckpt_path", "revision")

# The last two are of planning itself, for a daemon that had it done.
Planned = Literal["to do", "up_to_date", "refused", "unsettled", "failed", "crashed"]


@dataclass(frozen=True)
class Unit:
    """One piece of work: a conversion with its engines, for the jobs named in `members`, or why it is not done (`error`).

    `options` are a Job's fields as plain values. As planned: `peak_memory_bytes`, and `room`, the bytes needed by directory.
    `engines`: the directories of engines to build after it. `after`: the name of the unit that must have ended before. `parts`: the
    units of the jobs one by one, where there are several. Names are unique in a batch.
    """

    name: str
    members: tuple[str, ...]
    source: str
    outputs: tuple[str, ...]
    options: Mapping[str, Any]
    state: Planned = "to do"
    error: str = ""
    room: Mapping[str, int] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    engines: tuple[str, ...] = ()
    scratch: tuple[str, ...] = ()
    after: str = ""
    parts: tuple[Unit, ...] = ()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Unit:
        """A unit of its values in JSON."""
        lists = {name: tuple(values[name]) for name in ("members", "outputs", "engines", "scratch")}
        return cls(**{**values, **lists, "parts": tuple(cls.of(part) for part in values["parts"])})

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def steps(self) -> list[tuple[Literal["convert", "build"], dict[str, Any]]]:
        """The steps to do it, one after the other, with the job of each: engines are built of ranks that are whole."""
        if not self.engines:
            return [("convert", dict(self.options))]
        plain = {key: value for key, value in self.options.items() if key != "engine"}
        if "target" in plain:
            plain["target"] = [{key: value for key, value in each.items() if key != "engine"} for each in plain["target"]]
        return [("convert", plain), ("build", _replacing_engines(self.options))]


def _replacing_engines(options: Mapping[str, Any]) -> dict[str, Any]:
    """A job that replaces engines where it was to replace all: its checkpoints are new already."""

    def own(values: Mapping[str, Any]) -> dict[str, Any]:
        engine = values.get("engine")
        return {**values, "engine": {**engine, "overwrite": True}} if isinstance(engine, Mapping) else dict(values)

    if not options.get("overwrite"):
        return dict(options)
    job = own({key: value for key, value in options.items() if key != "overwrite"})
    return {**job, "target": [own(each) for each in job["target"]]} if "target" in job else job


@dataclass(frozen=True)
class _Asked:
    """A job with its plan, for some requests. Without a plan it has problems, or is of a model on the Hub that is not here yet."""

    names: tuple[str, ...]
    where: str
    job: Job | None
    plan: Plan | None = None
    problems: tuple[Problem, ...] = ()
    parts: tuple[_Asked, ...] = ()
    settled: bool = True

    @property
    def to_do(self) -> bool:
        """Whether there is a plan, and something left of it to do."""
        return self.plan is not None and self.state == "to do"

    @property
    def _unsure(self) -> bool:
        """Whether a whole output is still to be looked at, as a power cut may have damaged it, or to be brought to the disk."""
        outputs = [target.output for target in self.plan.targets] if self.plan else []
        return any(output.doubtful or (self.job and self.job.sync and output.unflushed) for output in outputs)

    @property
    def state(self) -> Planned:
        if self.problems:
            return "refused"
        done = self.plan and self.job and self.plan.up_to_date and not self.job.overwrite and not self._unsure
        if done and self.job and not job_requests(self.job.targets, self.job.engine):
            return "up_to_date"
        return "to do" if self.settled else "unsettled"


def make_units(requests: Sequence[Request], max_memory: int | None = None, settle_seconds: float = 0.0) -> list[Unit]:
    """The units of these requests, in the order in which they are to be done; those that are not done among them.

    `max_memory`: what one conversion may use at most, in bytes. `settle_seconds`: a source of which a file is younger is left for
    another time. Opens headers only, and writes nothing.
    """
    asked = [_plan(request, max_memory, settle_seconds) for request in _distinct(requests)]
    units: list[Unit] = []
    for of_source in _grouped(asked, _source_key):
        merged = [each for alike in _grouped(of_source, _merge_key) for each in _merge(alike)]
        shared = _share([each for each in merged if each.to_do])
        before = ""
        for each in merged:
            unit = _named(_unit(shared.get(id(each), each)), units)
            units.append(replace(unit, after=before) if id(each) in shared else unit)
            before = unit.name if id(each) in shared else before
    return units


def _named(unit: Unit, others: Sequence[Unit]) -> Unit:
    """A unit with a name that no other has."""
    taken = {each.name for each in others}
    names = (unit.name, *(f"{unit.name} ({number})" for number in range(2, len(taken) + 3)))
    return replace(unit, name=next(name for name in names if name not in taken))


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


def _plan(request: Request, max_memory: int | None, settle_seconds: float) -> _Asked:
    names, job = (request.name,), request.job
    if job is None:
        return _Asked(names, request.where, None, problems=request.problems)
    if max_memory is not None and job.memory_limit > max_memory:
        job = make_job({**job.model_dump(exclude_unset=True), "memory_limit": max_memory})
    try:
        job_file(_options(job))
    except ValueError:
        found = printable(str([job.model_dir, *(target.output_dir for target in job.targets)]))
        return _Asked(names, request.where, None, problems=(Problem(request.where, found, "names in UTF-8"),))
    if settle_seconds and _age(job) < settle_seconds:
        return _Asked(names, request.where, job, settled=False)
    try:
        plan = make_plan(job)
    except BadInput as error:
        # What is on the Hub and not here is planned by `convert`, once it has fetched it.
        absent = isinstance(job.model_dir, str) and all(each.subject.startswith(job.model_dir) for each in error.problems)
        return _Asked(names, request.where, job, problems=() if absent else error.problems)
    taken = check_taken([target.output for target in plan.targets], job.overwrite)
    return _Asked(names, request.where, job, plan, tuple(taken))


def _age(job: Job) -> float:
    """Seconds since a file of a job's source was written last."""
    source = job.meta_ckpt_dir or job.model_dir
    if not isinstance(source, Path) or not source.exists():
        return float("inf")
    files = [source, *source.iterdir()] if source.is_dir() else [source]
    return time.time() - max(each.lstat().st_mtime for each in files)


def _grouped(asked: Iterable[_Asked], key: Callable[[_Asked], str]) -> list[list[_Asked]]:
    """The jobs of each key, in the order in which the keys first came."""
    groups: dict[str, list[_Asked]] = {}
    for each in asked:
        groups.setdefault(key(each), []).append(each)
    return list(groups.values())


def _source_key(asked: _Asked) -> str:
    if asked.job is None:
        return asked.where
    values = [getattr(asked.job, name) for name in _OF_A_SOURCE]
    return json.dumps([str(value.resolve() if isinstance(value, Path) else value) for value in values])


def _merge_key(asked: _Asked) -> str:
    if asked.job is None or asked.plan is None or asked.problems:
        return f"alone {id(asked)}"
    return json.dumps(asked.job.model_dump(mode="json", exclude=_OF_A_TARGET), sort_keys=True)


def _merge(alike: Sequence[_Asked]) -> list[_Asked]:
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
    return [_Asked(names, alike[0].where, job, plan, parts=tuple(alike))]


def _share(alike: Sequence[_Asked]) -> dict[int, _Asked]:
    """Conversions of one packed source with a cut after unpack that is the same for all, by the id of what each was before.

    The cut is kept for the outputs of all of them, unless a job asks for it to stay. Nothing where there is but one, where a job
    says itself what to do with scratch, or where they would not share it.
    """
    jobs = [each.job for each in alike if each.job]
    chosen = any("scratch_after" in job.model_fields_set for job in jobs)
    if len(jobs) < 2 or chosen or not all(each.plan and each.plan.packed for each in alike):
        return {}
    root = jobs[0].scratch_root
    outputs = () if any(job.keep_scratch for job in jobs) else tuple(target.output_dir for job in jobs for target in job.targets)
    cut = {"scratch_after": ("unpack",), "keep_scratch": True, "scratch": root, "scratch_outputs": outputs}
    try:
        changed = [make_job({**job.model_dump(exclude_unset=True), **cut}) for job in jobs]
        again = [replace(each, job=job, plan=make_plan(job)) for each, job in zip(alike, changed, strict=True)]
    except BadInput:
        return {}
    places = {tuple(cut.place for cut in each.plan.scratch) for each in again if each.plan}
    return {} if len(places) > 1 else {id(before): after for before, after in zip(alike, again, strict=True)}


def _unit(asked: _Asked) -> Unit:
    job, plan = asked.job, asked.plan
    error = str(BadInput(asked.problems)) if asked.problems else ""
    if job is None:
        name, where = printable(asked.names[0]), printable(asked.where)
        return Unit(name, (name,), where, (), {}, "refused", printable(error))
    source = str(job.meta_ckpt_dir or job.model_dir)
    requests = job_requests(job.targets, job.engine)
    return Unit(
        name=asked.names[0] if not asked.parts else f"{Path(source).name} ({len(asked.parts)} jobs)",
        members=asked.names,
        source=source,
        outputs=tuple(str(target.output_dir) for target in job.targets),
        options=_options(job),
        state=asked.state,
        error=error,
        room=_room(plan) if plan else {},
        peak_memory_bytes=plan.budget.peak_bytes if plan else 0 if error else int(job.memory_limit),
        engines=tuple(str(request.engine) for request in requests),
        scratch=tuple(cut.place for cut in plan.scratch) if plan else (),
        parts=tuple(_unit(part) for part in asked.parts),
    )


def _options(job: Job) -> dict[str, Any]:
    """A job's options as plain values, without those that are the defaults: its job file."""
    return job.model_dump(mode="json", exclude_defaults=True)


def _room(plan: Plan) -> dict[str, int]:
    """The bytes that a plan needs on local disks, by directory."""
    sinks = [sink for phase in plan.phases for sink in phase.sinks if not sink.complete]
    return {str(sink.directory): sink.local_bytes for sink in sinks if sink.local_bytes}
