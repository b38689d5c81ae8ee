"""Verify a finished output without a GPU, on three levels: integrity, round trip, logits.

Integrity needs the output alone. The round trip compares every value with the source's. Logits are computed from the rank files as
TensorRT-LLM would, and compared with those of transformers running the source. Nothing is written; memory does not grow with the
model.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.errors import BadInput, Problem, VerificationFailed
from pipeline.model.kernels import generations
from pipeline.reporting.identity import identity
from pipeline.reporting.one_reading import match, read_once
from pipeline.reporting.tasks import Advance
from pipeline.tensor.bucket import object_size
from pipeline.tensor.checkpoint import Checkpoint
from pipeline.tensor.remote_path import is_remote
from pipeline.tensor.system_errors import refusing
from pipeline.tensor.tensors import Source, tensor_bytes
from pipeline.version import VERSION
from stages.read import find_source
from stages.read.ranks import open_checkpoint, refuse_source
from stages.read.tokenizer import open_tokenizer
from stages.verify.contract.integrity import checksums, headers
from stages.verify.roundtrip.scalars import check_scalars

TOKENS = 32  # random ones, where there is no prompt


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with an output. `level`: the one that found it, "integrity", "round trip" or "logits"."""

    level: str
    problem: Problem


@dataclass(frozen=True)
class Verification:
    """The result of a verification.

    Attributes
    ----------
    directory
        The output.
    source
        Where its source is; None where none was given.
    findings
        Everything that is wrong.
    integrity, round_trip, logits
        The facts of each level as plain values; None for one that was not run.
    seconds
        How long it took.
    output
        The marks that tell the output from others of its name: its `identity`.
    """

    directory: Path
    source: Path | None
    findings: tuple[Finding, ...]
    integrity: Mapping[str, Any]
    round_trip: Mapping[str, Any] | None
    logits: Mapping[str, Any] | None
    seconds: float
    output: Mapping[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    def check(self) -> None:
        """Raise VerificationFailed with every finding, where there is one."""
        if self.findings:
            raise VerificationFailed(finding.problem for finding in self.findings)

    def summary(self) -> dict[str, Any]:
        """The verification as plain values, as `headrace verify --json` prints it."""
        return {
            "directory": str(self.directory),
            "output": dict(self.output),
            "source": str(self.source) if self.source else None,
            "version": VERSION,
            "ok": self.ok,
            "seconds": round(self.seconds, 3),
            "findings": [
                {
                    "level": finding.level,
                    "subject": finding.problem.subject,
                    "found": finding.problem.found,
                    "expected": finding.problem.expected,
                    "remedy": finding.problem.remedy,
                }
                for finding in self.findings
            ],
            "integrity": dict(self.integrity),
            "round_trip": dict(self.round_trip) if self.round_trip else None,
            "logits": dict(self.logits) if self.logits else None,
        }


@refusing("the output or its source", "files that can be read")
def verify(
    directory: Path,
    source: Path | str | None = None,
    *,
    quant_ckpt_path: Path | None = None,
    logits: bool = False,
    prompt: str | None = None,
    tokens: int = TOKENS,
    sm: int | None = None,
    workers: int = 0,
    advance: Advance | None = None,
) -> Verification:
    """Verify a finished output; with `source`, compare its values with the source's; with `logits`, run both.

    Parameters
    ----------
    directory
        The output: config.json and its rank files.
    source
        The checkpoint that it was made of: a path, or a model on the Hugging Face Hub that is in the local cache.
    quant_ckpt_path
        The quantized checkpoint that the conversion took weights from, where there was one beside `source`.
    logits
        Whether to run the ranks and the source and compare their logits.
    prompt
        The text that logits are computed for; without one, random tokens.
    tokens
        The number of random tokens.
    sm
        The GPU generation (90 for SM 9.0) that the integer weights of an output without headrace.json are arranged for; default 80.
    workers
        Threads; 0 for one a core, at most 8.
    advance
        Called with (level, done, total) as the work goes on: bytes, values or steps.

    Returns
    -------
    Verification
        With a finding for each thing that is wrong; nothing is raised for these.

    Raises
    ------
    BadInput
        Where `directory` holds no checkpoint, there is no source where one is needed, or logits cannot be computed: what these need
        is looked at before a tensor is read.
    """
    started = time.perf_counter()
    workers = workers or min(os.cpu_count() or 1, 8)
    advance = advance or _silent
    if not _begun(directory):
        remedy = "Finish the conversion, or name its output directory"
        raise BadInput([Problem(str(directory), "no config.json", "a finished TensorRT-LLM checkpoint", remedy)])
    refuse_source(directory)
    if sm is not None and sm not in generations():
        raise BadInput([Problem("--sm", str(sm), f"one of {', '.join(map(str, generations()))}")])
    needing = [*(["--logits"] if logits else []), *([f"--quant_ckpt_path {quant_ckpt_path}"] if quant_ckpt_path else [])]
    if needing and source is None:
        expected = "the checkpoint that the ranks were made of"
        raise BadInput([Problem(each, "no source to compare with", expected, "Give --source") for each in needing])
    opened = _open_source(source, quant_ckpt_path) if source is not None else None
    location = opened.location if opened else None
    try:
        checkpoint = open_checkpoint(directory)
    except BadInput as error:
        findings = [Finding("integrity", problem) for problem in error.problems]
        facts = {"tensors": 0, "bytes": 0, "checksums": 0, "seconds": round(time.perf_counter() - started, 3)}
        return Verification(directory, location, tuple(findings), facts, None, None, time.perf_counter() - started)
    checkpoint = _arranged_for(checkpoint, sm)
    problems = list(headers(checkpoint))
    matched = match(checkpoint, opened) if opened and not problems else None
    ids = None
    if logits and opened and matched and not matched.problems:
        from stages.verify.forward.logits import check_runnable  # torch, which nothing else here needs

        ids = None if prompt is None else open_tokenizer(opened.location).encode(prompt)
        check_runnable(checkpoint, matched.original, ids, tokens)
    found, figures = read_once(checkpoint, matched, workers, advance)
    problems += found
    findings = [Finding("integrity", problem) for problem in problems]
    sizes = [tensor_bytes(tensor) for rank in checkpoint.ranks for tensor in rank.values()]
    integrity: dict[str, Any] = {"tensors": len(sizes), "bytes": sum(sizes), "checksums": sum(1 for _ in checksums(checkpoint))}
    round_trip: dict[str, Any] | None = None
    if opened and matched and not findings:
        # Tensors that are not where config.json says, or are damaged, are not compared.
        wrong = list(matched.problems) or list(check_scalars(checkpoint, matched.origins, opened.tensors))
        findings += [Finding("round trip", problem) for problem in (*wrong, *figures.problems(checkpoint))]
        round_trip = {"bytes": opened.nbytes, "tensors": figures.summary(checkpoint, matched.origins)}
    seconds = round(time.perf_counter() - started, 3)  # of one reading, for both
    integrity["seconds"] = seconds
    if round_trip is not None:
        round_trip["seconds"] = seconds
    computed = None
    if logits and opened and matched and round_trip is not None and not findings:
        # Where the values are the source's own, the source itself must compute the same.
        lossless = all(row["snr_db"] is None for row in round_trip["tensors"])
        from stages.verify.forward.logits import compare_logits

        try:
            problems, computed = compare_logits(checkpoint, matched.original, matched.origins, lossless, ids, tokens, advance)
        except VerificationFailed as error:
            problems = list(error.problems)
        findings += [Finding("logits", problem) for problem in problems]
    seconds = time.perf_counter() - started
    told = identity(checkpoint.provenance)
    return Verification(directory, location, tuple(findings), integrity, round_trip, computed, seconds, told)


def open_output(directory: Path) -> Checkpoint:
    """Open the headers of a finished output. Raises BadInput where it is none, or cannot be read."""
    return open_checkpoint(directory)


def _begun(directory: Path) -> bool:
    """Whether an output has its config.json."""
    mark = directory / "config.json"
    return object_size(str(mark)) is not None if is_remote(directory) else mark.is_file()


def _arranged_for(checkpoint: Checkpoint, sm: int | None) -> Checkpoint:
    """A checkpoint whose integer weights are arranged for a generation of GPUs. Raises BadInput where headrace.json has another."""
    if sm is None:
        return checkpoint
    if checkpoint.provenance and checkpoint.sm != sm:
        remedy = "Leave --sm out: it is for outputs of other converters"
        raise BadInput([Problem("--sm", str(sm), f"{checkpoint.sm}, as headrace.json says", remedy)])
    return replace(checkpoint, assumed_sm=sm)


def _silent(*_: Any) -> None:
    """Report no progress."""


def _open_source(source: Path | str, quant_ckpt_path: Path | None) -> Source:
    path = Path(source)
    return find_source(path if path.exists() else source, None, quant_ckpt_path, None, download=False)
