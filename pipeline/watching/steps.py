"""Where a run is, in a word: what a bar and a line of progress say of a snapshot."""

from __future__ import annotations

from pipeline.printed import many
from pipeline.watching.nodes import BUILD, FINISH, SCRATCH, WRITE
from pipeline.watching.state import Snapshot

STEPS = ("starting", "calibrating", "scratch", "scratch+write", "writing", "checking", "building", "done")
LONGEST = max(map(len, STEPS))


def step(now: Snapshot) -> str:
    """The first of STEPS that is not over: it never goes back.

    While `checking` all bytes are written, and the source is looked at again, checksums are put together and files are named.
    """
    left = {node.name: node.tasks - node.done_tasks for node in now.nodes}
    if not left:
        return "starting"
    if now.calibrated_layers < now.layers:
        return "calibrating"
    if left.get(SCRATCH, 0) > 0:
        begun = any(node.name == WRITE and node.done_tasks for node in now.nodes)
        return "scratch+write" if begun else "scratch"
    names = {WRITE: "writing", FINISH: "checking", BUILD: "building"}
    return next((names[name] for name in names if left.get(name, 0) > 0), "done")


def whole_files(now: Snapshot) -> int:
    """The number of rank files whose bytes are all written."""
    return sum(share.done_bytes >= share.total_bytes for share in now.ranks)


def files_words(now: Snapshot) -> str:
    """`3 of 8 rank files`, before it the layers that are calibrated and behind it the engines, where there are some."""
    counts = [(now.calibrated_layers, now.layers, "layer")] if now.calibrated_layers < now.layers else []
    counts.append((whole_files(now), len(now.ranks), "rank file"))
    counts.append((sum(engine.done_tasks == engine.tasks for engine in now.engines), len(now.engines), "engine"))
    return ", ".join(f"{done} of {many(total, noun)}" for done, total, noun in counts if total)
