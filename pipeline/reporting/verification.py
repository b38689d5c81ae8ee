"""Prove a finished output right, without a GPU: integrity, round trip, logits.

Integrity needs the output alone. The round trip compares every value with the source's. Logits are computed from the rank files as
TensorRT-LLM would and compared with transformers running the source. Nothing is written; memory does not grow with the model.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import BadInput, Problem, VerificationFailed
from pipeline.planning.plans import VERSION
from pipeline.run.schedulers import run_threads
from pipeline.tensor.checkpoint import Checkpoint
from pipeline.tensor.tensors import Source
from stages.read import find_source
from stages.read.ranks import open_checkpoint
from stages.verify.contract.integrity import check_tensor, checksums, headers
from stages.verify.roundtrip.comparison import compare
from stages.verify.roundtrip.findings import Found
from stages.verify.roundtrip.matching import Trip, trip
from stages.verify.roundtrip.original import Original
from stages.verify.roundtrip.scalars import check_scalars

if TYPE_CHECKING:
    from torch import Tensor

Advance = Callable[[str, int, int], None]  # (level, bytes or values done, in all)

# Of the largest logit: float32 sums in another order, over as many layers as models have.
ROUNDING = 1e-3
TOKENS = 32
CACHE_BYTES = 2 << 30  # of weights as numbers that generation may keep: small models need not be read for each token


@dataclass(frozen=True)
class Finding:
    """Something wrong, and the level that saw it."""

    level: str
    problem: Problem


@dataclass(frozen=True)
class Verification:
    """What was looked at and what was found; `summary()` has it all as plain values."""

    directory: Path
    source: Path | None
    findings: tuple[Finding, ...]
    integrity: Mapping[str, Any]
    round_trip: Mapping[str, Any] | None
    logits: Mapping[str, Any] | None
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.findings

    def check(self) -> None:
        """Raise VerificationFailed with every finding, where there is one."""
        if self.findings:
            raise VerificationFailed(finding.problem for finding in self.findings)

    def summary(self) -> dict[str, Any]:
        """What `headrace verify --json` prints."""
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
    """Look at a finished output; with `source`, compare it with what it was made of; with `logits`, run both.

    `prompt` is what the logits are computed for; without it, `tokens` random ones. Findings are in the result: nothing is raised
    for them. Raises BadInput where there is no checkpoint at `directory`, or no source where one is needed.
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
    opened = _opened_source(source, quant_ckpt_path) if source is not None else None
    location = opened.location if opened else None
    try:
        checkpoint = open_checkpoint(directory)
    except BadInput as error:
        findings = [Finding("integrity", problem) for problem in error.problems]
        facts = {"tensors": 0, "bytes": 0, "checksums": 0, "seconds": round(time.perf_counter() - started, 3)}
        return Verification(directory, location, tuple(findings), facts, None, None, time.perf_counter() - started)
    with _one_thread_each():
        findings, integrity = _integrity(checkpoint, workers, advance)
        round_trip = None
        if opened and not findings:
            # What is not where config.json says it is cannot be compared.
            more, round_trip, original, matched = _round_trip(checkpoint, opened, workers, advance)
            findings += more
    computed = None
    if logits and opened and round_trip is not None and not findings:
        more, computed = _logits(checkpoint, opened, original, matched, round_trip, prompt, tokens, advance)
        findings += more
    return Verification(directory, location, tuple(findings), integrity, round_trip, computed, time.perf_counter() - started)


def open_output(directory: Path) -> Checkpoint:
    """A finished output's headers. Raises BadInput where it is none, or cannot be read."""
    return open_checkpoint(directory)


def _silent(*_: Any) -> None:
    """Nobody looks on."""


def _opened_source(source: Path | str, quant_ckpt_path: Path | None) -> Source:
    path = Path(source)
    return find_source(path if path.exists() else source, None, quant_ckpt_path, None, download=False)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Tasks are what runs at once, not the parts of one operation."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run(
    level: str, work: Iterable[tuple[Callable[..., Any], tuple[Any, ...], int]], workers: int, advance: Advance
) -> Iterator[Any]:
    """Run functions as Dask tasks and yield what they return. Each counts for some bytes of the progress."""
    from dask._task_spec import Task

    graph: dict[Any, Any] = {}
    sizes = []
    for number, (function, arguments, size) in enumerate(work):
        key = (level, function.__name__, number)
        graph[key] = Task(key, _numbered, number, function, *arguments)
        sizes.append(size)
    done, total = 0, sum(sizes)
    results: Iterator[Any] = run_threads(graph, workers)
    for number, value in results:
        done += sizes[number]
        advance(level, done, total)
        yield value


def _numbered(number: int, function: Callable[..., Any], *arguments: Any) -> tuple[int, Any]:
    return number, function(*arguments)


def _integrity(checkpoint: Checkpoint, workers: int, advance: Advance) -> tuple[list[Finding], dict[str, Any]]:
    started = time.perf_counter()
    problems = list(headers(checkpoint))
    work = [(check_tensor, (checkpoint, rank, name), nbytes) for rank, name, nbytes in checksums(checkpoint)]
    problems += [problem for problem in _run("integrity", work, workers, advance) if problem]
    sizes = [_nbytes(tensor) for rank in checkpoint.ranks for tensor in rank.values()]
    facts = {"tensors": len(sizes), "bytes": sum(sizes), "checksums": len(work), "seconds": round(time.perf_counter() - started, 3)}
    return [Finding("integrity", problem) for problem in problems], facts


