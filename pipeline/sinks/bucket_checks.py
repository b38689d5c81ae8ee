"""Check, before anything is written, whether outputs can go to places in object storage. Nothing is written for it."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from pipeline.documents import parse_json
from pipeline.errors import Problem
from pipeline.sinks.bucket_hold import NOTE
from pipeline.sinks.output import CONFIG, PROVENANCE, Output
from pipeline.tensor.bucket import Upload, check_url, object_size, objects_below, read_object_at, uploads_below

_RANK = re.compile(r"rank\d+\.safetensors")
_OWN = re.compile(rf"{_RANK.pattern}|config\.json|headrace\.json(\.lock)?")
_OTHERS = "a checkpoint that headrace did not write"
_REPLACE = "Give --overwrite to replace it"


def check_bucket(directory: Path, overwrite: bool, copied: Collection[str] = ()) -> list[Problem]:
    """Check that an output can go below a URL: it can be read, and holds nothing but what headrace wrote.

    Arguments are those of `check_output`. Raises BadInput where the URL cannot be asked at all.
    """
    subject = f"--output_dir {directory}"
    check_url("--output_dir", str(directory))
    try:
        names = set(objects_below(str(directory), deep=True))
        ours = bool(names & {PROVENANCE, NOTE}) or bool(rank_uploads(directory))
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
        return [Problem(subject, _OTHERS, "a new or empty prefix", _REPLACE)]
    return []


def rank_uploads(directory: Path) -> list[Upload]:
    """The uploads of rank files of an output below a URL that are neither complete nor aborted, and nobody else's."""
    return [each for each in uploads_below(str(directory)) if _RANK.fullmatch(each.url.removeprefix(f"{directory}/"))]


def taken_there(output: Output, begun: object) -> list[Problem]:
    """Check that an output below a URL replaces no conversion, finished or not, of another source or with other options.

    `begun`: the id of the one that the journal here says was begun; None where there is none.
    """
    whole = read_object_at(str(output.mark)) is not None
    if not whole and begun is None and not rank_uploads(output.directory):
        names = objects_below(str(output.directory)).keys()
        if names and not names & {PROVENANCE, NOTE}:
            return [Problem(f"--output_dir {output.directory}", _OTHERS, "a new or empty prefix", _REPLACE)]
    if (whole and read_provenance(output.directory).get("id") != output.id) or begun not in (None, output.id):
        found = f"{'a finished' if whole else 'an unfinished'} conversion of another source or with other options"
        remedy = "Give --overwrite to start afresh"
        return [Problem(f"--output_dir {output.directory}", found, "a new prefix, or the same request", remedy)]
    return []


def check_apart_there(directories: Sequence[Path]) -> list[Problem]:
    """Check that no output below a URL is inside another, of the same job or of one before."""
    problems = []
    for directory in directories:
        above = [path for path in directory.parents if len(path.parts) > 2]  # scheme, bucket, and a prefix
        outer = [other for other in directories if other in above] or [path for path in above if _is_output(path)]
        if outer:
            found, remedy = f"a place inside the output {outer[0]}", "Choose another --output_dir"
            problems.append(Problem(f"--output_dir {directory}", found, "outputs beside one another", remedy))
    return problems


def _is_output(directory: Path) -> bool:
    """Whether a prefix can be seen to hold an output; one that may not be looked at does not count."""
    with suppress(OSError):
        return object_size(str(directory / PROVENANCE)) is not None
    return False


def read_provenance(directory: Path) -> dict[str, object]:
    """The values of headrace.json below a URL; none where there is none."""
    found = read_object_at(str(directory / PROVENANCE))
    try:
        value = parse_json(found[0]) if found else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
