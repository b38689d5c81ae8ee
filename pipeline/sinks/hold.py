"""Which process is at work in a directory: a file beside its journal, for machines and file systems that locks do not reach.

The system's own lock (flock) ends with the process that holds it, but some file systems have none, or one for each machine. So the
process at work also leaves its name: host, boot and process. Whose process is known to be gone, as it was of this boot or of an
earlier one of this host, is passed over. Another host's is never guessed to be gone: `headrace unlock` removes it.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.documents import parse_json
from pipeline.errors import BadInput, Problem

SUFFIX = ".lock"
WORDS_SECONDS = 1.0  # between the making of a file and the writing of its words


@dataclass(frozen=True)
class Holder:
    """A process: its host's name, the machine's boot, its id, and when it began, in a text that no other process of that id has."""

    host: str
    boot: str
    pid: int
    birth: str

    @classmethod
    def me(cls) -> Holder:
        """This process."""
        return cls(socket.gethostname(), boot_id(), os.getpid(), birth(os.getpid()))

    @property
    def seen(self) -> bool:
        """Whether this process can see that one, or that it is gone: not where it is another host's, or another container's."""
        return self.host == socket.gethostname() and (self.boot != boot_id() or self.birth.partition(" ")[0] == _namespace())

    @property
    def gone(self) -> bool:
        """Whether it is known to have ended."""
        return self.seen and (self.boot != boot_id() or birth(self.pid) != self.birth)


def boot_id() -> str:
    """Return the kernel's id of the current boot; "" where the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def birth(pid: int) -> str:
    """A text that is different for each process of this boot that ever has this id; "" where it is gone or cannot be seen.

    It holds the pid namespace and the time at which the process started.
    """
    try:
        # The command, in brackets, may hold blanks and brackets itself.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else f"{_namespace()} {fields[19]}"


def take(journal: Path, locked: bool) -> None:
    """Note that this process is at work on what a journal describes.

    `locked`: it holds the journal's own lock, so that no other process of this boot is at work, whatever its note says. Raises
    BadInput where another host's process is, or one of this host that still runs.
    """
    me = Holder.me()
    _take(place(journal), me, journal, lambda found: found.gone or (locked and found.boot == me.boot))


def _take(note: Path, me: Holder, journal: Path, over: Callable[[Holder], bool]) -> None:
    while not _created(note, me):
        found = _said(note)
        if found and not over(found):
            raise busy(journal, found)
        # Of several that find it gone one at a time may take its place: who holds a note beside it, by this same rule.
        beside = note.with_name(f"{note.name}.next")
        _take(beside, me, journal, over)
        if os.path.lexists(note) and holder(note) == found:
            beside.rename(note)  # at no moment is there none
            return
        beside.unlink()


def busy(journal: Path, found: Holder | None) -> BadInput:
    """The error that says who is at work; `found`: None where that is not known."""
    who = f", process {found.pid} on {found.host}" if found else ""
    remedy = "Wait for it, or choose another directory"
    if found and not found.seen:
        remedy = f"Wait for it; if it is gone, as after a crash there, run headrace unlock {journal.parent}"
    return BadInput([Problem(str(journal.parent), f"another job at work on it{who}", "one job at a time", remedy, passing=True)])


def leave(journal: Path) -> None:
    """Remove this process's note, and no other's."""
    if holder(place(journal)) == Holder.me():
        place(journal).unlink(missing_ok=True)


def forget(journal: Path) -> None:
    """Remove the note that a power cut left beside a journal that is gone: of a process that has ended, or of this one."""
    found = holder(place(journal))
    if found and (found.gone or found == Holder.me()):
        place(journal).unlink(missing_ok=True)


def place(journal: Path) -> Path:
    """The note beside a journal."""
    return journal.with_name(journal.name.removesuffix(".partial") + SUFFIX)


def holder(note: Path) -> Holder | None:
    """The process that a note names; None where there is no note, or one without words."""
    try:
        said = parse_json(str(note.readlink()).encode() if note.is_symlink() else note.read_bytes())
        return Holder(str(said["host"]), str(said["boot"]), int(said["pid"]), str(said["birth"]))
    except (OSError, KeyError, TypeError, ValueError):
        return None


def _created(note: Path, of: Holder) -> bool:
    """Make a note; whether there was none before. It is a link to its own words, as a link is made with them at once."""
    words = json.dumps(asdict(of))
    try:
        note.symlink_to(words)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        try:
            with note.open("x") as stream:
                stream.write(words)
        except FileExistsError:
            return False
        return holder(note) == of  # not of one that had no words for too long
    return True


def _said(note: Path) -> Holder | None:
    """The process that a note names, waiting a moment for the words of one that is a file."""
    end = time.monotonic() + WORDS_SECONDS
    while (found := holder(note)) is None and os.path.lexists(note) and time.monotonic() < end:
        time.sleep(0.01)
    return found


def _namespace() -> str:
    """The pid namespace of this process; "-" where the system does not say."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return "-"


def release(directory: Path) -> Holder | None:
    """Remove the note of a process that is gone from a directory, and return whose it was; None where there is none.

    Raises BadInput where there is no such directory, or the process can be seen to run.
    """
    if not directory.is_dir():
        raise BadInput([Problem(str(directory), "no such directory", "an output, or a cut of scratch")])
    # Of an output or a cut, of a daemon's history, of an output in a bucket; what names no process is not headrace's.
    named = {path: holder(path) for path in sorted(directory.glob(f"*{SUFFIX}*"))}
    notes = [path for path, found in named.items() if found or path.name.startswith("headrace.")]
    held = [found for found in named.values() if found]
    if at_work := [each for each in held if each.seen and not each.gone]:
        found = f"process {at_work[0].pid} of this machine at work on it"
        raise BadInput([Problem(str(directory), found, "one that is gone", "Stop it, or wait for it")])
    for note in notes:
        note.unlink(missing_ok=True)
    return held[0] if held else None
