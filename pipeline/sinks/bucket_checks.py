"""Check, before anything is written, whether outputs can go to places in object storage. Nothing is written for it."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from pipeline.documents import parse_json
from pipeline.errors import Problem
from pipeline.sinks.bucket_hold import NOTE
from pipeline.sinks.output import CONFIG, PROVENANCE, Output
from pipeline.tensor.bucket import check_url, objects_below, read_object_at, uploads_below

_OWN = re.compile(r"rank\d+\.safetensors|config\.json|headrace\.json(\.lock)?")


def check_bucket(directory: Path, overwrite: bool, copied: Collection[str] = ()) -> list[Problem]:
    """Check that an output can go below a URL: it can be read, and holds nothing but what headrace wrote.

    Arguments are those of `check_output`. Raises BadInput where the URL cannot be asked at all.
    """
    subject = f"--output_dir {directory}"
    check_url("--output_dir", str(directory))
    try:
        names = set(objects_below(str(directory), deep=True))
        begun = (bool(names) and NOTE in names) or bool(uploads_below(str(directory)))
        ours = bool(names & {PROVENANCE, NOTE}) or begun
        if PROVENANCE in names:
            said = read_provenance(directory).get("copied")
            copied = {*copied, *(map(str, said) if isinstance(said, list) else ())}
    except OSError as error:
        return [Problem(subject, error.strerror or str(error), "a bucket that can be listed, read and written")]
    foreign = sorted(name for name in names if not _OWN.fullmatch(name) and not (ours and name in copied))
    if foreign:
        found = f"objects that headrace did not write ({', '.join(foreign[:4])})"
        return [Problem(subject, found, "a new or empty prefix", "Choose another --output_dir")]
    if names and not ours and not overwrite and CONFIG in names:
        found = "a checkpoint that headrace did not write"
        return [Problem(subject, found, "a new or empty prefix", "Give --overwrite to replace it")]
    return []


def taken_there(output: Output, begun: object) -> list[Problem]:
    """Check that an output below a URL replaces no conversion, finished or not, of another source or with other options.

    `begun`: the id of the one that the journal here says was begun; None where there is none.
    """
    whole = read_object_at(str(output.mark)) is not None
    if (whole and read_provenance(output.directory).get("id") != output.id) or begun not in (None, output.id):
        found = f"{'a finished' if whole else 'an unfinished'} conversion of another source or with other options"
        remedy = "Give --overwrite to start afresh"
        return [Problem(f"--output_dir {output.directory}", found, "a new prefix, or the same request", remedy)]
    return []


def check_apart_there(directories: Sequence[Path]) -> list[Problem]:
    """Check that no output below a URL is inside another of the same job."""
    return [
        Problem(f"--output_dir {directory}", f"a place inside the output {other}", "outputs beside one another")
        for directory in directories
        for other in directories
        if other in directory.parents
    ]


def read_provenance(directory: Path) -> dict[str, object]:
    """The values of headrace.json below a URL; none where there is none."""
    found = read_object_at(str(directory / PROVENANCE))
    try:
        value = parse_json(found[0]) if found else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
