"""`headrace report`: one HTML page of an output directory. It needs no other file, runs no script and asks no host for anything.

The templates are `configs/report/`; every text that comes from a file is escaped on its way into them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from pipeline.errors import BadInput, Problem, WriteFailed
from pipeline.model.tables import CONFIGS
from pipeline.planning.plans import VERSION
from pipeline.reporting.html.errors_map import error_map
from pipeline.reporting.html.flow import NARROW, WIDE, columns, steps, timed
from pipeline.reporting.html.provenance import mapping_words, model_facts, number_format, options, read_provenance
from pipeline.reporting.html.sizes import sizes
from pipeline.reporting.html.summary import Summary, parse_summary
from pipeline.reporting.html.words import count, duration, figure, percent, rate, size, visible
from pipeline.tensor.checkpoint import Checkpoint

SHOWN_FINDINGS = 100
SUFFIXES = (".html", ".htm")


def render(checkpoint: Checkpoint, summary: Summary | Mapping[str, Any] | None = None, made: datetime | None = None) -> str:
    """The page as text. `summary`: what a verification found, None where there was none; `made`: the time it says, now by default.

    Raises BadInput where the summary is not of the shape that pipeline/reporting/html/summary.py says.
    """
    found = summary if isinstance(summary, Summary) or summary is None else parse_summary(summary)
    provenance, wrong = read_provenance(checkpoint)
    boxes = steps(checkpoint, provenance) if provenance else []
    directory = checkpoint.directory
    return (
        _templates()
        .get_template("page.html")
        .render(
            name=directory.name or str(directory),
            directory=str(directory),
            checkpoint=checkpoint,
            mapping=mapping_words(checkpoint),
            model=model_facts(checkpoint),
            numbers=number_format(checkpoint),
            provenance=provenance,
            wrong=wrong,
            options=options(provenance) if provenance else [],
            steps=boxes,
            columns=columns(boxes, WIDE),
            fewer=columns(boxes, NARROW),
            timed=timed(boxes),
            sizes=sizes(checkpoint),
            found=found,
            elsewhere=found is not None and Path(found.directory).name != directory.name,
            shown_findings=SHOWN_FINDINGS,
            errors=error_map(found.round_trip) if found and found.round_trip else None,
            version=VERSION,
            made=f"{(made or datetime.now(UTC)).astimezone(UTC):%Y-%m-%d %H:%M} UTC",
        )
    )


def described(directory: Path) -> Checkpoint:
    """A directory by its JSON files alone, as far as they are some: its ranks are not looked at."""
    found = []
    for name in ("config.json", "headrace.json"):
        try:
            value = json.loads((directory / name).read_text())
        except (OSError, ValueError, RecursionError):
            value = {}
        found.append(value if isinstance(value, dict) else {})
    return Checkpoint(directory, found[0], (), found[1])


def default_output(directory: Path) -> Path:
    """Where the page of a directory goes: beside it."""
    return directory.with_name(f"{directory.name}.report.html")


def check_page(output: Path, directory: Path) -> None:
    """Raise BadInput where no page can go to `output`: another kind of file, no directory, or a place inside `directory`."""
    subject = f"--output {output}"
    if output.suffix.lower() not in SUFFIXES or output.is_dir():
        raise BadInput([Problem(subject, "a directory" if output.is_dir() else "another kind of file", "a file named *.html")])
    if not output.absolute().parent.is_dir():
        raise BadInput([Problem(subject, f"no directory {output.parent}", "a file in a directory that is there")])
    if output.resolve().is_relative_to(directory.resolve()):
        remedy = "Nothing is added to a finished output; choose another --output"
        raise BadInput([Problem(subject, f"a file in {directory}", "a file elsewhere", remedy)])


def write_page(output: Path, text: str) -> None:
    """Give the file its whole text at once. Raises WriteFailed where it cannot be written."""
    new = output.with_name(output.name + ".new")
    try:
        new.write_bytes(text.encode())
        new.replace(output)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise WriteFailed(f"{output}: {error.strerror or error}; free space, or choose another --output") from error


def _breakable(text: str) -> Markup:
    """Text whose lines may break behind underscores."""
    return escape(visible(text)).replace("_", Markup("_<wbr>"))


@cache
def _templates() -> Environment:
    made = Environment(
        loader=FileSystemLoader(CONFIGS / "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    functions = (count, duration, figure, percent, rate, size)
    made.filters.update({function.__name__: function for function in functions}, breakable=_breakable)
    return made
