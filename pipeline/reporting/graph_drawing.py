"""Draw a plan's graph into a file: SVG, an HTML page around it, or Graphviz's own language."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from pipeline.errors import BadInput, Problem, WriteFailed
from pipeline.planning.graph import PlanGraph
from pipeline.planning.graph_svg import coloured
from pipeline.planning.graph_words import facts, printable
from pipeline.printed import in_html
from pipeline.watching.look import look

SUFFIXES = (".svg", ".html", ".dot")
DOT_SECONDS = 30  # what dot may take; then the picture is drawn without it

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}: headrace plan</title>
<style>
{look}
table {{ border-collapse: collapse; }}
th, td {{ padding: 4px 16px 4px 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }}
th, td {{ overflow-wrap: anywhere; }}
td {{ color: var(--soft); }}
.wide svg {{ max-width: 100%; height: auto; }}
</style>
</head>
<body>
<header><p class="eyebrow">headrace plan</p><h1>{title}</h1></header>
<main>
<section class="wide">
{svg}
</section>
<section>
<table>
{rows}
</table>
</section>
</main>
</body>
</html>
"""


def check_graph_path(file: Path) -> None:
    """Check that a graph can be drawn into a file. Raises BadInput where its name or its place is wrong."""
    subject = f"--graph {file}"
    if file.suffix.lower() not in SUFFIXES or file.is_dir():
        found = "a directory" if file.is_dir() else "another kind of file"
        raise BadInput([Problem(subject, found, f"a file named *{', *'.join(SUFFIXES[:-1])} or *{SUFFIXES[-1]}")])
    if not file.absolute().parent.is_dir():
        raise BadInput([Problem(subject, f"no directory {file.parent}", "a file in a directory that is there")])


def draw_graph(graph: PlanGraph, file: Path) -> None:
    """Draw a graph into a file of one of SUFFIXES, which is never half a picture.

    Raises BadInput where its name or place is wrong, and WriteFailed where it cannot be written; nothing is left then.
    """
    check_graph_path(file)
    kind = file.suffix.lower()
    text = graph.to_dot() if kind == ".dot" else picture(graph) if kind == ".svg" else page(graph)
    new = file.with_name(f".{file.name}.{os.getpid()}.new")
    try:
        new.write_text(text, encoding="utf-8", newline="\n")
        new.replace(file)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise WriteFailed(f"{file}: {error.strerror or error}; free space, or choose another --graph") from error


def picture(graph: PlanGraph) -> str:
    """The graph as SVG: drawn by Graphviz's `dot` where it is installed, else by ourselves."""
    command = shutil.which("dot")
    if command:
        try:
            done = subprocess.run(
                [command, "-Tsvg"], input=graph.to_dot(), capture_output=True, encoding="utf-8", timeout=DOT_SECONDS, check=True
            )
            return coloured(done.stdout)
        except (OSError, subprocess.SubprocessError, ValueError):
            pass  # a dot that does not work is as none
    return graph.to_svg()


def page(graph: PlanGraph) -> str:
    """The graph as an HTML page that needs no other file: the picture, and a table of its nodes."""
    rows = "\n".join(
        f"<tr><th>{_text(node.name)}</th><td>{_text(', '.join(facts(node)))}</td><td>{_text(node.place)}</td></tr>"
        for node in graph.nodes
    )
    source = graph.nodes[0].name
    return PAGE.format(look=look(), title=_text(source), svg=graph.to_svg(), rows=rows)


def _text(text: str) -> str:
    return in_html(printable(text))
