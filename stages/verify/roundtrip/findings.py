"""Results of the round trip: figures by tensor, and a problem for each tensor that is wrong."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import Problem
from pipeline.tensor.checkpoint import Checkpoint
from stages.verify.matrices import matrix
from stages.verify.roundtrip.figures import Figures
from stages.verify.roundtrip.model_split import model_split
from stages.verify.roundtrip.origin import Origin

SCALES = ("per_channel_scale", "weights_scaling_factor", "zero", "prequant_scaling_factor")
ARRANGED = ("weight-only", "groupwise")  # kinds of matrices whose codes are in the order of some GPUs


@dataclass
class FiguresByTensor:
    """The figures of each rank's tensors, by (rank, tensor's name)."""

    figures: dict[tuple[int, str], Figures] = field(default_factory=lambda: defaultdict(Figures))

    def add(self, figures: Mapping[tuple[int, str], Figures]) -> None:
        """Add the figures of one task."""
        for key, each in figures.items():
            self.figures[key].add(each)

    def problems(self, checkpoint: Checkpoint) -> list[Problem]:
        """A problem for each rank's tensor with values that are off, naming the parameters that its numbers are computed with."""
        result = []
        for (rank, tensor), figures in sorted(self.figures.items()):
            if figures.first is None:
                continue
            place, actual, expected = figures.first
            module = tensor.rpartition(".")[0]
            scales = [name for name in SCALES if f"{module}.{name}" in checkpoint.ranks[rank]] if tensor.endswith(".weight") else []
            computed = f" (computed with {', '.join(scales)})" if scales else ""
            found = f"{figures.wrong:,} of {figures.elements:,} values off, the first {actual:.7g} at {place}{computed}"
            # Which GPUs the codes are arranged for, only headrace.json says.
            guessed = not checkpoint.provenance and storage(checkpoint, rank, tensor) in ARRANGED
            remedy = f"If the files are for other GPUs than SM {checkpoint.sm}, say for which: --sm" if guessed else ""
            result.append(Problem(f"rank{rank}.safetensors: {tensor}", found, f"{expected:.7g} there, by the source", remedy))
        return result

    def summary(self, checkpoint: Checkpoint, origins: Iterable[Origin]) -> list[dict[str, Any]]:
        """The figures of each tensor over all ranks, as plain values; layers have their number in the model."""
        split = model_split(checkpoint.config)
        first = [stage.start for stage in split.stages()]
        sources: dict[tuple[int, str], dict[str, None]] = defaultdict(dict)
        for origin in origins:
            sources[origin.rank, origin.tensor][origin.source] = None
        joined: dict[str, tuple[Figures, list[int], dict[str, None]]] = {}
        for (rank, tensor), figures in sorted(self.figures.items()):
            name = global_name(tensor, first[rank // split.tp])
            whole, ranks, names = joined.setdefault(name, (Figures(), [], {}))
            whole.add(figures)
            ranks.append(rank)
            names.update(sources[rank, tensor])
        rows = []
        for name, (figures, ranks, names) in joined.items():
            layer, kind = layer_and_kind(name)
            local = name if layer is None else name.replace(f".{layer}.", f".{layer - first[ranks[0] // split.tp]}.", 1)
            rows.append(
                {
                    "name": name,
                    "layer": layer,
                    "kind": kind,
                    "ranks": ranks,
                    "storage": storage(checkpoint, ranks[0], local),
                    **figures.summary(),
                    "sources": [each for each in names if each][:8],
                }
            )
        return sorted(rows, key=lambda row: (row["layer"] is not None, row["layer"] or 0, row["name"]))


def storage(checkpoint: Checkpoint, rank: int, tensor: str) -> str:
    """How a tensor's values are stored: the `kind` of a `Matrix`."""
    shape = checkpoint.ranks[rank][tensor].shape
    if not tensor.endswith(".weight") or len(shape) < 2:
        return "dense"
    return matrix(checkpoint, rank, tensor.removesuffix(".weight"), 0 if len(shape) == 3 else None).kind


def global_name(tensor: str, first: int) -> str:
    """The name of a rank's tensor with the layer's number in the model; the rank's stage begins with layer `first`."""
    layer, _ = layer_and_kind(tensor)
    return tensor if layer is None else tensor.replace(f".{layer}.", f".{layer + first}.", 1)


def layer_and_kind(tensor: str) -> tuple[int | None, str]:
    """The layer in a tensor's name, None outside the layers, and its module without it; a bias's ends with " bias"."""
    parts = tensor.split(".")
    bias = " bias" if parts[-1] == "bias" else ""
    if parts[:2] == ["transformer", "layers"]:
        return int(parts[2]), ".".join(parts[3:-1]) + bias
    return None, parts[-2] + bias
