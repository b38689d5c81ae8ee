"""A Dagster job of a batch, every night: headrace plans it, and each conversion is a step. `dagster dev -f dagster_job.py`."""

import json
import subprocess

from dagster import Definitions, DynamicOut, DynamicOutput, Failure, RetryRequested, ScheduleDefinition, job, op

BATCH, FOLDER = "/etc/headrace/night.toml", "/var/lib/headrace/jobs"


@op(out=DynamicOut(list))
def plan():
    """A job file for each conversion that is to be done; those of a list follow one another, as they share scratch."""
    ran = subprocess.run(["headrace", "batch", BATCH, "--write_jobs", FOLDER, "--json"], stdout=subprocess.PIPE, check=False)
    units = [unit for unit in json.loads(ran.stdout or "{}").get("units", ()) if unit["state"] == "to do"]
    if ran.returncode and not units:  # of some that are refused the others are done all the same
        raise Failure(f"headrace batch ended with {ran.returncode}", allow_retries=False)
    rows: dict[str, list[str]] = {}
    for unit in units:
        rows[unit["name"]] = rows.get(unit["after"], [])
        rows[unit["name"]].append(unit["file"])
    for number, row in enumerate({id(row): row for row in rows.values()}.values()):
        yield DynamicOutput(row, mapping_key=f"row_{number}")


@op
def convert(files: list) -> None:
    """Conversions one after the other."""
    for file in files:
        code = subprocess.run(["headrace", "convert", file, "--quiet"], check=False).returncode
        if code == 3:  # interrupted, or failed half-way: the next attempt goes on from there
            raise RetryRequested(max_retries=3, seconds_to_wait=60)
        if code:
            raise Failure(f"headrace convert ended with {code}", allow_retries=False)


@job
def headrace_batch():
    """All of them."""
    plan().map(convert)


definitions = Definitions(schedules=[ScheduleDefinition(job=headrace_batch, cron_schedule="30 2 * * *")])
