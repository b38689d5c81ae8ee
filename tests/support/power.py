"""A disk that forgets: what was not brought to it by fsync and fdatasync is gone after a power cut, names of files included.

It is as forgetful as the system may be: contents that were never flushed are zeros, names that were never flushed are not there,
and files that were removed or renamed are as they were when their directory was flushed last.
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

from pipeline.watching.listener import Silent
from stages.write import Written


class Stop(Silent):
    """Interrupts a run after so many groups."""

    def __init__(self, after: int) -> None:
        self.after, self.done = after, 0

    def advanced(self, written: Written) -> None:  # noqa: ARG002
        self.done += 1
        if self.done >= self.after:
            raise KeyboardInterrupt


class Disk:
    """What is on the disk in and below a directory: all that is there when it begins, and what is flushed from then on.

    Files are held open, so that the number of one that is removed is not given to another.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self._patches = root, monkeypatch
        self.contents: dict[int, bytes] = {}  # of files by inode
        self.names: dict[int, dict[str, int]] = {}  # of directories by inode
        self._folders: set[int] = set()
        self._links: dict[int, str] = {}
        self._held: dict[int, int] = {}
        self.begin()

    def begin(self) -> None:
        """Take all that is there for flushed, and note what is flushed from now on."""
        for folder, _, names in os.walk(self.root):
            self._keep_names(Path(folder))
            for name in names:
                self._keep_contents(Path(folder) / name)
        self._patches.setattr(os, "fsync", self._flushed)
        self._patches.setattr(os, "fdatasync", self._flushed)

    def cut(self, monkeypatch: pytest.MonkeyPatch, boot: str) -> None:
        """Cut the power: make the directory as the disk has it, and give the system another boot."""
        found = self.root.with_name(f"{self.root.name}.found")
        self._restore(self.root.stat().st_ino, found)
        shutil.rmtree(self.root)
        found.rename(self.root)
        for descriptor in self._held.values():
            os.close(descriptor)
        self.contents, self.names, self._folders, self._links, self._held = {}, {}, set(), {}, {}
        monkeypatch.setattr("pipeline.sinks.journal.boot_id", lambda: boot)
        self.begin()

    def _flushed(self, descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path == self.root or self.root in path.parents:
            (self._keep_names if stat.S_ISDIR(os.fstat(descriptor).st_mode) else self._keep_contents)(path)

    def _keep_names(self, folder: Path) -> None:
        self.names[self._hold(folder)] = {path.name: self._hold(path) for path in folder.iterdir()}

    def _keep_contents(self, path: Path) -> None:
        if not path.is_symlink():
            self.contents[self._hold(path)] = path.read_bytes()

    def _hold(self, path: Path) -> int:
        state = path.lstat()
        if stat.S_ISDIR(state.st_mode):
            self._folders.add(state.st_ino)
        link = stat.S_ISLNK(state.st_mode)
        if link:
            self._links[state.st_ino] = str(path.readlink())
        if state.st_ino not in self._held:
            self._held[state.st_ino] = os.open(path, os.O_PATH | os.O_NOFOLLOW if link else os.O_RDONLY)
        return state.st_ino

    def _restore(self, inode: int, place: Path) -> None:
        place.mkdir()
        for name, number in self.names.get(inode, {}).items():
            if number in self._folders:
                self._restore(number, place / name)
                continue
            if number in self._links:
                (place / name).symlink_to(self._links[number])
                continue
            kept = self.contents.get(number, b"")
            lost = os.fstat(self._held[number]).st_size - len(kept)
            (place / name).write_bytes(kept + bytes(max(lost, 0)))
