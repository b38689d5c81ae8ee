"""Questions to every worker of a cluster elsewhere, before anything is written: its version, and whether it sees all files.

Workers write rank files at offsets and read the source themselves, so that both must be on one file system for all of them, or the
source copied to each. That is tried, not assumed: with a file in each output's place that each worker reads and answers. Where
outputs are not seen, but scratch is, the plan is made again, to go through scratch after `shard`. Workers that come later are asked
as they come (admission.py).
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.errors import BadInput, Problem, SourceChanged
from pipeline.planning.make_plan import plan_opened
from pipeline.planning.opening import OnCluster
from pipeline.planning.plans import Plan
from pipeline.run.looking import PROBE, Question, faults, look, shared, write_probe
from pipeline.run.schedulers import elsewhere
from pipeline.sinks.output_checks import existing
from pipeline.sinks.scratch import ScratchGroup
from pipeline.tensor.remote_path import is_remote
from pipeline.tensor.system_errors import refusing
from stages.read.changing import changes

ANSWER_SECONDS = 3.0  # for a scheduler that a plan is to ask
MEASURING = ("torch", "transformers")  # what a calibration needs, in any version
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
                if client.nthreads():
                    with refusing(str(plan.targets[0].output.directory), "a place that can be written"):
                        return fitted(plan, client, question_of(plan))
                why = f"{job.scheduler} has none yet"
    return replace(plan, notes=(*plan.notes, f"whether the workers see all files is tried by convert: {why}"))


def question_of(plan: Plan) -> Question:
    """All that the workers of a plan are asked. Raises SourceChanged where the source is not as it was planned, and OSError."""
    # Of a source at a URL each worker asks the server itself.
    files = () if plan.source.in_memory or plan.source.url else tuple(plan.source.files)
    if changed := changes(files):
        raise SourceChanged(changed, "nothing was written: start over")
    return Question.of(files, MEASURING if plan.calibrating else ())


def admitted(client: Any, question: Question, marks: Mapping[str, bytes]) -> AbstractContextManager[str]:
    """Have the workers that come while a plan runs asked, too. Gives the name by which tasks ask whether theirs may do them.

    `marks`: the first lines of the journals of what is written, by path, which all workers are to see.
    """
    from pipeline.run.admission import admitting

    return admitting(client, question, marks)


def fitted(plan: Plan, client: Any, question: Question) -> Plan:
    """A plan as the workers that are there now can do it.

    Where some do not see the outputs' directories and all see scratch, rank files are assembled by this process; and so where an
    unfinished run of the plan did that. The room for scratch is that for all of the workers' threads. Raises BadInput with every
    worker that runs another version, or does not see the source or, where there is no such scratch, what it is to write.
    """
    outputs, cuts = _outputs(plan), [cut.directory for cut in plan.scratch if isinstance(cut, ScratchGroup) and not cut.complete]
    measured = [plan.calibrating.plan.activations.directory] if plan.calibrating else []
    wrong, unseen = ask(client, question, {*outputs, *cuts, *measured})
    assembled = _assembling(plan)
    # Only ranks that are assembled need scratch that the plan does not speak of.
    needed = bool(outputs) and (assembled or any(unseen[place] for place in outputs)) and "://" not in plan.job.scratch_root
    root = [Path(plan.job.scratch_root)] if needed else []
    try:
        unseen |= ask(client, replace(question, files=(), spots=()), set(root))[1] if root else {}
    except BadInput as error:  # this process cannot write there
        unseen |= {place: list(error.problems) for place in root}

    def blind(places: Sequence[Path], remedy: str = BUCKET) -> list[Problem]:
        return [replace(problem, remedy=remedy) for place in places for problem in unseen[place]]

    hidden = blind(outputs)
    amiss = [*blind([*cuts, *root] if hidden else cuts), *blind(measured, MEASURED)]
    if amiss or wrong:
        raise BadInput(list(dict.fromkeys([*wrong, *(hidden if amiss else ()), *amiss])))
    apart = bool(hidden) or (assembled and not blind(root))
    workers = OnCluster(sum(map(int, client.nthreads().values())), apart)
    if plan.opened is None or not (apart or (plan.scratch and workers.threads > plan.job.threads)):
        return plan
    again = plan_opened(replace(plan.opened, workers=workers))
    return replace(again, notes=tuple(dict.fromkeys((*again.notes, *plan.notes))))


def ask(client: Any, question: Question, places: set[Path]) -> tuple[list[Problem], dict[Path, list[Problem]]]:
    """Look at all workers of a client's cluster that are there now.

    `places`: directories that they write, which need not be there yet. Returns what is wrong with workers that run another version
    or do not see the source as this process does, and for each place who does not see it. Raises BadInput where this process cannot
    write to one.
    """
    asker = os.uname().nodename
    nearest = {place: existing(place) for place in places}
    unseen: dict[str, list[Problem]] = {str(place): [] for place in nearest.values()}
    problems = []
    with _probes(set(nearest.values())) as probes:
        answers = _answers(client, look, question, probes)
        for address, said in answers.items():
            if isinstance(said, BaseException):
                found = f"no answer ({type(said).__name__}: {said})"
                problems.append(Problem(f"worker {address}", found, f"headrace {question.versions['headrace']} installed there"))
                continue
            problems += faults(address, said, question, asker)
            for place, token in probes.items():
                found = said["unseen"].get(place, "a file that it wrote there is not seen here")
                if place in said["unseen"] or not _seen(Path(place), token, said["name"]):
                    host = f"worker {address} on {said['host']}"
                    unseen[place].append(Problem(host, f"{place}: {found}", shared(asker)))
    return problems, {place: unseen[str(path)] for place, path in nearest.items()}


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
            with refusing(place, "a directory that can be written"):
                write_probe(place / f"{PROBE}{made[str(place)]}", made[str(place)])
        yield made
    finally:
        for directory, token in made.items():
            for file in Path(directory).glob(f"{PROBE}{token}*"):
                with contextlib.suppress(OSError):
                    file.unlink()


def _seen(place: Path, token: str, name: str) -> bool:
    try:
        return (place / f"{PROBE}{token}-{name}").read_text() == token
    except OSError:
        return False