def _nbytes(tensor: Any) -> int:
    from pipeline.tensor.tensors import tensor_bytes

    return tensor_bytes(tensor)


def _round_trip(
    checkpoint: Checkpoint, source: Source, workers: int, advance: Advance
) -> tuple[list[Finding], dict[str, Any], Original, Trip]:
    started = time.perf_counter()
    original = Original(source)
    shapes = {name: original.shape(name) for name in original.names()}
    matched = trip(checkpoint, shapes, checkpoint.provenance.get("left_out", ()))
    problems = list(matched.problems)
    found = Found()
    if not problems:
        problems += check_scalars(checkpoint, (piece for task in matched.tasks for piece in task.pieces), source.tensors)
        options = checkpoint.provenance.get("options", {})
        kept = not (options.get("requantize") or options.get("dequantize"))
        work = [(compare, (checkpoint, original, task, kept), task.elements(shapes)) for task in matched.tasks]
        for figures in _run("round trip", work, workers, advance):
            found.add(figures)
        problems += found.problems(checkpoint)
    facts = {
        "seconds": round(time.perf_counter() - started, 3),
        "bytes": source.nbytes,
        "tensors": found.summary(checkpoint, matched.tasks),
    }
    return [Finding("round trip", problem) for problem in problems], facts, original, matched


def _logits(
    checkpoint: Checkpoint,
    source: Source,
    original: Original,
    matched: Trip,
    round_trip: Mapping[str, Any],
    prompt: str | None,
    count: int,
    advance: Advance,
) -> tuple[list[Finding], dict[str, Any]]:
    from stages.verify.forward.agreement import agreement
    from stages.verify.forward.decoder import Decoder
    from stages.verify.forward.joined import Joined
    from stages.verify.forward.reference import Reference

    started = time.perf_counter()
    ids = _tokens(checkpoint, source, prompt, count)
    # Where the values are the source's own, the source itself must compute the same.
    lossless = all(row["snr_db"] is None for row in round_trip["tensors"])
    steps = 2 if lossless else 3
    decoder = Decoder(checkpoint)
    ours = decoder.logits(ids)
    advance("logits", 1, steps)
    theirs = Reference(original.config, original).logits(ids)
    advance("logits", 2, steps)
    comparisons = [{"against": "source", **agreement(ours, theirs), "bound": ROUNDING if lossless else None}]
    if not lossless:
        shapes = {name: original.shape(name) for name in original.names()}
        joined = Joined(checkpoint, (piece for task in matched.tasks for piece in task.pieces), shapes)
        theirs = Reference(original.config, joined).logits(ids)
        comparisons.append({"against": "joined ranks", **agreement(ours, theirs), "bound": ROUNDING})
        advance("logits", 3, steps)
    findings = [
        Finding("logits", Problem(str(checkpoint.directory), _apart(each), f"at most {each['bound']:g} of the largest logit"))
        for each in comparisons
        if each["bound"] is not None and not each["max_relative"] <= each["bound"]
    ]
    findings += [
        Finding("logits", Problem(name, "a tensor that the model's computation does not use", "none")) for name in decoder.unused()
    ]
    return findings, {
        "tokens": len(ids),
        "seconds": round(time.perf_counter() - started, 3),
        "comparisons": comparisons,
    }


def _apart(figures: Mapping[str, Any]) -> str:
    return (
        f"logits that differ by {figures['max_relative']:.2g} of the largest from those of transformers "
        f"running the {figures['against']}"
    )


def generate_text(
    directory: Path, prompt: str, tokenizer: Path | None = None, count: int = 24, temperature: float = 0.0, seed: int = 0
) -> Iterator[str]:
    """The prompt, then what the ranks continue it with, piece by piece.

    The tokenizer is looked for in the output, then in the source that headrace.json names. Raises BadInput where there is none.
    """
    import torch

    from stages.read.tokenizer import open_tokenizer
    from stages.verify.forward.decoder import Decoder
    from stages.verify.forward.generation import generate

    checkpoint = open_checkpoint(directory)
    beside = directory / "tokenizer.json"
    recorded = checkpoint.provenance.get("source", {}).get("path")
    words = open_tokenizer(tokenizer or (directory if beside.exists() or not recorded else Path(recorded)))
    tokens = words.encode(prompt)
    decoder = Decoder(checkpoint, cache_bytes=CACHE_BYTES)
    stop = () if words.eos_token_id is None else (words.eos_token_id,)
    said = words.decode(tokens)
    yield said
    for token in generate(decoder, torch.tensor(tokens), count, temperature=temperature, seed=seed, stop=stop):
        tokens.append(token)
        # A token may be a part of a character: what is new of the whole text is said.
        text = words.decode(tokens)
        if not text.endswith("\ufffd"):
            yield text[len(said) :]
            said = text


def _tokens(checkpoint: Checkpoint, source: Source, prompt: str | None, count: int) -> Tensor:
    """The prompt's tokens, or random ones, the same every time."""
    import torch

    if prompt is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(checkpoint.config["vocab_size"], (count,), generator=generator)
    from stages.read.tokenizer import open_tokenizer

    return torch.tensor(open_tokenizer(source.location).encode(prompt))
