"""A cluster of any Dask class, by the `[cluster]` table of a job, a batch or a schedule: started for it, and closed after it.

[cluster]
class = "dask_jobqueue.SLURMCluster"    # any subclass of distributed's SpecCluster or Cluster
workers = 8                             # scaled to; left out: as the class starts
cores = 8                               # every other key is an argument of the class
memory = "16GB"
[cluster.tls]                           # of a scheduler at tls://, where Dask's own configuration names none
ca_file = "ca.pem"
cert = "client.pem"
key = "client-key.pem"
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FunctionType
from typing import Any

from pipeline.errors import BadInput, Problem
from pipeline.run.cluster import attached, load_distributed

WORKER_SECONDS = 600.0  # for the first worker to come: a queue may take its time
OTHERS_SECONDS = 60.0  # for the rest of them, after the first: those that come later are asked as they come


@contextmanager
def named_cluster(table: Mapping[str, Any]) -> Iterator[Any]:
    """A client of the cluster that a table names, when its workers have come, or some of them and no others for a while.

    Raises BadInput where it cannot be made, or no worker comes.
    """
    load_distributed()
    from distributed import Client

    options = {key: value for key, value in table.items() if key not in ("class", "workers", "tls")}
    made = _class(str(table["class"]))
    if table.get("tls"):
        options["security"] = security(table["tls"])
    try:
        cluster = made(**options)
    except Exception as error:  # whatever the class refuses
        raise BadInput(
            [Problem(f"cluster.class {table['class']}", f"{type(error).__name__}: {error}", "its own options")]
        ) from None
    with cluster, attached(Client(cluster, set_as_default=False)) as client:
        if table.get("workers"):
            cluster.scale(int(table["workers"]))
        try:
            client.wait_for_workers(1, timeout=WORKER_SECONDS)
        except TimeoutError:
            found = f"no worker within {WORKER_SECONDS:.0f} s"
            raise BadInput([Problem(f"cluster.class {table['class']}", found, "one that starts workers")]) from None
        with suppress(TimeoutError):
            client.wait_for_workers(int(table.get("workers") or 1), timeout=OTHERS_SECONDS)
        yield client


def security(files: Mapping[str, Any]) -> Any:
    """Dask's Security of a `[cluster.tls]` table."""
    load_distributed()
    from distributed.security import Security

    names = {"ca_file": "tls_ca_file", "cert": "tls_client_cert", "key": "tls_client_key"}
    given = {names[key]: str(value) for key, value in files.items() if key in names}
    return Security(require_encryption=True, **given)


def _class(path: str) -> Any:
    """The class at a dotted path, or the function that makes clusters, as SSHCluster is one.

    Raises BadInput where there is none, or it is no cluster of Dask's.
    """
    from distributed.deploy.cluster import Cluster

    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        package = module.partition(".")[0].replace("_", "-") or path
        remedy = f"Run pip install {package}, if that is its package"
        raise BadInput([Problem("cluster.class", f"{path} ({error})", "a class that can be imported", remedy)]) from None
    made_by = isinstance(found, FunctionType) and name.endswith("Cluster")
    if not (made_by or (isinstance(found, type) and issubclass(found, Cluster))):
        raise BadInput([Problem("cluster.class", f"{path}, which is no cluster of Dask's", "such as distributed.SSHCluster")])
    return found
