"""`python -m pipeline.jobs.planner`: plans what a trigger asks for, for a daemon that imports none of what planning needs.

The request has `folder`, which relative paths are relative to, `max_memory`, and `names` of files, or a `matrix` and `where` it
stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.jobs.aside import answer
from pipeline.jobs.requests import gather, of_matrix
from pipeline.jobs.units import make_units


def plan(request: Mapping[str, Any]) -> dict[str, Any]:
    """The units of a request. Raises BadInput."""
    folder = Path(request["folder"])
    if "matrix" in request:
        requests = of_matrix(request["matrix"], folder, request["where"], patterns=False)
    else:
        requests = list(gather(request["names"], folder).requests)
    return {"units": [asdict(unit) for unit in make_units(requests, request["max_memory"])]}


if __name__ == "__main__":
    answer(plan)
