"""Paths from somebody's home directory, `~` or `~name`, as files and Python have them: a shell has seen to those of its words."""

from __future__ import annotations

from pathlib import Path

UNKNOWN = "a path in full, as nobody here knows this home directory"


def at_home(value: str | Path) -> Path:
    """Return a path with the home directory that it begins with, if any. Raises ValueError, for people, where that is not known."""
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise ValueError(UNKNOWN) from None


def from_folder(value: str, folder: Path) -> str | Path:
    """Return a path made absolute from a folder; one from a home directory that is not known as it is, for its option to refuse."""
    try:
        return folder / at_home(value)
    except ValueError:
        return value
