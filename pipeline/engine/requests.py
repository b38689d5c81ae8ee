"""The requests for the engines of a plan, with the identity of the checkpoint that each will be built from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.model.kernels import generations
from pipeline.model.quantization import GROUPWISE, WEIGHT_ONLY
from pipeline.planning.engine_options import EngineRequest, job_requests
from stages.build.arranged_weights import ArrangedWeights

if TYPE_CHECKING:
    from pipeline.planning.plans import Plan


def plan_requests(plan: Plan) -> tuple[EngineRequest, ...]:
    """The requests for the engines that a plan's job asks for, with what is known of the planned checkpoints."""
    outputs = {target.output.directory: target.output for target in plan.targets}
    requests = []
    for request in job_requests(plan.job.targets, plan.job.engine, plan.job.scratch_root):
        output = outputs[request.checkpoint]
        arranged = arranged_of(output.directory, json.loads(output.config), output.provenance)
        requests.append(replace(request, identity=identity_of(output.id, output.config), arranged=arranged))
    return tuple(requests)


def identity_of(checkpoint_id: str, config: str) -> dict[str, Any]:
    """Identify a checkpoint that headrace writes by its id and a digest of its config.json."""
    return {"id": checkpoint_id, "config": digest(config)}


def arranged_of(checkpoint: Path, config: Mapping[str, Any], provenance: Mapping[str, Any]) -> ArrangedWeights | None:
    """The order of a checkpoint's integer weights by its config.json and headrace.json; None for no order, or none that is said."""
    quantization, options = config.get("quantization"), provenance.get("options")
    if not isinstance(quantization, Mapping) or not isinstance(options, Mapping):
        return None
    algorithm, sm = quantization.get("quant_algo"), options.get("sm")
    if algorithm not in (*WEIGHT_ONLY, *GROUPWISE) or sm not in generations():
        return None
    return ArrangedWeights(checkpoint, algorithm, sm)


def digest(text: str) -> str:
    """The SHA-256 of a text, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()
