"""List and remove the cuts in a scratch directory: `headrace scratch ls` and `rm`."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import BadInput, Problem
from pipeline.sinks.journal import Journal
from pipeline.sinks.remote import drop_there
from pipeline.sinks.scratch import DEFAULT_ROOT, JOURNAL, take_away
from pipeline.sinks.zarr_files import read_attributes
from pipeline.tensor.system_errors import refusing


@dataclass(frozen=True)
class ScratchCut:
    """A cut found on disk or in a bucket, as `headrace scratch ls` lists it; or an unfinished upload, by its id."""

    directory: Path
    stage: str
    source: str
    complete: bool
    size_bytes: int
    upload: str = ""


@refusing("the scratch directory", "files that can be read")
def list_scratch(root: Path) -> list[ScratchCut]:
    """List the cuts in a scratch directory, sorted by path. Raises BadInput where there is no such directory."""
    if not root.is_dir():
        raise BadInput([Problem(str(root), "a file" if root.exists() else "no such directory", "a scratch directory")])
    cuts = []
    for directory in sorted(root.glob("*.zarr")):
        attributes = read_attributes(directory, surely=True)
        if attributes.get("headrace") == "scratch":
            nbytes = sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())
            cuts.append(cut_of(directory, attributes, nbytes))
    return cuts


def find_scratch(folder: Path, outputs: Iterable[Path] = ()) -> list[Path]:
    """The scratch directories of the default name: in `folder`, the folders in it and the one above, and beside `outputs`."""
    places = [folder, folder.parent, *_folders(folder), *(output.parent for output in outputs)]
    found = dict.fromkeys(place / DEFAULT_ROOT for place in places)
    return [root for root in found if root.is_dir()]


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:
        return []


def cut_of(directory: Path, attributes: Mapping[str, Any], size_bytes: int) -> ScratchCut:
    """A cut as the attributes of its group describe it."""
    stage, source = (str(attributes.get(key, "unknown")) for key in ("stage", "source"))
    return ScratchCut(directory, stage, source, attributes.get("complete") is True, size_bytes)


@refusing("the scratch directory", "files that can be read")
def remove_scratch(root: Path, names: list[str]) -> list[ScratchCut]:
    """Remove the cuts with these directory names; return those removed.

    Raises BadInput, before any is removed, where a name is unknown or a job is at work on a cut.
    """
    cuts = [cut for cut in list_scratch(root) if cut.directory.name in names]
    unknown = sorted(set(names) - {cut.directory.name for cut in cuts})
    if unknown:
        raise BadInput([Problem(str(root / name), "no such cut", "one that `headrace scratch ls` lists") for name in unknown])
    journals = [Journal(cut.directory / JOURNAL) for cut in cuts]
    for cut, journal in zip(cuts, journals, strict=True):
        shutil.rmtree(cut.directory)
        journal.close()
    return cuts


def drop(place: str) -> None:
    """Remove a cut, or a calibration's scratch, that an unfinished conversion left: one that is not kept and that no job holds."""
    if "://" in place:
        drop_there(place)
        return
    directory = Path(place)
    attributes = read_attributes(directory)
    if attributes.get("headrace") != "scratch" or attributes.get("keep"):
        return
    take_away(directory)
