"""The engines of a plan: each request knows what checkpoint it will be built from."""

from __future__ import annotations

from dataclasses import replace

from pipeline.engine.check import identity_of
from pipeline.planning.engine_options import Request, job_requests
from pipeline.planning.plans import Plan


def plan_requests(plan: Plan) -> tuple[Request, ...]:
    """The engines that a plan's job asks for, which know what checkpoint they will be built from."""
    requests = job_requests(plan.job)
    if not requests:
        return ()
    outputs = {target.output.directory: target.output for target in plan.targets}
    return tuple(
        replace(request, identity=identity_of(outputs[request.checkpoint].id, outputs[request.checkpoint].config))
        for request in requests
    )
