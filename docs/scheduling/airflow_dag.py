"""An Airflow DAG of a batch, every night: headrace plans it, and each conversion is a task. For Airflow 3, in its dags folder."""

import json
import subprocess
from datetime import UTC, datetime, timedelta

from airflow.sdk import dag, task
from airflow.sdk.exceptions import AirflowFailException

BATCH, FOLDER = "/etc/headrace/night.toml", "/var/lib/headrace/jobs"


@task
def plan() -> list[list[str]]:
    """A job file for each conversion that is to be done; those of a list follow one another, as they share scratch."""
    ran = subprocess.run(["headrace", "batch", BATCH, "--write_jobs", FOLDER, "--json"], stdout=subprocess.PIPE, check=False)
    units = [unit for unit in json.loads(ran.stdout or "{}").get("units", ()) if unit["state"] == "to do"]
    if ran.returncode and not units:  # of some that are refused the others are done all the same
        raise AirflowFailException(f"headrace batch ended with {ran.returncode}")
    rows: dict[str, list[str]] = {}
    for unit in units:
        rows[unit["name"]] = rows.get(unit["after"], [])
        rows[unit["name"]].append(unit["file"])
    return list({id(row): row for row in rows.values()}.values())


@task(retries=3, retry_delay=timedelta(minutes=1), retry_exponential_backoff=True, max_active_tis_per_dag=2)
def convert(files: list[str]) -> None:
    """Conversions one after the other."""
    for file in files:
        code = subprocess.run(["headrace", "convert", file, "--quiet"], check=False).returncode
        if code == 3:  # interrupted, or failed half-way: the next attempt goes on from there
            raise RuntimeError(f"headrace convert ended with {code}")
        if code:
            raise AirflowFailException(f"headrace convert ended with {code}")


@dag(schedule="30 2 * * *", start_date=datetime(2026, 1, 1, tzinfo=UTC), catchup=False, max_active_runs=1)
def headrace_batch():
    """All of them."""
    convert.expand(files=plan())


headrace_batch()
