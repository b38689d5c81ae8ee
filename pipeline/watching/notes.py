"""The start of a run in words, its page, and how far it is by a tensor's name."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pipeline.planning.listen import PAGE, parse_listen

if TYPE_CHECKING:
    from pipeline.planning.job import Job
    from pipeline.planning.plans import Plan

_LAYER = re.compile(r"(?:transformer\.)?(layers\.\d+|[\w.]+?)(?:\.|$)")


def layer(name: str) -> str:
    """Return the part of a tensor's name that shows how far a run is: `layers.3`, `vocab_embedding`, `lm_head`."""
    match = _LAYER.match(name)
    return match[1] if match else name


def notes(plan: Plan, dashboard: str, done_tasks: int) -> list[str]:
    """List what to print at the start of a run: its pages, resumed work, reused scratch, the plan's notes, tensors left out."""
    page = page_address(plan.job, dashboard)
    result = [f"page {page}"] if page else []
    result += [f"dashboard {dashboard}"] if dashboard not in ("", page) else []
    if done_tasks:
        result.append(f"resuming: {done_tasks} of {plan.tasks} tasks were done before")
    result += [f"scratch of {cut.stage} reused" for cut in plan.scratch if cut.complete]
    result += plan.notes
    if plan.left_out:
        result.append(f"leaving out {len(plan.left_out)} tensors ({', '.join(sorted(set(plan.left_out.values())))})")
    return result


def page_address(job: Job, dashboard: str) -> str:
    """Return the URL of headrace's own page: beside a local cluster's dashboard, or on its own; "" where there is none."""
    if job.scheduler == "local":
        return dashboard.removesuffix("/status") + PAGE
    if job.scheduler in ("threads", "synchronous"):
        return dashboard
    return parse_listen(job.listen).url + PAGE if job.listen else ""
