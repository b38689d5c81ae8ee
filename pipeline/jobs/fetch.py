"""Copies a checkpoint from object storage to a local directory, a file at a time."""

from __future__ import annotations

import threading
from pathlib import Path

import fsspec

from pipeline.errors import BadInput, Interrupted, Problem


def fetch(url: str, directory: str, stop: threading.Event) -> None:
    """Copy the files of a prefix, without what lies deeper.

    A file that is there in its full size is not fetched again, one that is under way is named `*.partial`: so a copy that was cut
    short goes on with the file that it was at. Raises BadInput, and Interrupted between two files once `stop` is set.
    """
    place = Path(directory)
    try:
        files, path = fsspec.core.url_to_fs(url)
        place.mkdir(parents=True, exist_ok=True)
        for entry in files.ls(path, detail=True):
            # Some stores have an object of no bytes for the prefix itself.
            if entry["type"] == "directory" or entry["name"].rstrip("/") == path.rstrip("/"):
                continue
            if stop.is_set():
                raise Interrupted(f"{url}: interrupted")
            local = place / entry["name"].rpartition("/")[2]
            if local.exists() and local.stat().st_size == entry["size"]:
                continue
            partial = local.with_name(local.name + ".partial")
            files.get_file(entry["name"], str(partial))
            partial.replace(local)
    except (OSError, ValueError, ImportError) as error:
        raise BadInput([Problem(url, str(error), f"a checkpoint that can be copied to {directory}")]) from None
