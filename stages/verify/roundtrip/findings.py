"""What the round trip has found: figures by tensor, and what is wrong by name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import Problem
from pipeline.tensor.checkpoint import Checkpoint
from stages.verify.matrices import matrix
from stages.verify.roundtrip.figures import Figures
from stages.verify.roundtrip.matching import Task
from stages.verify.roundtrip.origin import cut_of

SCALES = ("per_channel_scale", "weights_scaling_factor", "zero", "prequant_scaling_factor")


@dataclass
class Found:
    """Figures of each rank's tensors, and the tensors of the source that they are of."""

    figures: dict[tuple[int, str], Figures] = field(default_factory=lambda: defaultdict(Figures))

    def add(self, figures: Mapping[tuple[int, str], Figures]) -> None:
        """Count what a task has found."""
        for key, each in figures.items():
            self.figures[key].add(each)

    def problems(self, checkpoint: Checkpoint) -> list[Problem]:
        """Each rank's tensor that is not what it stands for, by name, with the parameters that its numbers are computed with."""
        result = []
        for (rank, tensor), figures in sorted(self.figures.items()):
            if figures.first is None:
                continue
            where, got, wanted = figures.first
            module = tensor.rpartition(".")[0]
            scales = [name for name in SCALES if f"{module}.{name}" in checkpoint.ranks[rank]] if tensor.endswith(".weight") else []
            computed = f" (computed with {', '.join(scales)})" if scales else ""
            found = f"{figures.wrong:,} of {figures.elements:,} values off, the first {got:.7g} at {where}{computed}"
            result.append(Problem(f"rank{rank}.safetensors: {tensor}", found, f"{wanted:.7g} there, by the source"))
        return result

    def summary(self, checkpoint: Checkpoint, tasks: Iterable[Task]) -> list[dict[str, Any]]:
        """Figures by tensor over all ranks, as plain values: layers by their number in the model."""
        cut = cut_of(checkpoint.config)
        first = [stage.start for stage in cut.stages()]
        sources: dict[tuple[int, str], dict[str, None]] = defaultdict(dict)
        for task in tasks:
            for piece in task.pieces:
                sources[piece.rank, piece.tensor][task.name] = None
        joined: dict[str, tuple[Figures, list[int], dict[str, None]]] = {}
        for (rank, tensor), figures in sorted(self.figures.items()):
            name = global_name(tensor, first[rank // cut.tp])
            whole, ranks, names = joined.setdefault(name, (Figures(), [], {}))
            whole.add(figures)
            ranks.append(rank)
            names.update(sources[rank, tensor])
        rows = []
        for name, (figures, ranks, names) in joined.items():
            layer, kind = layer_and_kind(name)
            local = name if layer is None else name.replace(f".{layer}.", f".{layer - first[ranks[0] // cut.tp]}.", 1)
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
    """What a tensor's values are stored as: a Matrix's `kind`."""
    shape = checkpoint.ranks[rank][tensor].shape
    if not tensor.endswith(".weight") or len(shape) < 2:
        return "dense"
    return matrix(checkpoint, rank, tensor.removesuffix(".weight"), 0 if len(shape) == 3 else None).kind


def global_name(tensor: str, first: int) -> str:
    """A rank's tensor by the layer's number in the model, where its stage begins with layer `first`."""
    layer, _ = layer_and_kind(tensor)
    return tensor if layer is None else tensor.replace(f".{layer}.", f".{layer + first}.", 1)


def layer_and_kind(tensor: str) -> tuple[int | None, str]:
    """The layer in a tensor's name, and its module without it; a bias says so."""
    parts = tensor.split(".")
    bias = " bias" if parts[-1] == "bias" else ""
    if parts[:2] == ["transformer", "layers"]:
        return int(parts[2]), ".".join(parts[3:-1]) + bias
    return None, parts[-2] + bias
