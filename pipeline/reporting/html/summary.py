"""What a verification found, as `headrace verify --json` prints it: read from a file, checked, and typed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import BadInput, Problem

REMEDY = "Give what `headrace verify --json` printed"


class _Part(BaseModel):
    # Later versions may say more.
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class Finding(_Part):
    """One thing that is wrong with an output. `level`: "integrity", "round trip" or "logits"."""

    level: str
    subject: str
    found: str
    expected: str
    remedy: str = ""

    @property
    def problem(self) -> Problem:
        return Problem(self.subject, self.found, self.expected, self.remedy)


class Integrity(_Part):
    """How much of the files was checked: tensors, bytes, and tensors with a checksum to compare; seconds that it took."""

    tensors: int
    bytes: int
    checksums: int
    seconds: float


class TensorError(_Part):
    """A target tensor beside its source. `kind`: its module without the layer; `bound`: the greatest error over the allowed one.

    `exact`: every value is the source's, rounded once to the type that it is stored in. `snr_db` is None where there is no error.
    """

    name: str
    layer: int | None = None
    kind: str
    ranks: tuple[int, ...] = ()
    elements: int = 0
    storage: str = ""
    exact: bool
    max_abs: float
    relative_rms: float
    snr_db: float | None
    cosine: float
    bound: float
    sources: tuple[str, ...] = ()

    @property
    def identical(self) -> bool:
        """Whether every value is the source's own."""
        return self.exact and self.snr_db is None

    @property
    def rounded(self) -> bool:
        """Whether the only error is that of another type: each value was rounded once."""
        return self.exact and self.snr_db is not None

    @property
    def over(self) -> bool:
        """Whether the error is more than the format allows; also where it is no number."""
        return not self.bound <= 1


class RoundTrip(_Part):
    """Every tensor that was compared with its source; bytes read, seconds taken."""

    seconds: float
    bytes: int
    tensors: tuple[TensorError, ...]


class Comparison(_Part):
    """Logits beside those of `against`: shares of 1, absolute and relative differences, Kullback-Leibler divergences in nats."""

    against: str
    top1_agreement: float
    max_abs: float
    max_relative: float
    kl_mean: float
    kl_max: float
    bound: float | None = None


class Logits(_Part):
    """The model run on `tokens` tokens, once for each comparison."""

    tokens: int
    seconds: float
    comparisons: tuple[Comparison, ...]


class Summary(_Part):
    """A whole verification; a level that was not run is None."""

    directory: str
    source: str | None = None
    version: str = ""
    ok: bool
    seconds: float = 0.0
    findings: tuple[Finding, ...] = ()
    integrity: Integrity | None = None
    round_trip: RoundTrip | None = None
    logits: Logits | None = None

    @property
    def problems(self) -> list[Problem]:
        """What is wrong, as problems of an error; at least one where the verification failed."""
        found = [finding.problem for finding in self.findings]
        return found or [Problem(self.directory, "a verification that failed without a finding", "one that passed")]


def parse_summary(value: object, subject: str = "verification") -> Summary:
    """Check a summary's shape. Raises BadInput naming every field that is not what it should be."""
    if not isinstance(value, Mapping):
        raise BadInput([Problem(subject, f"a {type(value).__name__}", "a verification's summary", REMEDY)])
    try:
        return Summary.model_validate(dict(value))
    except ValidationError as error:
        raise BadInput([_problem(detail, subject) for detail in error.errors()]) from None


def load_summary(path: Path) -> Summary:
    """Read a summary from a JSON file. Raises BadInput where it cannot be read or is none."""
    try:
        return parse_summary(json.loads(path.read_text()), str(path))
    except OSError as error:
        raise BadInput([Problem(str(path), error.strerror or str(error), "a verification's summary", REMEDY)]) from None
    except (ValueError, RecursionError) as error:
        raise BadInput([Problem(str(path), f"no JSON ({error})", "a verification's summary", REMEDY)]) from None


def _problem(detail: Any, subject: str) -> Problem:
    place = ".".join(map(str, detail["loc"]))
    if detail["type"] == "missing":
        return Problem(f"{subject}: {place}", "nothing", "a value", REMEDY)
    return Problem(f"{subject}: {place}", repr(detail["input"])[:80], str(detail["msg"]).lower(), REMEDY)
