"""Power cuts at any moment of a run: what the disk may hold then, of all that was flushed and of what was not.

One run is recorded. Before each system call that changes a file or a name, what the disk is sure to have and what the system holds
besides are noted; a power cut at such a moment leaves a disk that is made of both, in one of several ways (LEFT).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

PAGE = 4096
# What a power cut may leave of that which was not flushed:
LEFT = (
    "nothing",  # neither names nor contents
    "names",  # names, of files whose contents are zeros: journals of file systems hold names alone
    "empty",  # names, of files that end where what was flushed ended
    "mixed",  # of each directory the names of some moment since its last flush, of each file some of its pages
    "all",
)
_CALLS = ("pwrite", "write", "fsync", "fdatasync")
_EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.symlink", "open"}
_recorders: list[Recorder] = []  # an audit hook stays for ever, and works while there is one


@dataclass
class Held:
    """What may be on the disk at a moment.

    `names`: of each directory by its inode, those that were flushed last, then those of each moment since. `contents`: of each
    file, what was flushed and what the system has. `links`: where each link leads, which is on the disk with its name. `root`: the
    inode of the directory that is looked at. `before`: the call that the moment is before.
    """

    root: int
    names: dict[int, list[dict[str, int]]]
    contents: dict[int, tuple[bytes, bytes]]
    links: dict[int, str]
    before: str

    def restore(self, place: Path, left: str, random: Random) -> None:
        """Make the directory that a power cut at this moment leaves."""
        shutil.rmtree(place, ignore_errors=True)
        files: dict[int, bytes] = {}
        self._restore(self.root, place, left, random, files)

    def _restore(self, inode: int, place: Path, left: str, random: Random, files: dict[int, bytes]) -> None:
        place.mkdir()
        choices = self.names[inode]
        names = {"nothing": choices[0], "mixed": random.choice(choices)}.get(left, choices[-1])
        for name, number in sorted(names.items()):
            if number in self.names:
                self._restore(number, place / name, left, random, files)
            elif number in self.links:
                (place / name).symlink_to(self.links[number])
            else:
                if number not in files:
                    files[number] = _left_of(*self.contents[number], left, random)
                (place / name).write_bytes(files[number])


def _left_of(flushed: bytes, held: bytes, left: str, random: Random) -> bytes:
    """The contents of a file after a power cut."""
    zeros = flushed + bytes(max(len(held) - len(flushed), 0))
    if left == "all" or flushed == held:
        return held
    if left == "empty":
        return flushed
    if left != "mixed":
        return zeros
    pages = range(0, max(len(held), len(flushed)), PAGE)
    mixed = b"".join(random.choice((held, zeros, zeros))[at : at + PAGE].ljust(PAGE, b"\0") for at in pages)
    return random.choice((held, zeros, flushed, mixed[: len(held)], held[: random.randint(0, len(held))]))


@dataclass
class Recorder:
    """Notes what may be on the disk in and below a directory at moments of a run.

    `wanted`: the numbers of the moments to be noted; None for none of them, where moments are but counted. Files are held open, so
    that the number of one that is removed is not given to another.
    """

    root: Path
    wanted: set[int] | None = None
    count: int = 0
    held: list[Held] = field(default_factory=list)
    _flushed: dict[int, bytes] = field(default_factory=dict)
    _names: dict[int, list[dict[str, int]]] = field(default_factory=dict)
    _open: dict[int, int] = field(default_factory=dict)
    _links: dict[int, str] = field(default_factory=dict)
    _changing: set[Path] = field(default_factory=set)
    _busy: bool = False

    @contextlib.contextmanager
    def recording(self) -> Iterator[Recorder]:
        """Note the moments of what is done meanwhile. All that is there at its beginning is on the disk."""
        with self._alone():
            for folder, _, names in os.walk(self.root):
                self._names[self._hold(Path(folder))] = [self._listed(Path(folder))]
                for name in names:
                    path = Path(folder) / name
                    number = self._hold(path)
                    if number not in self._links:
                        self._flushed[number] = path.read_bytes()
        if _hook not in _hooked:
            sys.addaudithook(_hook)
            _hooked.append(_hook)
        _recorders.append(self)
        try:
            with contextlib.ExitStack() as stack:
                for name in _CALLS:
                    stack.enter_context(mock.patch.object(os, name, self._watched(name, getattr(os, name))))
                yield self
        finally:
            _recorders.remove(self)
            for descriptor in self._open.values():
                os.close(descriptor)

    def moment(self, what: str, place: str, *others: str) -> None:
        """A call that changes something is about to be made; `others`: further names that it changes."""
        if self._busy or not place.startswith(f"{self.root}/"):
            return
        with self._alone():
            self._look()
            self._changing |= {Path(name).parent for name in (place, *others)}
            if self.wanted is not None and self.count in self.wanted:
                self.held.append(self._state(f"{what} {place.removeprefix(f'{self.root}/')}"))
        self.count += 1

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(descriptor: int, *more: Any) -> Any:
            if self._busy:
                return real(descriptor, *more)
            place = _path(descriptor)
            self.moment(name, f"{place}/" if place == str(self.root) else place)
            result = real(descriptor, *more)
            if name in ("fsync", "fdatasync"):
                with self._alone():
                    self._flush(descriptor, Path(place))
            return result

        return call

    def _flush(self, descriptor: int, path: Path) -> None:
        if not path.exists() or (path != self.root and self.root not in path.parents):
            return
        self._look()
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            self._names[self._hold(path)] = [self._listed(path)]
        else:
            self._flushed[self._hold(path)] = path.read_bytes()

    def _look(self) -> None:
        """Note how the names of directories have changed by the calls before."""
        for folder in sorted(self._changing):
            if folder.is_dir():
                history, listed = self._names[self._hold(folder)], self._listed(folder)
                if history[-1] != listed:
                    history.append(listed)
        self._changing.clear()

    def _state(self, before: str) -> Held:
        names = {inode: list(history) for inode, history in self._names.items()}
        known = {number for history in names.values() for listed in history for number in listed.values()} - names.keys()
        contents = {n: (self._flushed.get(n, b""), self._read(n)) for n in known - self._links.keys()}
        return Held(self.root.stat().st_ino, names, contents, dict(self._links), before)

    def _read(self, inode: int) -> bytes:
        descriptor = self._open[inode]
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0)

    def _listed(self, folder: Path) -> dict[str, int]:
        return {path.name: self._hold(path) for path in folder.iterdir()}

    def _hold(self, path: Path) -> int:
        status = path.lstat()
        link = stat.S_ISLNK(status.st_mode)
        if link:
            self._links[status.st_ino] = str(path.readlink())
        if status.st_ino not in self._open:
            self._open[status.st_ino] = os.open(path, os.O_PATH | os.O_NOFOLLOW if link else os.O_RDONLY)
            if stat.S_ISDIR(status.st_mode):
                self._names[status.st_ino] = [{}]
        return status.st_ino


_hooked: list[Callable[..., None]] = []
_FOLDER = {"os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 2}  # the argument with the descriptor of the directory


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _recorders or event not in _EVENTS:
        return
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_CREAT | os.O_TRUNC)):
        return
    place = _path(arguments[1 if event == "os.symlink" else 0])
    folder = arguments[_FOLDER[event]] if event in _FOLDER else -1
    if folder >= 0:  # as rmtree does
        place = f"{_path(folder)}/{place}"
    others = [_path(arguments[1])] if event == "os.rename" else []
    for recorder in _recorders:
        recorder.moment(event, place, *others)


def _path(given: Any) -> str:
    if isinstance(given, int):
        return str(Path(f"/proc/self/fd/{given}").readlink())
    return os.fsdecode(given)


def record(root: Path, prepare: Callable[[], None], run: Callable[[], None], wanted: int, seed: int) -> list[Held]:
    """Run twice, to count the moments and to note `wanted` of them, one of each stretch of as many; `prepare`: what was before."""
    counts = []
    chosen: set[int] | None = None
    random = Random(seed)
    for _ in range(2):
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        prepare()
        recorder = Recorder(root, chosen)
        with recorder.recording():
            run()
            recorder.moment("the end", f"{root}/")
        counts.append(recorder.count)
        steps = [recorder.count * n // wanted for n in range(wanted + 1)]
        chosen = {random.randrange(first, max(last, first + 1)) for first, last in itertools.pairwise(steps)}
        chosen.add(recorder.count - 1)
    assert counts[0] == counts[1], "a run whose calls differ from one time to the next"
    return recorder.held
