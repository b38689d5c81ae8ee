"""Questions to every worker of a cluster elsewhere, before anything is written: its version, and whether it sees all files.

Workers write rank files at offsets and read the source themselves, so that both must be on one file system for all of them. That is
tried, not assumed: with a file in each output's place that each worker reads and answers. Where outputs are not seen, but scratch
is, the plan is made again, to go through scratch after `shard`.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.errors import BadInput, Problem
from pipeline.planning.make_plan import plan_opened
from pipeline.planning.opening import OnCluster
from pipeline.planning.plans import Plan
from pipeline.run.schedulers import elsewhere
from pipeline.sinks.output_checks import existing
from pipeline.sinks.scratch import ScratchGroup
from pipeline.tensor.remote_path import is_remote
from pipeline.tensor.system_errors import refusing

PACKAGES = ("headrace", "dask", "distributed")
SEEN = 20  # files of a source that are looked at
PROBE = ".headrace-probe-"
ANSWER_SECONDS = 3.0  # for a scheduler that a plan is to ask
BUCKET = "Give --scratch s3://bucket/prefix, a place in a bucket: rank files are then assembled of what the workers write there"
MEASURED = "Give --act_range a file of headrace calibrate's: the activations of a model go to no bucket"


def foreseen(plan: Plan) -> Plan:
    """A plan as `convert` would fit it to its cluster, where that is there. Raises BadInput as `fitted` does."""
    job = plan.job
    if not job.elsewhere or (plan.up_to_date and not job.overwrite):
        return plan
    why = "the cluster is started for the run"
    if not (job.cluster and "class" in job.cluster):
        with contextlib.ExitStack() as stack:
            try:
                client = stack.enter_context(elsewhere(job.scheduler, job.cluster, ANSWER_SECONDS))
            except BadInput:
                why = f"{job.scheduler} does not answer"
            else:
                with refusing(str(plan.targets[0].output.directory), "a place that can be written"):
                    return fitted(plan, client)
    return replace(plan, notes=(*plan.notes, f"whether the workers see all files is tried by convert: {why}"))


def fitted(plan: Plan, client: Any) -> Plan:
    """A plan as the workers that are there now can do it.

    Where some do not see the outputs' directories and all see scratch, rank files are assembled by this process; and so where an
    unfinished run of the plan did that. The room for scratch is that for all of the workers' threads. Raises BadInput with every
    worker that runs another version, or does not see the source or, where there is no such scratch, what it is to write.
    """
    # Of a source at a URL each worker asks the server itself.
    files = [] if plan.source.in_memory or plan.source.url else [Path(file.path) for file in plan.source.files]
    outputs, cuts = _outputs(plan), [cut.directory for cut in plan.scratch if isinstance(cut, ScratchGroup) and not cut.complete]
    root = [] if "://" in plan.job.scratch_root or not outputs else [Path(plan.job.scratch_root)]
    measured = [plan.calibrating.plan.activations.directory] if plan.calibrating else []
    wrong, unseen = ask(client, files, {*outputs, *cuts, *root, *measured})

    def blind(places: Sequence[Path], remedy: str = BUCKET) -> list[Problem]:
        return [replace(problem, remedy=remedy) for place in places for problem in unseen[place]]

    hidden = blind(outputs)
    amiss = [*blind([*cuts, *root] if hidden else cuts), *blind(measured, MEASURED)]
    if amiss or wrong:
        raise BadInput(list(dict.fromkeys([*wrong, *(hidden if amiss else ()), *amiss])))
    apart = bool(hidden) or (_assembling(plan) and not blind(root))
    workers = OnCluster(sum(map(int, client.nthreads().values())), apart)
    if plan.opened is None or not (apart or (plan.scratch and workers.threads > plan.job.threads)):
        return plan
    again = plan_opened(replace(plan.opened, workers=workers))
    return replace(again, notes=tuple(dict.fromkeys((*again.notes, *plan.notes))))


def ask(client: Any, source: Sequence[Path], places: set[Path]) -> tuple[list[Problem], dict[Path, list[Problem]]]:
    """Look at all workers of a client's cluster that are there now.

    `source`: the files that they read. `places`: directories that they write, which need not be there yet. Returns what is wrong
    with workers that run another version or do not see the source as this process does, and for each place who does not see it.
    """
    wanted, expected = versions(), f"one file system that all workers see, as {os.uname().nodename} does"
    files = {str(path): path.stat().st_size for path in source[:SEEN]}
    nearest = {place: existing(place) for place in places}
    unseen: dict[str, list[Problem]] = {str(place): [] for place in nearest.values()}
    problems = []
    with _probes(set(nearest.values())) as probes:
        answers = _answers(client, look, files, probes)
        for address, said in answers.items():
            if isinstance(said, BaseException):
                found = f"no answer ({type(said).__name__}: {said})"
                problems.append(Problem(f"worker {address}", found, f"headrace {wanted['headrace']} installed there"))
                continue
            host = f"worker {address} on {said['host']}"
            found = ", ".join(f"{name} {said['versions'].get(name) or 'missing'}" for name in wanted)
            if said["versions"] != wanted:
                versioned = ", ".join(f"{name} {version}" for name, version in wanted.items())
                problems.append(Problem(host, found, versioned, "Install the same versions on all of them"))
            problems += [Problem(host, f"{path}: {what}", expected) for path, what in said["wrong"].items() if path in files]
            for place, token in probes.items():
                found = said["wrong"].get(place, "a file that it wrote there is not seen here")
                if place in said["wrong"] or not _seen(Path(place), token, said["name"]):
                    unseen[place].append(Problem(host, f"{place}: {found}", expected))
    return problems, {place: unseen[str(path)] for place, path in nearest.items()}


def look(files: Mapping[str, int], probes: Mapping[str, str]) -> dict[str, Any]:
    """The answer of a worker: its versions, what differs of files of these sizes, and of the probes, which it answers."""
    wrong, name = {}, uuid.uuid4().hex
    for path, size in files.items():
        try:
            found = Path(path).stat().st_size
        except OSError as error:
            wrong[path] = error.strerror or "an error"
        else:
            if found != size:
                wrong[path] = f"{found:,} bytes, not {size:,}"
    for place, token in probes.items():
        try:
            if (Path(place) / f"{PROBE}{token}").read_text() != token:
                wrong[place] = "another file than the one written there"
            else:
                _write(Path(place) / f"{PROBE}{token}-{name}", token)
        except OSError as error:
            wrong[place] = f"{error.strerror or 'an error'}, of a file written there a moment ago"
    return {"host": os.uname().nodename, "name": name, "versions": versions(), "wrong": wrong}


def versions() -> dict[str, str]:
    """The versions here of the packages that must agree; "" for one that is not installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ""
    return found


