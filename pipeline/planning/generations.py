"""For which GPUs a target's integer weights are: what a plan refuses and says of it.

Facts: docs/format/runtime-1.2.md, sections d to d4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.errors import Problem
from pipeline.model.kernels import ANY, alike
from pipeline.model.quantization import AWQ, GROUPWISE, WEIGHT_ONLY, Quantization
from pipeline.model.runtime import runtime
from pipeline.planning.job import Job


def no_generation(algorithm: str | None, sm: int | str, kept: bool) -> list[Problem]:
    """Refuse `any` where weights cannot be left without an order: the loader arranges no codes but AWQ's groups of them.

    `kept`: the source's own codes would be; those of a scale a row it would make of numbers anew.
    """
    if sm != ANY or not (algorithm in GROUPWISE or (kept and algorithm in WEIGHT_ONLY)):
        return []
    expected = "the GPU's generation, such as 90: the loader takes these codes as they are, in the order of one"
    remedy = "Or quantize numbers at build: --dequantize --use_weight_only --sm any, which adds error"
    return [Problem(f"--sm {ANY}", f"{algorithm} codes", expected, remedy)]


def generation_notes(job: Job, chosen: Sequence[Quantization]) -> tuple[str, ...]:
    """Notes on the GPUs that the integer weights of a plan's targets are for, each once."""
    tables = job.target or ({},)
    notes = (
        note
        for table, quantization in zip(tables, chosen, strict=True)
        for note in _notes(quantization, named="sm" in table or "sm" in job.model_fields_set)
    )
    return tuple(dict.fromkeys(notes))


def _notes(quantization: Quantization, named: bool) -> Iterator[str]:
    sm = quantization.sm
    if quantization.left_to_loader:
        yield (
            f"weights are numbers: TensorRT-LLM's loader quantizes them as {quantization.algorithm} when an engine is built, "
            "for the builder's own GPU; the ranks are as large as unquantized ones"
        )
    wrong = runtime().misarranged
    if quantization.algorithm == AWQ and (sm == ANY or sm in wrong):
        yield (
            f"TensorRT-LLM {runtime().release}'s loader arranges {AWQ} weights wrongly on GPUs of {_listed(wrong)} (until "
            "pull request 11561): build for these with a later release, or give --dequantize --use_weight_only"
        )
    if quantization.ordered and not named and isinstance(sm, int):
        yield (
            f"integer weights are in the order that GPUs of generation {_listed(alike(sm))} read (--sm {sm}, the default): "
            "give --sm for engines on others"
        )


def _listed(numbers: Sequence[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last
