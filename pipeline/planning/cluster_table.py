"""The `[cluster]` table of a job, a batch or a schedule: a cluster to start, or the TLS files of one that is there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import Problem

TLS_FILES = ("ca_file", "cert", "key")


def cluster_problems(table: Mapping[str, Any] | None, scheduler: str | None) -> list[Problem]:
    """Check a `[cluster]` table beside a scheduler, None where none is named."""
    if table is None:
        return []
    named, tls = table.get("class"), table.get("tls")
    problems = []
    if named is not None and not isinstance(named, str):
        problems.append(Problem("cluster.class", repr(named), "the name of a class, such as distributed.SSHCluster"))
    if named and scheduler is not None:
        problems.append(Problem("cluster.class", f"--scheduler {scheduler} beside it", "one or the other"))
    if not named and (tls is None or not (scheduler or "").startswith("tls://")):
        problems.append(Problem("cluster", "no class", "class = a name, or tls for a --scheduler tls://"))
    if tls is not None and not (isinstance(tls, dict) and set(tls) <= set(TLS_FILES)):
        problems.append(Problem("cluster.tls", repr(tls), f"a table of {', '.join(TLS_FILES)}"))
    if not isinstance(workers := table.get("workers", 1), int) or workers < 1:
        problems.append(Problem("cluster.workers", repr(workers), "a number of workers"))
    return problems
