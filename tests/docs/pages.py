"""The pages of the documents, taken apart: blocks of commands and of files, and what a page says about them.

A line of HTML comment before a block, which no reader sees, says what becomes of it in the tests:

<!-- not run: why -->                 none of its lines is run
<!-- not run (serve, tcp://): why --> those that one of these texts stands in are not
<!-- file: job.toml -->              it is written to that file before the next block is run
<!-- python -->                      a block of Python is run (without it, it is only compiled)
<!-- exit: 2 -->                      its commands end with that exit code

What is not run is still held against the command line: its command and flags must exist.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.places import DOCS, ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
PAGES = [page for page in PAGES if not page.is_relative_to(DOCS / "reference")]
MARK = re.compile(r"^<!-- (?P<kind>not run|file|python|exit)(?: \((?P<texts>[^)]*)\))?(?:: (?P<value>.*?))? -->$")
SHELL = {"sh", "bash", "console", "shell"}
# The first words of lines in indented blocks that are commands: other such blocks are output, files and figures.
PROGRAMS = ("headrace ", "dask ", "make ", "pip ", "python ", "docker ", "ssh ", "uv ")


@dataclass(frozen=True)
class Mark:
    kind: str
    texts: tuple[str, ...]
    value: str


@dataclass(frozen=True)
class Block:
    """Lines of one kind (the language after the fence; "indented" without one), and the mark before them."""

    line: int
    kind: str
    lines: tuple[str, ...]
    mark: Mark | None

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"

    def commands(self) -> Iterator[tuple[str, bool]]:
        """The commands of a block, without prompts and comments, and whether each is to be run."""
        prompts = any(line.startswith("$ ") for line in self.lines)
        if self.kind not in SHELL | {"indented"} and not (prompts and self.kind == "text"):
            return
        joined = re.sub(r"\\\n\s*", " ", self.text)
        joined = re.sub(r"'[^'\n]*\n[^']*'", lambda found: found[0].replace("\n", " "), joined)
        for line in joined.splitlines():
            if prompts and not line.startswith("$ "):
                continue  # what it prints
            line = line.removeprefix("$ ").strip()
            if self.kind == "indented" and not prompts and not line.startswith(PROGRAMS):
                continue
            words = shlex.split(line, comments=True)
            if words:
                bare = re.sub(r"\s+#.*$", "", line)
                yield bare, not self.left_out(bare)

    @property
    def exit_code(self) -> int:
        """The exit code that its commands end with."""
        return int(self.mark.value) if self.mark and self.mark.kind == "exit" else 0

    def left_out(self, line: str) -> bool:
        mark = self.mark
        return mark is not None and mark.kind == "not run" and (not mark.texts or any(text in line for text in mark.texts))


def blocks(page: Path) -> list[Block]:
    """The blocks of a page in their order."""
    found: list[Block] = []
    mark: Mark | None = None
    lines = page.read_text().splitlines()
    at = 0
    while at < len(lines):
        line = lines[at]
        if marked := MARK.match(line):
            texts = tuple(text.strip() for text in (marked["texts"] or "").split(",") if text.strip())
            mark = Mark(marked["kind"], texts, marked["value"] or "")
        elif fence := re.match(r"^(`{3,})(\S*)\s*$", line):
            end = lines.index(fence[1], at + 1)
            found.append(Block(at + 1, fence[2], tuple(lines[at + 1 : end]), mark))
            at, mark = end, None
        elif line.startswith("    ") and at and not lines[at - 1].strip():  # CommonMark's code block
            end = at
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            found.append(Block(at + 1, "indented", tuple(text.removeprefix("    ") for text in lines[at:end]), mark))
            at, mark = end - 1, None
        elif line.strip():
            mark = None
        at += 1
    return found
