"""The one interface of a source: how a checkpoint of its kind is known, and opened."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from pipeline.tensor.tensors import Source


class SourceReader(Protocol):
    """A kind of checkpoint. A file of `stages/read` that reads one has it as `READER`.

    `name`: what tables call it. `title`: what a message calls such a checkpoint, with its article.
    """

    name: str
    title: str

    def detect(self, location: Path) -> bool:
        """Whether a file or directory that exists is of this kind; true of a damaged one too: opening it says what is wrong."""
        ...

    def open_source(self, location: Path) -> Source:
        """Open it: read headers, and no tensor. Raises BadInput with all problems found."""
        ...
