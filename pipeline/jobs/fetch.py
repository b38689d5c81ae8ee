"""`python -m pipeline.jobs.fetch`: copies a checkpoint from object storage to a local directory, a file at a time.

The request has `url` and `directory`. A file that is there in its full size is not fetched again, one that is under way is named
`*.partial`: so a copy that was cut short goes on with the file that it was at.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec

from pipeline.errors import BadInput, Problem
from pipeline.jobs.aside import answer


def fetch(request: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the files of a prefix, without what lies deeper; returns how many bytes came. Raises BadInput."""
    directory = Path(request["directory"])
    came = 0
    try:
        files, path = fsspec.core.url_to_fs(request["url"])
        directory.mkdir(parents=True, exist_ok=True)
        for entry in files.ls(path, detail=True):
            # Some stores have an object of no bytes for the prefix itself.
            if entry["type"] == "directory" or entry["name"].rstrip("/") == path.rstrip("/"):
                continue
            local = directory / entry["name"].rpartition("/")[2]
            if local.exists() and local.stat().st_size == entry["size"]:
                continue
            partial = local.with_name(local.name + ".partial")
            files.get_file(entry["name"], str(partial))
            partial.replace(local)
            came += int(entry["size"])
    except (OSError, ValueError, ImportError) as error:
        raise BadInput([Problem(request["url"], str(error), f"a checkpoint that can be copied to {directory}")]) from None
    return {"bytes": came}


if __name__ == "__main__":
    answer(fetch)
