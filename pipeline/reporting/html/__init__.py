"""Make the HTML report of an output directory. It needs no other file, runs no script and asks no host for anything.

The templates are in `configs/report/`, the look that they share with other pages in `configs/look/`; every text that comes from a
file is escaped on its way into them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from pipeline.documents import read_object
from pipeline.errors import BadInput, Problem, WriteFailed
from pipeline.model.tables import CONFIGS
from pipeline.reporting.html.course import course_charts
from pipeline.reporting.html.errors_map import error_map
from pipeline.reporting.html.flow import NARROW, WIDE, columns, steps, timed
from pipeline.reporting.html.provenance import mapping_words, model_facts, number_format, options, read_provenance
from pipeline.reporting.html.sizes import sizes
from pipeline.reporting.html.summary import VerificationSummary, parse_summary
from pipeline.reporting.html.words import count, duration, figure, percent, rate, size, visible
from pipeline.tensor.checkpoint import Checkpoint
from pipeline.tensor.remote_path import is_remote
from pipeline.version import VERSION
from stages.read.remote import image_of

SHOWN_FINDINGS = 100
SUFFIXES = (".html", ".htm")


def render_report(
    checkpoint: Checkpoint,
    summary: VerificationSummary | Mapping[str, Any] | None = None,
    made: datetime | None = None,
    changed: str = "",
) -> str:
    """Render the report of an output.

    Parameters
    ----------
    checkpoint
        The output, as `stages.read.ranks.open_checkpoint` or `describe_directory` gives it.
    summary
        A verification's summary, or what `headrace verify --json` printed; None where the output was not verified.
    made
        The time that the report names as its own; now by default.
    changed
        What of the source that headrace.json names is not as it was, so that nothing was compared with it.

    Returns
    -------
    str
        One HTML document.

    Raises
    ------
    BadInput
        Where the summary does not have the fields of `VerificationSummary`.
    """
    verified = summary if isinstance(summary, VerificationSummary) or summary is None else parse_summary(summary)
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
            course=course_charts(provenance.timings.course) if provenance else "",
            sizes=sizes(checkpoint),
            found=verified,
            elsewhere=verified is not None and Path(verified.directory).name != directory.name,
            changed=changed,
            shown_findings=SHOWN_FINDINGS,
            errors=error_map(verified.round_trip) if verified and verified.round_trip else None,
            version=VERSION,
            made=f"{(made or datetime.now(UTC)).astimezone(UTC):%Y-%m-%d %H:%M} UTC",
        )
    )


def describe_directory(directory: Path) -> Checkpoint:
    """Describe a directory by its config.json and headrace.json alone: a missing or broken one counts as empty.

    Returns a Checkpoint without ranks, for a report on a directory whose rank files cannot be read.
    """
    if is_remote(directory):
        try:
            place, _ = image_of(str(directory))
        except BadInput:
            return Checkpoint(directory, {}, ())
        return replace(describe_directory(place), directory=directory)
    return Checkpoint(directory, read_object(directory / "config.json"), (), read_object(directory / "headrace.json"))


def default_report_path(directory: Path) -> Path:
    """The default path of a directory's report: beside the directory; of one in object storage, in the current directory."""
    if is_remote(directory):
        return Path.cwd() / f"{directory.name}.report.html"
    return directory.with_name(f"{directory.name}.report.html")


def check_report_path(output: Path, directory: Path, option: str = "--output") -> None:
    """Check that the report of `directory` can be written to `output`, which an `option` names.

    Raises BadInput where `output` is no *.html file, is in no directory, or is inside `directory`.
    """
    subject = f"{option} {output}"
    if output.suffix.lower() not in SUFFIXES or output.is_dir():
        raise BadInput([Problem(subject, "a directory" if output.is_dir() else "another kind of file", "a file named *.html")])
    if not output.absolute().parent.is_dir():
        raise BadInput([Problem(subject, f"no directory {output.parent}", "a file in a directory that is there")])
    if output.resolve().is_relative_to(directory.resolve()):
        remedy = f"Nothing is added to a finished output; choose another {option}"
        raise BadInput([Problem(subject, f"a file in {directory}", "a file elsewhere", remedy)])


def write_report(output: Path, text: str) -> None:
    """Write the report to a new file and rename it, so that `output` is never half a report.

    Raises WriteFailed where it cannot be written; nothing is left then.
    """
    new = output.with_name(output.name + ".new")
    try:
        new.write_bytes(text.encode())
        new.replace(output)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise WriteFailed(f"{output}: {error.strerror or error}; free space, or choose another --output") from error


def _breakable(text: str) -> Markup:
    """Escape text, and let its lines break behind underscores."""
    return escape(visible(text)).replace("_", Markup("_<wbr>"))


@cache
def _templates() -> Environment:
    """The environment of the templates, which escapes every text."""
    made = Environment(
        loader=FileSystemLoader([CONFIGS / "report", CONFIGS / "look"]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    functions = (count, duration, figure, percent, rate, size)
    made.filters.update({function.__name__: function for function in functions}, breakable=_breakable)
    return made
