"""A Sphinx extension: links from a page to a file or folder of the repository that is no page.

`[shard](../stages/shard.py)` is right where the repository is read. On the site it leads to a copy of the file, with its lines in
colours; a folder, or a file that is not text of ours, is named without a link.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from typing import Any

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx.util import logging

log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parent.parent
# A link of Markdown that leads out of the folder of documents, or to a file below it that is no page and no picture.
LINK = re.compile(r"(?<!!)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<to>(?!https?:|#|mailto:)[^)\s]+)\)")
PAGES = {".md"}
PICTURES = {".png", ".svg"}


def leads_out(page: Path, to: str) -> Path | None:
    """The file or folder of the repository that a link of a page leads to, where it is not a page of the site; else None."""
    path = (page.parent / to.split("#")[0]).resolve()
    inside = path.is_relative_to(ROOT / "docs")
    if inside and (path.suffix in PAGES | PICTURES or not path.is_file()):
        return None
    return path if path.is_relative_to(ROOT) else None


def rewrite(app: Any, docname: str, source: list[str]) -> None:
    """Have links to files of the repository lead to their copies."""
    page = Path(app.env.doc2path(docname))
    up = "../" * docname.count("/")

    def replaced(found: re.Match[str]) -> str:
        path = leads_out(page, found["to"])
        if path is None:
            return found[0]
        name = path.relative_to(ROOT).as_posix()
        if not path.exists():
            log.warning("%s leads to %s, which is not there", docname, name, location=docname)
        if not path.is_file():
            return found["text"]
        app.env.copied_files = getattr(app.env, "copied_files", set()) | {name}
        return f'<a href="{up}source/{escape(name)}.html">{_inline(found["text"])}</a>'

    source[0] = LINK.sub(replaced, source[0])


def _inline(text: str) -> str:
    """The words of a link, code among them, as HTML."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))


def write_copies(app: Any, failed: Exception | None) -> None:
    """Write the files that are linked to, a page each with numbered lines."""
    if failed is not None or app.builder.name != "html":
        return
    style = HtmlFormatter(linenos="inline", lineanchors="line", full=True, style="friendly")
    for name in sorted(getattr(app.env, "copied_files", ())):
        try:
            lexer = get_lexer_for_filename(name)
        except ClassNotFound:
            lexer = get_lexer_for_filename("x.txt")
        style.title = name
        target = Path(app.outdir) / "source" / f"{name}.html"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(highlight((ROOT / name).read_text(), lexer, style))


def merge(_app: Any, env: Any, _names: Any, other: Any) -> None:
    """Take in what another process of the build has found."""
    env.copied_files = getattr(env, "copied_files", set()) | getattr(other, "copied_files", set())


def setup(app: Any) -> dict[str, Any]:
    """Join the build."""
    app.connect("source-read", rewrite)
    app.connect("env-merge-info", merge)
    app.connect("build-finished", write_copies)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
