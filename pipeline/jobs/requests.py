"""Finds the jobs that a batch asks for in job files, directories of them, patterns and batch files, in the order of their naming.

A batch file is TOML (configs/batches/), whose jobs come in this order:

    max_jobs = 2                            # and the other fields of BatchFile
    files = ["../jobs/*.toml"]              # job files, directories, patterns
    [defaults]                              # of every job below
    dtype = "bfloat16"
    [[job]]                                 # the options of a job, as in a job file
    model_dir = "/models/a"
    output_dir = "/ranks/a"
    [[matrix]]                              # see matrix.py

An error in the batch itself is raised before anything begins. An error in one job leaves the other jobs as they are.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import ByteSize, Field

from pipeline.documents import read_toml_file
from pipeline.errors import BadInput, Problem
from pipeline.jobs.files import Table, validate
from pipeline.jobs.matrix import expand
from pipeline.jobs.retry import Retry
from pipeline.planning.home import at_home
from pipeline.planning.job import Job, make_job
from pipeline.planning.job_file import anchored
from pipeline.planning.quantizations import overlaid

# Nobody looks at the dashboard of a conversion among many: without it one starts sooner, and runs faster.
SCHEDULER = "threads"


class BatchFile(Table):
    """A batch file."""

    max_jobs: Annotated[int | None, Field(ge=1, description="Conversions at a time.")] = None
    max_memory: Annotated[ByteSize | None, Field(description="Most memory of all conversions together.")] = None
    scheduler: Annotated[str | None, Field(description="A Dask cluster whose workers convert.")] = None
    cluster: Annotated[dict[str, Any] | None, Field(description="One to start for it: its class and options.")] = None
    retry: Retry = Retry()
    files: tuple[str, ...] = ()
    defaults: dict[str, Any] = Field(default_factory=dict)
    job: tuple[dict[str, Any], ...] = ()
    matrix: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Request:
    """One job that was asked for: its options as a Job, or, where they are wrong, why."""

    name: str
    where: str
    job: Job | None
    problems: tuple[Problem, ...] = ()

    def given(self, options: Mapping[str, Any], folder: Path) -> Request:
        """The same with those of the options that have a value and that the job has not chosen itself."""
        if self.job is None:
            return self
        more = {name: value for name, value in options.items() if value is not None and name not in self.job.model_fields_set}
        return replace(self, job=make_job({**self.job.model_dump(exclude_unset=True), **anchored(more, folder)})) if more else self


@dataclass(frozen=True)
class Asked:
    """Everything that was asked for; `settings` are those of the last batch file that has any."""

    requests: tuple[Request, ...]
    settings: BatchFile = field(default_factory=BatchFile)


def gather(names: Sequence[str], folder: Path, above: frozenset[Path] = frozenset()) -> Asked:
    """The jobs that names stand for: a job file, a batch file, a directory of job files, or a pattern of any of these.

    `above`: the batch files that these names stand in. Raises BadInput where a name stands for nothing or a batch file is wrong,
    with everything that is wrong with either.
    """
    requests: list[Request] = []
    settings = BatchFile()
    problems: list[Problem] = []
    for name in names:
        try:
            for path in _paths(name, folder):
                found = _file(path, above)
                requests += found.requests
                settings = found.settings if found.settings != BatchFile() else settings
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)
    return Asked(tuple(requests), settings)


def of_matrix(table: Mapping[str, Any], folder: Path, where: str, patterns: bool = True) -> list[Request]:
    """The jobs of a matrix. `patterns`: whether a source may be one. Raises BadInput."""
    return [_request(options, where) for options in expand(table, folder, where, patterns)]


def _paths(name: str, folder: Path) -> list[Path]:
    try:
        path = folder / at_home(name)
    except ValueError as error:
        raise BadInput([Problem(name, "a home directory", str(error))]) from None
    if path.is_dir():
        found = sorted(path.glob("*.toml"))
        expected = "job files, *.toml, in it"
    elif glob.has_magic(name) and not path.exists():
        found = [Path(each) for each in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207 (takes absolute patterns)
        expected = "a pattern that some job file's path fits"
    else:
        return [path]
    if not found:
        raise BadInput([Problem(name, "nothing", expected)])
    return [each for path in found for each in (_paths(str(path), folder) if path.is_dir() else [path])]


def _file(path: Path, above: frozenset[Path]) -> Asked:
    """The jobs that a file asks for. A job file that is wrong becomes a request with its problems."""
    try:
        values = read_toml_file(path, "a job file or a batch file")
    except BadInput as error:
        return Asked((Request(path.stem, str(path), None, error.problems),))
    if not {"files", "job", "matrix", "defaults"} & set(values):
        return Asked((_job_file(path),))
    folder = path.absolute().parent
    values |= anchored({key: table for key, table in values.items() if key == "cluster"}, folder)
    batch = validate(BatchFile, values, str(path))
    if path.resolve() in above:
        raise BadInput([Problem(f"{path}: files", "a batch file that names itself", "job files, or other batch files")])
    requests = list(gather(batch.files, folder, above | {path.resolve()}).requests)
    problems: list[Problem] = []
    defaults = anchored(batch.defaults, folder)
    requests += [_request(overlaid(defaults, anchored(table, folder)), f"{path}: job.{n}") for n, table in enumerate(batch.job)]
    for n, table in enumerate(batch.matrix):
        try:
            requests += of_matrix(overlaid(defaults, table), folder, f"{path}: matrix.{n}")
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)
    return Asked(tuple(requests), batch)


def _job_file(path: Path) -> Request:
    try:
        job = make_job({}, path)
        return Request(path.stem, str(path), job).given(_scheduler(job.model_dump(exclude_unset=True)), path.parent)
    except BadInput as error:
        return Request(path.stem, str(path), None, error.problems)


def _request(options: Mapping[str, Any], where: str) -> Request:
    name = str(options.get("output_dir") or next(iter(_targets(options)), "") or options.get("model_dir") or where)
    name = Path(name).name
    try:
        job = make_job({**_scheduler(options), **options})
    except BadInput as error:
        named = (replace(each, subject=f"{where}.{each.subject.removeprefix('--')}") for each in error.problems)
        return Request(name, where, None, tuple(named))
    return Request(name, where, job)


def _scheduler(options: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler of a job that names none: not of one that names a cluster to start, or is to be reported on by one."""
    return {} if options.get("performance_report") or options.get("cluster") else {"scheduler": SCHEDULER}


def _targets(options: Mapping[str, Any]) -> Iterable[Any]:
    tables = options.get("target")
    return (table.get("output_dir") for table in tables if isinstance(table, Mapping)) if isinstance(tables, list) else ()
