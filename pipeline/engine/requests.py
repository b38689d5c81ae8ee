"""The requests for the engines of a plan, with the identity of the checkpoint that each will be built from."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline.planning.engine_options import EngineRequest, job_requests

if TYPE_CHECKING:
    from pipeline.planning.plans import Plan


def plan_requests(plan: Plan) -> tuple[EngineRequest, ...]:
    """The requests for the engines that a plan's job asks for, with the identities of the planned checkpoints."""
    requests = job_requests(plan.job.targets, plan.job.engine)
    if not requests:
        return ()
    outputs = {target.output.directory: target.output for target in plan.targets}
    return tuple(
        replace(request, identity=identity_of(outputs[request.checkpoint].id, outputs[request.checkpoint].config))
        for request in requests
    )


def identity_of(checkpoint_id: str, config: str) -> dict[str, Any]:
    """Identify a checkpoint that headrace writes by its id and a digest of its config.json."""
    return {"id": checkpoint_id, "config": digest(config)}


def digest(text: str) -> str:
    """The SHA-256 of a text, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()
