"""A Prefect flow of a batch: headrace plans it, and each conversion is a task. `python prefect_flow.py night.toml jobs`."""

import json
import subprocess
import sys

from prefect import flow, task


def may_pass(_task, _run, state) -> bool:
    """3 is interrupted, or failed half-way: the next attempt goes on from there."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, subprocess.CalledProcessError) and error.returncode == 3


@task
def plan(batch: str, folder: str) -> list[list[str]]:
    """A job file for each conversion that is to be done; those of a list follow one another, as they share scratch."""
    ran = subprocess.run(["headrace", "batch", batch, "--write_jobs", folder, "--json"], stdout=subprocess.PIPE, check=False)
    units = [unit for unit in json.loads(ran.stdout or "{}").get("units", ()) if unit["state"] == "to do"]
    if ran.returncode and not units:  # of some that are refused the others are done all the same
        ran.check_returncode()
    rows: dict[str, list[str]] = {}
    for unit in units:
        rows[unit["name"]] = rows.get(unit["after"], [])
        rows[unit["name"]].append(unit["file"])
    return list({id(row): row for row in rows.values()}.values())


@task(retries=3, retry_delay_seconds=[10, 60, 600], retry_condition_fn=may_pass)
def convert(files: list[str]) -> None:
    """Conversions one after the other."""
    for file in files:
        subprocess.run(["headrace", "convert", file, "--quiet"], check=True)


@flow
def headrace_batch(batch: str, folder: str) -> None:
    """All of them; the flow fails where one does."""
    for future in [convert.submit(row) for row in plan(batch, folder)]:
        future.result()


if __name__ == "__main__":
    headrace_batch(*sys.argv[1:])
