"""Print plans and results of conversions as tables in a terminal; of a plan first whether it would work, and for how long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.calibration.words import calibration_words
from pipeline.printed import escaped, many
from pipeline.watching.units import human_bytes, human_rate

if TYPE_CHECKING:
    from pipeline.planning.plans import Plan
    from pipeline.run.foresee import Outlook
    from pipeline.run.results import Result

Place = Callable[[str], str]  # a path as it is to be printed


def plan_table(plan: Plan, outlook: Outlook, place: Place = str, of_engines: Sequence[str] = ()) -> RenderableType:
    """Make the tables of `headrace plan`: the verdict, then the facts, then each output. `of_engines`: what is wrong with these."""
    summary = plan.summary()
    source = summary["source"]
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    facts.add_row("source", place(source["path"]))
    size = human_bytes(source["bytes"])
    named = source["dtype"] or ("packed" if plan.packed else "no type named")
    facts.add_row("", f"{source['kind']}, {many(source['tensors'], 'tensor')}, {size}, {named}")
    facts.add_row("family", f"{source['family']} ({source['architecture']})")
    for phase in summary["phases"]:
        facts.add_row("phase", f"{phase['name']}: {many(phase['tensors'], 'tensor')} in {many(phase['tasks'], 'task')}")
    facts.add_row("graph", Text(plan.graph().line()))
    block, piece = human_bytes(summary["block_bytes"]), human_bytes(summary["piece_bytes"])
    workers = f"{many(summary['workers'], 'worker')} on {summary['scheduler']}"
    facts.add_row("blocks", f"{block} a task, {piece} at a time, {workers}")
    if "calibration" in summary:
        facts.add_row("calibrates", calibration_words(summary["calibration"]))
    peak, limit = human_bytes(summary["peak_memory_bytes"]), human_bytes(summary["memory_limit_bytes"])
    facts.add_row("memory", f"{peak} projected, {limit} allowed")
    facts.add_row("reads", _moved(summary["bytes_read"], "of the source", summary["scratch_bytes_read"], "of scratch"))
    facts.add_row("writes", _moved(summary["bytes_written"], "into rank files", summary["scratch_bytes_written"], "to scratch"))
    for stage, reason in summary["scratch_reasons"].items():
        facts.add_row("scratch", f"after {stage}: {reason}")
    for cut in summary["scratch"]:
        facts.add_row("", f"{place(cut['path'])}, {human_bytes(cut['bytes'])}{', reused' if cut['reused'] else ''}")
    for reason, names in _by_reason(source["left_out"]).items():
        shown = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        facts.add_row("left out", f"{many(len(names), 'tensor')} ({reason}): {shown}")
    for note in summary["notes"]:
        facts.add_row("note", note)
    verdict = _verdict(summary, [*summary["obstacles"], *of_engines], outlook, place)
    return Group(*verdict, facts, "", *(_target_table(each, place) for each in summary["targets"]))


def _verdict(summary: Mapping[str, Any], obstacles: Sequence[str], outlook: Outlook, place: Place) -> Iterator[RenderableType]:
    """Lines on whether `convert` would work now, and for how long."""
    if obstacles:
        yield Text(f"would not convert: {many(len(obstacles), 'problem')}", style="bold red")
        yield from (f"  - {place(obstacle)}" for obstacle in obstacles)
    elif all(target["up_to_date"] for target in summary["targets"]):
        yield Text("would do nothing: up to date", style="bold green")
    else:
        done, tasks = outlook.done_tasks, many(outlook.tasks, "task")
        what = f"would resume: {done} of {tasks} done" if done else f"would convert in {tasks}"
        yield Text(f"{what}, to write {human_bytes(summary['bytes_written'])}", style="bold green")
        if outlook.seconds is not None:
            measured = f"by trying the work for {outlook.sample_seconds:.1f} s on this machine; a slow disk takes longer"
            yield f"about {duration(outlook.seconds)}, an estimate {measured}"
    yield ""


def duration(seconds: float) -> str:
    """Seconds as people say them: `4 s`, `3 min`, `1.5 h`."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def result_table(plan: Plan, result: Result, place: Place = str) -> RenderableType:
    """Make the tables of a finished conversion: the files that it wrote, its speed and its seconds by stage."""
    parts: list[RenderableType] = [Text(f"Done in {result.seconds:.1f} s", style="bold")]
    for target in plan.targets:
        table = Table()
        for column in ("file", "tensors", "size"):
            table.add_column(column, justify="left" if column == "file" else "right")
        tensors = {file.path: str(len(file.tensors)) for file in target.output.files}
        for path in target.output.paths:
            table.add_row(path.name, tensors.get(path, ""), human_bytes(path.stat().st_size) if path.exists() else "")
        parts += [place(str(target.output.directory)), table]
    parts.append(f"read {_moved(result.bytes_read, 'of the source', result.scratch_bytes_read, 'of scratch')}")
    parts.append(f"wrote {_moved(result.bytes_written, 'into rank files', result.scratch_bytes_written, 'to scratch')}")
    speed = human_rate((result.bytes_written + result.scratch_bytes_written) / result.seconds)
    parts.append(f"{speed} written, peak memory {human_bytes(result.peak_memory_bytes)}")
    stages = ", ".join(f"{stage} {values.get('seconds', 0):.1f} s" for stage, values in sorted(result.stages.items()))
    parts.append(f"phases: {', '.join(f'{name} {seconds:.1f} s' for name, seconds in result.phases.items())}")
    parts.append(f"stages, summed over workers: {stages}")
    return Group(*parts)


def _moved(nbytes: int, where: str, scratch: int, there: str) -> str:
    return f"{human_bytes(nbytes)} {where}" + (f", {human_bytes(scratch)} {there}" if scratch else "")


def _target_table(target: Mapping[str, Any], place: Place) -> RenderableType:
    mapping = target["mapping"]
    sizes = ", ".join(f"{key} {mapping[key]}" for key in ("tp_size", "pp_size", "moe_tp_size", "moe_ep_size"))
    table = Table()
    for column in ("file", "tensors", "size"):
        table.add_column(column, justify="left" if column == "file" else "right")
    for rank in target["ranks"]:
        table.add_row(rank["file"], str(rank["tensors"]), human_bytes(rank["bytes"]))
    free = target["free_bytes_there"]
    there = "room there unknown" if free is None else f"{human_bytes(free)} free there"
    state = "already written: nothing to do" if target["up_to_date"] else there
    heading = Text(escaped(place(target["path"])), style="bold").append(f": {target['dtype']}, {sizes}", style="not bold")
    return Group(heading, table, f"{human_bytes(target['bytes'])} needed, {state}")


def _by_reason(left_out: Mapping[str, str]) -> dict[str, list[str]]:
    """The names of tensors that are left out, by the reason for it."""
    reasons = Counter(left_out.values())
    return {reason: sorted(name for name, why in left_out.items() if why == reason) for reason in reasons}
