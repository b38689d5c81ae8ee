"""Make the HTML page of an output directory, of a verification that is at hand or made now."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import BadInput, Problem
from pipeline.printed import InOneLine
from pipeline.reporting.html import check_report_path, default_report_path, describe_directory, render_report, write_report
from pipeline.reporting.html.recorded import unchanged_source
from pipeline.reporting.html.summary import OutputIdentity, VerificationSummary, load_summary, parse_summary
from pipeline.reporting.identity import identity
from pipeline.reporting.tasks import Advance
from pipeline.reporting.verification import open_output, verify
from pipeline.tensor.remote_path import is_remote


@dataclass(frozen=True, repr=False)
class Report(InOneLine):
    """A page that is written, and the verification that it shows."""

    page: Path
    verification: VerificationSummary

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong with the output."""
        return self.verification.ok

    def _line(self) -> str:
        return f"{self.page}: {'nothing wrong' if self.ok else 'something is wrong'}"

    def _rows(self) -> list[tuple[str, str]]:
        return [("page", str(self.page)), *self.verification._rows()]


def summarize(directory: Path, source: Path | str | None, **options: Any) -> VerificationSummary:
    """Verify an output; arguments as for `pipeline.reporting.verification.verify`. The result as it is read from JSON: typed."""
    return parse_summary(verify(directory, source, **options).summary())


def make_report(
    directory: Path,
    source: Path | str | None = None,
    *,
    quant_ckpt_path: Path | None = None,
    output: Path | None = None,
    verification: VerificationSummary | Mapping[str, Any] | Path | None = None,
    advance: Advance | None = None,
) -> Report:
    """Write the page of a finished output.

    `source`: what the output was made of; by default what headrace.json names, where that is there, unchanged. `output`: the page;
    by default beside the directory. `verification`: what is known already, or a JSON file of it; by default the output is verified
    now. Raises BadInput where there is nothing to look at, no place for the page, or a verification of another output, and
    WriteFailed where it cannot be written.
    """
    if verification is not None and (source or quant_ckpt_path):
        remedy = "The verification says what it was of"
        raise BadInput([Problem("--source", "a source beside --verification", "one or the other", remedy)])
    if not is_remote(directory):
        directory = Path(os.path.abspath(directory))  # noqa: PTH100 (links stay as they are)
    page = default_report_path(directory) if output is None else output
    check_report_path(page, directory)
    changed = ""
    if verification is None:
        if not source:
            recorded, changed = unchanged_source(describe_directory(directory))
            if recorded:
                source, quant_ckpt_path = recorded[0], quant_ckpt_path or recorded[1]
        summary = summarize(directory, source, quant_ckpt_path=quant_ckpt_path, advance=advance)
    elif isinstance(verification, Path):
        summary = load_summary(verification)
    else:
        summary = verification if isinstance(verification, VerificationSummary) else parse_summary(verification)
    try:
        checkpoint = open_output(directory)
    except BadInput:
        if summary.ok:
            raise
        checkpoint = describe_directory(directory)
    own = OutputIdentity(**identity(checkpoint.provenance))
    if own.differs(summary.output):
        found = f"a verification of another output, {summary.directory} (id {summary.output.id or 'unknown'})"
        remedy = "Leave it out, or give what `headrace verify --json` prints of this one"
        raise BadInput([Problem("--verification", found, f"one of {directory} (id {own.id or 'unknown'})", remedy)])
    write_report(page, render_report(checkpoint, summary, changed=changed))
    return Report(page, summary)


def unverified_page(directory: Path) -> str:
    """The page, as text, of an output whose values nobody has looked at: of its headers, or of its JSON files alone."""
    try:
        checkpoint = open_output(directory)
    except BadInput:
        checkpoint = describe_directory(directory)
    return render_report(checkpoint)
