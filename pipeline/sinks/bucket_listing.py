"""List and remove what is left below a URL: cuts of scratch, and uploads that nobody has completed."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path

from pipeline.documents import parse_json
from pipeline.errors import BadInput, Problem
from pipeline.sinks import bucket_hold
from pipeline.sinks.hold import busy
from pipeline.sinks.remote import held_there
from pipeline.sinks.scratch_listing import ScratchCut, cut_of
from pipeline.sinks.zarr_files import METADATA
from pipeline.tensor import bucket
from pipeline.tensor.remote_path import as_path
from pipeline.tensor.system_errors import refusing

UPLOAD = "upload"  # the stage that an upload is listed as


@refusing("the bucket", "one that can be listed")
def list_bucket(root: Path) -> list[ScratchCut]:
    """List the cuts and unfinished uploads below a URL, sorted by place; an upload's size is that of its parts so far."""
    bucket.check_url("scratch", str(root))
    sizes: dict[str, int] = {}
    for name, nbytes in bucket.objects_below(str(root), deep=True).items():
        top = name.partition("/")[0]
        if top.endswith(".zarr"):
            sizes[top] = sizes.get(top, 0) + nbytes
    cuts = []
    for name, nbytes in sorted(sizes.items()):
        found = bucket.read_object_at(f"{root}/{name}/{METADATA}")
        try:
            said = parse_json(found[0]) if found else {}
        except ValueError:
            said = {}
        attributes = said.get("attributes") if isinstance(said, dict) else None
        if isinstance(attributes, dict) and attributes.get("headrace") == "scratch":
            cuts.append(cut_of(root / name, attributes, nbytes))
    for upload in bucket.uploads_below(str(root)):
        parts = bucket.uploaded_parts(upload.url, upload.id) or {}
        nbytes = sum(size for size, _ in parts.values())
        cuts.append(ScratchCut(as_path(upload.url), UPLOAD, f"{len(parts)} parts", False, nbytes, upload.id))
    return cuts


@refusing("the bucket", "one that can be listed and written")
def remove_in_bucket(root: Path, names: list[str]) -> list[ScratchCut]:
    """Remove cuts, and abort uploads, of these names below a URL, or all where `names` is empty; return those removed.

    Raises BadInput, before any is removed, where a name is unknown or a job is at work on the output that an upload is of.
    """
    there = [(str(cut.directory).removeprefix(f"{root}/"), cut) for cut in list_bucket(root)]
    cuts = [cut for name, cut in there if not names or name in names]
    if unknown := sorted(set(names) - {name for name, _ in there}):
        raise BadInput([Problem(str(root / name), "no such cut", "one that `headrace scratch ls` lists") for name in unknown])
    for directory in {cut.directory.parent for cut in cuts if cut.upload}:
        bucket_hold.forget(directory)
        if at_work := bucket_hold.holder(directory):
            raise busy(directory / bucket_hold.NOTE, at_work)
    with ExitStack() as stack:
        held = {
            cut: stack.enter_context(closing(taken[1]))
            for cut in cuts
            if not cut.upload and (taken := held_there(str(cut.directory)))
        }
        for cut in cuts:
            if cut.upload:
                bucket.abort_upload(str(cut.directory), cut.upload)
                continue
            for name in bucket.objects_below(str(cut.directory), deep=True):
                bucket.remove_object(f"{cut.directory}/{name}")
            if cut in held:
                held[cut].remove()
    return cuts
