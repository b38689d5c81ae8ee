"""The watch trigger: a checkpoint that has arrived below a directory, or a prefix of an object store, is found once it is whole.

Whole is one whose config.json is JSON, whose shards are all there, of at least the size that their index says, and of which no file
has come, gone, grown or been touched for `settle_seconds`.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from pipeline.documents import MAX_BYTES, parse_json, read_json
from pipeline.errors import BadInput, Problem
from pipeline.jobs.files import printable
from pipeline.jobs.schedule import Watch
from pipeline.urls import NO_SECRET, holds_secret, shown

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_STAMPS = ("mtime", "LastModified", "last_modified", "updated", "ETag", "etag", "created")

Listing = Mapping[str, tuple[int, str]]  # of a directory's files: size and time, by name


@dataclass(frozen=True)
class Arrival:
    """A checkpoint that is whole: its place, a path or a URL, and a hash of the names, sizes and times of its files."""

    place: str
    name: str
    fingerprint: str


class Watcher:
    """Looks at one place again and again. `known` gives the fingerprint of what was found at a place before."""

    def __init__(
        self,
        watch: Watch,
        known: Callable[[str], str | None],
        say: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`say` is told, once, of each directory and file that cannot be read. Raises BadInput where nothing reads such a place."""
        self.watch, self.known, self.say, self.clock = watch, known, say, clock
        self._unread: set[str] = set()
        self.url = "://" in watch.path
        if holds_secret(watch.path):
            raise BadInput([Problem(f"watch {watch.name}: path {shown(watch.path)}", "a URL with a secret in it", NO_SECRET)])
        try:
            self._files, self._root = fsspec.core.url_to_fs(watch.path)
        except (ValueError, ImportError) as error:
            raise BadInput([Problem(f"watch {watch.name}: path", watch.path, f"a place that can be read ({error})")]) from None
        self._seen: dict[str, tuple[Listing, float]] = {}

    def look(self) -> list[Arrival]:
        """The checkpoints that have arrived and are not known yet. Raises OSError where the place cannot be read now."""
        self._files.invalidate_cache()
        now, before = self.clock(), self._seen
        self._seen = {}
        found = []
        for place in self._directories():
            listing = self._listing(place)
            if "config.json" not in listing:
                continue
            same = place in before and before[place][0] == listing
            since = before[place][1] if same else now
            self._seen[place] = (listing, since)
            if now - since >= self.watch.settle_seconds:
                found += self._arrival(place, listing)
        return found

    def _arrival(self, place: str, listing: Listing) -> list[Arrival]:
        parts = self._parts(place, listing)
        if parts is None:
            return []
        state = json.dumps([(name, *listing[name]) for name in sorted(parts)])
        fingerprint = hashlib.sha256(state.encode()).hexdigest()[:16]
        shown = self._files.unstrip_protocol(place) if self.url else place
        return [] if self.known(shown) == fingerprint else [Arrival(shown, _name(place), fingerprint)]

    def _directories(self) -> list[str]:
        """The directories that the pattern names."""
        places = [self._root.rstrip("/") or "/"]
        for part in self.watch.pattern.strip("/").split("/"):
            inner = (each for place in places for each in self._inside(place))
            hidden = part.startswith(".")
            places = [each for each in inner if fnmatch.fnmatchcase(_name(each), part) and (hidden or _name(each)[:1] != ".")]
        return sorted(places)

    def _inside(self, place: str) -> Iterator[str]:
        """The directories in a directory; none where it is not there, or not yet."""
        for entry in self._entries(place):
            # A link is of another type, or of what it leads to.
            if entry["type"] == "directory" or (entry["type"] != "file" and self._files.isdir(entry["name"])):
                yield entry["name"].rstrip("/")

    def _listing(self, place: str) -> Listing:
        files = [entry for entry in self._entries(place) if entry["type"] != "directory" and entry["name"].rstrip("/") != place]
        return {_name(entry["name"]): (int(entry["size"] or 0), _stamp(entry)) for entry in files}

    def _entries(self, place: str) -> list[Any]:
        """The entries of a directory; none where it is not there, or below the place that is watched and not to be read."""
        try:
            return list(self._files.ls(place, detail=True))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            if place.rstrip("/") == self._root.rstrip("/"):
                raise
            self._passed_over(place, error)
            return []

    def _passed_over(self, place: str, error: OSError) -> None:
        if place not in self._unread:
            self._unread.add(place)
            self.say(f"watch {self.watch.name}: {printable(place)} is passed over: {error.strerror or error}")

    def _parts(self, place: str, listing: Listing) -> set[str] | None:
        """The names of the files that the checkpoint is made of; None where it is not whole."""
        if not isinstance(self._json(place, "config.json"), dict):
            return None
        index = next((name for name in INDEXES if name in listing), None)
        if index is None:
            weights = {name for name in listing if name.endswith((".safetensors", ".bin")) and "-of-" not in name}
            return {"config.json", *weights} if weights else None
        said = self._json(place, index)
        if not isinstance(said, dict) or not isinstance(said.get("weight_map"), dict):
            return None
        shards = set(map(str, said["weight_map"].values()))
        metadata = said.get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        if not shards <= set(listing) or (isinstance(total, int) and sum(listing[name][0] for name in shards) < total):
            return None
        return {"config.json", index, *shards}

    def _json(self, place: str, name: str) -> Any:
        path = f"{place}/{name}"
        try:
            return parse_json(self._files.cat_file(path, end=MAX_BYTES + 1)) if self.url else read_json(Path(path))
        except (ValueError, FileNotFoundError, BadInput):  # half-written, gone again, or no file of JSON
            return None
        except OSError as error:
            self._passed_over(path, error)
            return None


def _name(place: str) -> str:
    return place.rstrip("/").rpartition("/")[2]


def _stamp(entry: Mapping[str, Any]) -> str:
    return " ".join(str(entry[key]) for key in _STAMPS if key in entry)
