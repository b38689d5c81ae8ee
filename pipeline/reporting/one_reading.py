"""Read an output once, and its source, for what the first two levels of a verification say of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.errors import Problem
from pipeline.model.unsaid import TOLD
from pipeline.reporting.tasks import Advance, run_tasks
from pipeline.tensor.checkpoint import Checkpoint
from pipeline.tensor.tensors import Source
from stages.verify.contract.integrity import check_tensor, checksums
from stages.verify.roundtrip.findings import FiguresByTensor
from stages.verify.roundtrip.matching import match_source
from stages.verify.roundtrip.origin import Origin
from stages.verify.roundtrip.original import Original
from stages.verify.roundtrip.settings import check_settings
from stages.verify.roundtrip.walk import check_part, tensor_parts


@dataclass(frozen=True)
class MatchedSource:
    """A source as numbers, and where the checkpoint's values come from.

    `kept`: the codes of a packed source are in the rank files unchanged. `problems`: those of names and shapes, by which no value
    can be compared. `settings`: those of config.json.
    """

    original: Original
    origins: tuple[Origin, ...]
    kept: bool
    problems: tuple[Problem, ...]
    settings: tuple[Problem, ...] = ()


def match(checkpoint: Checkpoint, source: Source) -> MatchedSource:
    """Match a checkpoint with its source by names, shapes and settings."""
    options, notes = checkpoint.provenance.get("options", {}), checkpoint.provenance.get("notes", ())
    # What the conversion was told, the source itself does not say.
    told = {key: options[key] for key in TOLD.get(source.container, ()) if key in options}
    original = Original(replace(source, config={**source.config, **told}))
    shapes = {name: original.shape(name) for name in original.names()}
    matched = match_source(checkpoint, shapes, checkpoint.provenance.get("left_out", ()))
    settings = tuple(check_settings(checkpoint.config, original.config, options))
    made = any(str(note).startswith("dequantized:") for note in notes)
    kept = not (options.get("requantize") or options.get("dequantize") or made)
    return MatchedSource(original, matched.origins, kept, matched.problems, settings)


def read_once(
    checkpoint: Checkpoint, matched: MatchedSource | None, workers: int, advance: Advance
) -> tuple[list[Problem], FiguresByTensor]:
    """Read every tensor, for its checksums and, where the source is known, its values: what is wrong with bytes, and the figures.

    Where names and shapes do not match, values are not compared.
    """
    figures = FiguresByTensor()
    if matched is None or matched.problems:
        work = [(check_tensor, (checkpoint, rank, name), nbytes) for rank, name, nbytes in checksums(checkpoint)]
        return [problem for problem in run_tasks("integrity", work, workers, advance) if problem], figures

    def both(_: str, done: int, total: int) -> None:
        for level in ("integrity", "round trip"):
            advance(level, done, total)

    parts = tensor_parts(checkpoint, matched.original, matched.origins)
    reading = [(check_part, (checkpoint, matched.original, matched.kept, part), part.nbytes * len(part.ranks)) for part in parts]
    damaged: dict[tuple[int, str], tuple[int, Problem]] = {}  # the first part of each tensor
    for rank, name, start, problem, found in (each for some in run_tasks("round trip", reading, workers, both) for each in some):
        key = (rank, name)
        if problem and (key not in damaged or start < damaged[key][0]):
            damaged[key] = (start, problem)
        if found is not None:
            figures.add({key: found})
    return [problem for _, problem in damaged.values()], figures
