"""Verify a finished output without a GPU, on three levels: integrity, round trip, logits.

Integrity needs the output alone. The round trip compares every value with the source's. Logits are computed from the rank files as
TensorRT-LLM would, and compared with those of transformers running the source. Nothing is written; memory does not grow with the
model.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import BadInput, Problem, VerificationFailed
from pipeline.planning.plans import VERSION
from pipeline.reporting.tasks import Advance, run_tasks
from pipeline.tensor.checkpoint import Checkpoint
from pipeline.tensor.system_errors import refusing
from pipeline.tensor.tensors import Source, tensor_bytes
from stages.read import find_source
from stages.read.ranks import open_checkpoint
from stages.read.tokenizer import open_tokenizer
from stages.verify.contract.integrity import check_tensor, checksums, headers
from stages.verify.forward.logits import compare_logits
from stages.verify.roundtrip.comparison import compare
from stages.verify.roundtrip.findings import FiguresByTensor
from stages.verify.roundtrip.matching import SourceMatch, match_source
from stages.verify.roundtrip.original import Original
from stages.verify.roundtrip.scalars import check_scalars
from stages.verify.roundtrip.settings import check_settings
from stages.verify.values import one_thread_each

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
    """

    directory: Path
    source: Path | None
    findings: tuple[Finding, ...]
    integrity: Mapping[str, Any]
    round_trip: Mapping[str, Any] | None
    logits: Mapping[str, Any] | None
    seconds: float

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
        Where `directory` holds no checkpoint, or there is no source where one is needed.
    """
    started = time.perf_counter()
    workers = workers or min(os.cpu_count() or 1, 8)
    advance = advance or _silent
    if not (directory / "config.json").is_file():
        remedy = "Finish the conversion, or name its output directory"
        raise BadInput([Problem(str(directory), "no config.json", "a finished TensorRT-LLM checkpoint", remedy)])
    if logits and source is None:
        raise BadInput(
            [Problem("--logits", "no source to compare with", "the checkpoint that the ranks were made of", "Give --source")]
        )
    opened = _open_source(source, quant_ckpt_path) if source is not None else None
    location = opened.location if opened else None
    try:
        checkpoint = open_checkpoint(directory)
    except BadInput as error:
        findings = [Finding("integrity", problem) for problem in error.problems]
        facts = {"tensors": 0, "bytes": 0, "checksums": 0, "seconds": round(time.perf_counter() - started, 3)}
        return Verification(directory, location, tuple(findings), facts, None, None, time.perf_counter() - started)
    with one_thread_each():
        findings, integrity = _integrity(checkpoint, workers, advance)
        round_trip = None
        if opened and not findings:
            # Tensors that are not where config.json says cannot be compared.
            differences, round_trip, original, matched = _round_trip(checkpoint, opened, workers, advance)
            findings += differences
    computed = None
    if logits and opened and round_trip is not None and not findings:
        # Where the values are the source's own, the source itself must compute the same.
        lossless = all(row["snr_db"] is None for row in round_trip["tensors"])
        ids = None if prompt is None else open_tokenizer(opened.location).encode(prompt)
        problems, computed = compare_logits(checkpoint, original, matched, lossless, ids, tokens, advance)
        findings += [Finding("logits", problem) for problem in problems]
    return Verification(directory, location, tuple(findings), integrity, round_trip, computed, time.perf_counter() - started)


def open_output(directory: Path) -> Checkpoint:
    """Open the headers of a finished output. Raises BadInput where it is none, or cannot be read."""
    return open_checkpoint(directory)


def _silent(*_: Any) -> None:
    """Report no progress."""


def _open_source(source: Path | str, quant_ckpt_path: Path | None) -> Source:
    path = Path(source)
    return find_source(path if path.exists() else source, None, quant_ckpt_path, None, download=False)


def _integrity(checkpoint: Checkpoint, workers: int, advance: Advance) -> tuple[list[Finding], dict[str, Any]]:
    """Check headers and checksums; returns the findings, and the facts of the level as plain values."""
    started = time.perf_counter()
    problems = list(headers(checkpoint))
    work = [(check_tensor, (checkpoint, rank, name), nbytes) for rank, name, nbytes in checksums(checkpoint)]
    problems += [problem for problem in run_tasks("integrity", work, workers, advance) if problem]
    sizes = [tensor_bytes(tensor) for rank in checkpoint.ranks for tensor in rank.values()]
    facts = {"tensors": len(sizes), "bytes": sum(sizes), "checksums": len(work), "seconds": round(time.perf_counter() - started, 3)}
    return [Finding("integrity", problem) for problem in problems], facts


def _round_trip(
    checkpoint: Checkpoint, source: Source, workers: int, advance: Advance
) -> tuple[list[Finding], dict[str, Any], Original, SourceMatch]:
    """Compare every value with the source's; returns the findings, the facts of the level, the source as numbers and the match."""
    started = time.perf_counter()
    options = checkpoint.provenance.get("options", {})
    # Where the conversion was told a factor of scaled positions, the source itself does not say one.
    told = {key: options[key] for key in ("rope_scaling_factor",) if key in options and source.container == "meta"}
    original = Original(replace(source, config={**source.config, **told}))
    shapes = {name: original.shape(name) for name in original.names()}
    matched = match_source(checkpoint, shapes, checkpoint.provenance.get("left_out", ()))
    options = checkpoint.provenance.get("options", {})
    problems = [*matched.problems, *check_settings(checkpoint.config, original.config, options)]
    figures_by_tensor = FiguresByTensor()
    if not problems:
        problems += check_scalars(checkpoint, (origin for task in matched.tasks for origin in task.origins), source.tensors)
        options = checkpoint.provenance.get("options", {})
        made = any(str(note).startswith("dequantized:") for note in checkpoint.provenance.get("notes", ()))
        kept = not (options.get("requantize") or options.get("dequantize") or made)
        work = [(compare, (checkpoint, original, task, kept), task.elements(shapes)) for task in matched.tasks]
        for figures in run_tasks("round trip", work, workers, advance):
            figures_by_tensor.add(figures)
        problems += figures_by_tensor.problems(checkpoint)
    facts = {
        "seconds": round(time.perf_counter() - started, 3),
        "bytes": source.nbytes,
        "tensors": figures_by_tensor.summary(checkpoint, matched.tasks),
    }
    return [Finding("round trip", problem) for problem in problems], facts, original, matched