def _outputs(plan: Plan) -> list[Path]:
    """The local directories of a plan's outputs, where workers are to write these."""
    outputs = [target.output for target in plan.targets if not plan.phases[-1].here and not is_remote(target.output.directory)]
    return [output.directory for output in outputs if plan.job.overwrite or not output.complete]


def _assembling(plan: Plan) -> bool:
    """Whether an unfinished run of a plan without a cut after `shard` had that, for this process to assemble ranks."""
    if plan.job.overwrite or any("shard0" in target.output.cuts for target in plan.targets):
        return False
    begun = [(target.output.id, target.output.unfinished()) for target in plan.targets]
    cuts = [said.get("cuts") for output, said in begun if said.get("id") == output]
    return any(isinstance(each, Mapping) and "shard0" in each for each in cuts)


def _answers(client: Any, function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """The answer of each worker, by its address; the exception of one that cannot."""
    answers: dict[str, Any] = client.run(function, *arguments, on_error="return")
    return answers


@contextmanager
def _probes(places: set[Path]) -> Iterator[dict[str, str]]:
    """A probe in each directory, removed with all answers at the end: {directory: token}."""
    made: dict[str, str] = {}
    try:
        for place in sorted(places):
            made[str(place)] = uuid.uuid4().hex
            _write(place / f"{PROBE}{made[str(place)]}", made[str(place)])
        yield made
    finally:
        for directory, token in made.items():
            for file in Path(directory).glob(f"{PROBE}{token}*"):
                with contextlib.suppress(OSError):
                    file.unlink()


def _write(file: Path, token: str) -> None:
    """Write and close a file: what is closed is there for whoever opens it later, on NFS too."""
    with file.open("w") as stream:
        stream.write(token)
        stream.flush()
        os.fsync(stream.fileno())


def _seen(place: Path, token: str, name: str) -> bool:
    try:
        return (place / f"{PROBE}{token}-{name}").read_text() == token
    except OSError:
        return False
