"""Read a verification's summary, as `headrace verify --json` prints it, and check it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.documents import read_json
from pipeline.errors import BadInput, Problem, VerificationFailed
from pipeline.planning.wrong_values import place, wrong_value
from pipeline.printed import InOneLine, many

REMEDY = "Give what `headrace verify --json` printed"


class _SummaryPart(BaseModel):
    # Later versions may have more fields.
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class ReportedFinding(_SummaryPart):
    """One thing that is wrong with an output. `level`: "integrity", "round trip" or "logits"."""

    level: str
    subject: str
    found: str
    expected: str
    remedy: str = ""

    @property
    def problem(self) -> Problem:
        """The finding as a problem of an error."""
        return Problem(self.subject, self.found, self.expected, self.remedy)


class Integrity(_SummaryPart):
    """The extent of the integrity check: numbers of tensors, of bytes and of tensors with a checksum, and seconds."""

    tensors: int
    bytes: int
    checksums: int
    seconds: float


class TensorError(_SummaryPart):
    """The error of one of the output's tensors.

    `kind`: its module without the layer. `bound`: the greatest ratio of an error to the allowed one. `exact`: every value is the
    source's, rounded once to the type that it is stored in. `snr_db`: signal to noise in dB, None where there is no error.
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
        """Whether every value is the source's own, bit for bit."""
        return self.exact and self.snr_db is None

    @property
    def rounded(self) -> bool:
        """Whether the only error is one rounding of each value to another type."""
        return self.exact and self.snr_db is not None

    @property
    def over(self) -> bool:
        """Whether the error is more than the format allows, or is NaN."""
        return not self.bound <= 1


class RoundTrip(_SummaryPart):
    """The comparison of every tensor with its source: seconds, bytes of the source, and errors."""

    seconds: float
    bytes: int
    tensors: tuple[TensorError, ...]


class LogitsComparison(_SummaryPart):
    """Logits compared with those of the model `against`.

    `top1_agreement`: a share of 1. `max_relative`: of the largest logit. `kl_mean`, `kl_max`: Kullback-Leibler divergences in nats.
    `bound`: the largest allowed `max_relative`, None for any.
    """

    against: str
    top1_agreement: float
    max_abs: float
    max_relative: float
    kl_mean: float
    kl_max: float
    bound: float | None = None


class Logits(_SummaryPart):
    """The comparisons of the logits of `tokens` tokens."""

    tokens: int
    seconds: float
    comparisons: tuple[LogitsComparison, ...]


class OutputIdentity(_SummaryPart):
    """The marks that tell an output from others of its name; "" where headrace.json does not say.

    `id`: of its conversion. `xxh3`: of all of its checksums.
    """

    id: str = ""
    xxh3: str = ""

    def differs(self, other: OutputIdentity) -> bool:
        """Whether another output is surely not this one: nothing is said of one without headrace.json."""
        return any(ours and theirs and ours != theirs for ours, theirs in ((self.id, other.id), (self.xxh3, other.xxh3)))


class VerificationSummary(InOneLine, _SummaryPart):
    """The summary of a whole verification; a level that was not run is None."""

    directory: str
    output: OutputIdentity = OutputIdentity()
    source: str | None = None
    version: str = ""
    ok: bool
    seconds: float = 0.0
    findings: tuple[ReportedFinding, ...] = ()
    integrity: Integrity | None = None
    round_trip: RoundTrip | None = None
    logits: Logits | None = None

    def _line(self) -> str:
        found = "nothing wrong" if self.ok else many(len(self.findings) or 1, "finding")
        return f"{self.directory}: {found} by {', '.join(level for level, _ in self._levels)} in {self.seconds:.1f} s"

    def _rows(self) -> list[tuple[str, str]]:
        return [
            ("output", self.directory),
            ("source", self.source or ""),
            ("found", "nothing wrong" if self.ok else many(len(self.findings) or 1, "finding")),
            *self._levels,
            *((finding.level, str(finding.problem)) for finding in self.findings),
        ]

    @property
    def _levels(self) -> list[tuple[str, str]]:
        """The levels that were run, each with its extent."""
        levels = []
        if self.integrity:
            tensors, sums = self.integrity.tensors, self.integrity.checksums
            levels.append(("integrity", f"{many(tensors, 'tensor')}, {many(sums, 'checksum')}"))
        if self.round_trip:
            exact = sum(tensor.identical for tensor in self.round_trip.tensors)
            levels.append(("round trip", f"{many(len(self.round_trip.tensors), 'tensor')} compared, {exact} bit for bit"))
        if self.logits:
            agreed = ", ".join(f"{each.top1_agreement:.1%} of {each.against}" for each in self.logits.comparisons)
            levels.append(("logits", f"{many(self.logits.tokens, 'token')}; the same first choice: {agreed}"))
        return levels

    @property
    def problems(self) -> list[Problem]:
        """The findings as problems of an error; where the verification failed without a finding, one that says so."""
        problems = [finding.problem for finding in self.findings]
        return problems or [Problem(self.directory, "a verification that failed without a finding", "one that passed")]

    def check(self) -> None:
        """Raise VerificationFailed with every finding, where something is wrong."""
        if not self.ok:
            raise VerificationFailed(self.problems)


def parse_summary(value: object, subject: str = "verification") -> VerificationSummary:
    """Check a summary.

    Parameters
    ----------
    value
        The object that `Verification.summary()` returns, or the same read from JSON.
    subject
        The name of the value in problems.

    Raises
    ------
    BadInput
        Naming every field that is missing or has a wrong type.
    """
    if not isinstance(value, Mapping):
        raise BadInput([Problem(subject, f"a {type(value).__name__}", "a verification's summary", REMEDY)])
    try:
        return VerificationSummary.model_validate(dict(value))
    except ValidationError as error:
        raise BadInput([_problem(detail, subject) for detail in error.errors()]) from None


def load_summary(path: Path) -> VerificationSummary:
    """Read a summary from a JSON file and check it. Raises BadInput where it cannot be read, or is no summary."""
    try:
        return parse_summary(read_json(path), str(path))
    except OSError as error:
        raise BadInput([Problem(str(path), error.strerror or str(error), "a verification's summary", REMEDY)]) from None
    except ValueError as error:
        raise BadInput([Problem(str(path), f"no JSON ({error})", "a verification's summary", REMEDY)]) from None


def _problem(detail: Any, subject: str) -> Problem:
    return replace(wrong_value(f"{subject}: {place(detail['loc'])}", detail), remedy=REMEDY)
