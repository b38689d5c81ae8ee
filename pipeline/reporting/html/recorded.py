"""Tell whether the source that headrace.json names is still as it was when it was converted."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import BadInput
from pipeline.reporting.html.provenance import read_provenance, recorded_source
from pipeline.tensor.checkpoint import Checkpoint
from stages.read import find_source


def unchanged_source(checkpoint: Checkpoint) -> tuple[str | None, str]:
    """Return the source that headrace.json names, where it is there as it was, and else what is not as it was ("" for no source).

    A model that was trained on and saved in its place has files of the same sizes and headers: only their times tell. A time alone
    may be that of a copy; but values that differ from a changed source's would be called the ranks' mistake.
    """
    path = recorded_source(checkpoint)
    provenance, _ = read_provenance(checkpoint)
    if path is None or provenance is None:
        return None, ""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    try:
        now = {file.path.name: file for file in find_source(Path(path), None, None, None, download=False).files}
        for file in provenance.source.files:
            found = now.get(file.path)
            if found and file.header_sha256 and found.header_sha256 != file.header_sha256:
                return None, f"{file.path} has another header"
            if found and file.header_sha256 and found.seen and found.seen.head_bytes == found.size_bytes:
                continue  # the digest is of all of it, such as config.json
            if file.mtime_ns is not None and (folder / file.path).stat().st_mtime_ns != file.mtime_ns:
                return None, f"{file.path} was written to"
    except (BadInput, OSError):
        return None, "it cannot be read"
    return path, ""
