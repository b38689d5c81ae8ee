"""make_plan: opened, checked, composed, budgeted. Opens headers only, writes nothing, and refuses with one report."""

from __future__ import annotations

from collections import Counter
from typing import Any

from pipeline.errors import BadInput
from pipeline.model.dtypes import BY_TARGET
from pipeline.planning.calibrating import bounded
from pipeline.planning.checks import check_canonical, check_request, check_targets
from pipeline.planning.choose_algorithm import dequantization_notes, unused
from pipeline.planning.compose import canonical, choose_all, compose_target, mark
from pipeline.planning.cuts import Cuts
from pipeline.planning.descriptors import descriptor_problems
from pipeline.planning.generations import generation_notes
from pipeline.planning.job import Job
from pipeline.planning.kept_notes import source_notes
from pipeline.planning.measured import measured
from pipeline.planning.memory import MAX_PIECE_BYTES, block_bytes, budget
from pipeline.planning.opening import OpenedSource, open_job
from pipeline.planning.phases import Phase, group_blocks
from pipeline.planning.plans import Plan
from pipeline.planning.rank_parts import grouped, parts_need
from pipeline.planning.requantized import requantization_notes
from pipeline.planning.runtime_fit import check_runtime, fit
from pipeline.planning.stores import make_stores, need
from pipeline.planning.targets import make_target, plan_identity
from pipeline.sinks import activations
from pipeline.tensor.remote_path import is_remote
from pipeline.tensor.system_errors import refusing
from stages.quantize import sizes_agree
from stages.read.changing import arriving
from stages.read.read_ahead import AHEAD
from stages.read.scratch_chunks import read_scratch


@refusing("the source or an output", "files that can be read")
def make_plan(job: Job, live_model: Any = None, download: bool = False) -> Plan:
    """Plan a job.

    Parameters
    ----------
    live_model
        A Hugging Face model in memory, in the place of a checkpoint.
    download
        Whether missing files of a model on the Hub may be fetched.

    Raises
    ------
    BadInput
        With everything that is wrong with the request, the source or the output directories.
    """
    return plan_opened(open_job(job, live_model, download))


def plan_opened(opened: OpenedSource) -> Plan:
    """Plan a job whose source is open. Raises BadInput with everything that is wrong with it."""
    job, given = opened.job, opened
    request = check_request(opened)
    _refuse(request, opened.unreadable)  # of what cannot be unpacked nothing more can be asked
    chosen, contradictions = choose_all(job.targets, opened.packing, opened.source.named)
    _refuse(request, contradictions)
    chosen = fit(opened, chosen)
    unfit, runtime_notes = check_runtime(opened, chosen)
    found = measured(opened, chosen)
    opened = found.opened
    request += [*unfit, *found.problems]

    size = block_bytes(opened.source.nbytes)
    identity = plan_identity(opened, found.calibrating)
    cuts = Cuts(opened, identity, size, read_scratch)
    chunk = _chunk_bytes(opened, size)
    made: Counter[str] = Counter()
    tensors = canonical(opened, cuts, chunk, made)
    wrong = [*request, *opened.matches.problems, *check_canonical(opened, tensors)]
    _refuse(wrong, check_targets(opened, chosen, tensors, sound=not wrong))
    _refuse((), wrong)

    asked = zip(job.targets, opened.shardings, chosen, strict=True)
    targets = [compose_target(*each, tensors, opened, size, made) for each in asked]
    _refuse((), [problem for target in targets for problem in sizes_agree(target.entries, opened.matches.origin)])
    stores = make_stores(tensors, targets, opened, bool(cuts.phases))
    stores = cuts.cut_ranks(stores, [target.ranks for target in targets], {name: row.numpy for name, row in BY_TARGET.items()})
    mark(made, "scratch", [array for store in stores for array in store.arrays])
    left_out = {**opened.matches.left_out, **unused(opened.packing, opened.source.named, chosen)}
    reasons = {str(name): reason for name, reason in left_out.items()}
    of_gpus = generation_notes(job, chosen)
    kept_notes = source_notes(opened, chosen, tensors)
    of_numbers = dequantization_notes(opened.packing, chosen, job.dequantize or job.requantize)
    of_numbers += requantization_notes(opened, chosen, size)
    notes = (*opened.notes, *runtime_notes, *of_numbers, *kept_notes, *of_gpus, *cuts.notes())
    places = {cut.stage: (cut.id, cut.place) for cut in cuts.groups}
    if found.calibrating:
        files = found.calibrating.plan.activations
        places[activations.STAGE] = (files.identity, str(files.directory))
    outputs = tuple(make_target(target, opened, identity, reasons, notes, places) for target in targets)
    sinks = tuple(target.output for target in outputs)
    groups, parts = grouped(stores, sinks, size) if cuts.assembled else (group_blocks(stores, size), {})
    write = Phase("write", stores, sinks, groups, cuts.passes(), cuts.assembled_here, parts)
    phases = (*cuts.phases, write)
    # One that is under way is twice in memory while its parts are put together.
    ahead = 2 * AHEAD if opened.source.url else 0
    needs = [
        *(need(store, chunk < size, ahead) for phase in phases for store in phase.stores),
        *parts_need(parts, fetched=bool(ahead and not cuts.phases)),
    ]
    tasks = sum(len(phase.groups) for phase in phases)
    calibrating, limits = bounded(
        found.calibrating,
        job.memory_limit,
        lambda beside: budget(job.memory_limit, job.threads, needs, tasks, made.total(), beside),
    )
    written = sum(len(phase.sinks) for phase in phases)
    _refuse((), () if job.elsewhere else descriptor_problems(limits.workers, written))
    cut, why = tuple(cuts.groups), cuts.reasons()
    packed = bool(opened.packing.formats)
    # Of today alone, so that they are not said in headrace.json.
    notes = (*notes, *arriving(opened.source.location, opened.source.files))
    return Plan(
        job,
        opened.source,
        opened.family,
        opened.model,
        outputs,
        phases,
        cut,
        why,
        size,
        limits,
        reasons,
        notes,
        packed,
        calibrating,
        given,
    )


def _refuse(also: Any, problems: Any) -> None:
    """Raise BadInput with `problems`, and what else is wrong `also`, where there are any of the first."""
    if problems:
        raise BadInput([*also, *problems])


def _chunk_bytes(opened: OpenedSource, size: int) -> int:
    """The most bytes of a chunk: a block, but no more than a piece where chunks are put into and fetched from a bucket whole."""
    job = opened.job
    forced = (opened.source.in_memory and job.elsewhere) or opened.workers.apart
    stages = job.cuts or forced or any(is_remote(target.output_dir) for target in job.targets)
    remote = "://" in (job.scratch or "") and stages
    return min(size, MAX_PIECE_BYTES) if remote else size
