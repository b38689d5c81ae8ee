"""Check a checkpoint before an engine is built from it, and identify it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.documents import read_document, read_json, read_object
from pipeline.engine.requests import arranged_of, digest, identity_of
from pipeline.errors import BadInput, Problem
from pipeline.planning.engine_options import EngineRequest
from stages.build.arranged_weights import ArrangedWeights
from stages.read.ranks import open_checkpoint
from stages.verify.contract.integrity import headers

CONFIG = "config.json"
PROVENANCE = "headrace.json"


def check_checkpoint(directory: Path) -> list[Problem]:
    """List the problems that keep a checkpoint from being built: the first level of `headrace verify`, without checksums.

    Opens headers only.
    """
    if not directory.is_dir():
        found = "a file" if directory.exists() else "no such directory"
        return [Problem(str(directory), found, "a TensorRT-LLM checkpoint: config.json and rank{N}.safetensors")]
    try:
        return list(headers(open_checkpoint(directory)))
    except BadInput as error:
        return list(error.problems)


def world_size(directory: Path) -> int:
    """The number of engine files of a checkpoint that has been checked, context-parallel ranks included."""
    return int(read_json(directory / CONFIG)["mapping"]["world_size"])


def identity(directory: Path) -> dict[str, Any]:
    """Identify a checkpoint by a digest of its config.json, and by headrace's id or else the sizes and times of its rank files."""
    config = read_document(directory / CONFIG)[0].decode()
    checkpoint_id = _provenance(directory).get("id")
    if isinstance(checkpoint_id, str):
        return identity_of(checkpoint_id, config)
    states = {path.name: path.stat() for path in sorted(directory.glob("rank*.safetensors"))}
    return {"files": {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}, "config": digest(config)}


def arranged_weights(request: EngineRequest) -> ArrangedWeights | None:
    """The order that a checkpoint's integer weights are in; None where any GPU reads them, or headrace.json does not say it."""
    if request.identity:  # still to be written: what is there now is another's
        return request.arranged
    return arranged_of(request.checkpoint, read_object(request.checkpoint / CONFIG), _provenance(request.checkpoint))


def checksums(directory: Path) -> str:
    """The SHA-256 of headrace.json's table of checksums, "" where there is none."""
    table = _provenance(directory).get("xxh3")
    return digest(json.dumps(table, sort_keys=True)) if table else ""


def _provenance(directory: Path) -> Mapping[str, Any]:
    return read_object(directory / PROVENANCE)
