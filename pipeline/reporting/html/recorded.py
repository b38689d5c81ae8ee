"""Tell whether the source that headrace.json names is still as it was when it was converted."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import BadInput
from pipeline.reporting.html.provenance import RecordedFile, read_provenance, recorded_source
from pipeline.tensor.checkpoint import Checkpoint
from pipeline.tensor.source_file import SourceFile
from stages.read import find_source


def unchanged_source(checkpoint: Checkpoint) -> tuple[tuple[Path, Path | None] | None, str]:
    """Return `recorded_source`, where that is as it was, and else what is not as it was; ("" where no source is there).

    A model that was trained on and saved in its place has files of the same sizes and headers: only their times tell. A time may
    also be that of a copy; but values that differ from a changed source's would be called the ranks' mistake.
    """
    recorded, (provenance, _) = recorded_source(checkpoint), read_provenance(checkpoint)
    if recorded is None or provenance is None:
        return None, ""
    source, beside = recorded
    places = {"": source, **({"quant_ckpt_path": beside} if beside else {})}
    folders = {of: path if path.is_dir() else path.parent for of, path in places.items()}
    try:
        now = {file.path: file for file in find_source(source, None, beside, None, download=False).files}
        for file in provenance.source.files:
            if file.of not in folders:
                continue
            path = folders[file.of] / file.path
            if change := _change(file, path, now.get(path)):
                return None, f"{file.path} {change}"
    except (BadInput, OSError):
        return None, "it cannot be read"
    return recorded, ""


def _change(then: RecordedFile, path: Path, now: SourceFile | None) -> str:
    """Say what became of a file, "" where nothing did. `now`: as a reader sees it, None where it reads other files."""
    if now and then.header_sha256:
        if now.header_sha256 != then.header_sha256:
            return "has another header"
        if now.seen and now.seen.head_bytes == now.size_bytes:
            return ""  # the digest is of all of it, such as config.json
    written = then.mtime_ns is not None and path.stat().st_mtime_ns != then.mtime_ns
    return "was written to" if written else ""
