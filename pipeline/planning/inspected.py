"""Inspection: what `headrace.inspect` returns; the values are those that `headrace inspect --json` prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from pipeline.printed import InOneLine, many
from pipeline.tensor.units import human_bytes


@dataclass(frozen=True)
class InspectedFile:
    """One file of a checkpoint, by its name."""

    file: str
    bytes: int


@dataclass(frozen=True)
class ModelSizes:
    """A model's sizes, by the names of Hugging Face's configurations; no experts are 0."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_size: int
    vocab_size: int
    max_position_embeddings: int
    num_experts: int = 0
    experts_per_token: int = 0


@dataclass(frozen=True)
class ConversionWay:
    """One way to convert a source.

    `options`: as the command line has them, "" for none. `becomes`: TensorRT-LLM's algorithm or the type; None where it is refused.
    `tp_sizes`: those that it can be cut to. `says`: all of it in words, with the reason where it is refused.
    """

    options: str
    becomes: str | None
    tp_sizes: tuple[int, ...]
    says: str


@dataclass(frozen=True, repr=False)
class Inspection(InOneLine):
    """The facts about a checkpoint that `inspect` reports.

    `family` and what follows from it (`model`, `tied_embeddings`, the sizes) are None or empty where headrace does not know the
    architecture, and `problems` says so. It can be cut to any of `tp_sizes` with any number of stages from `pp_sizes[0]` to
    `pp_sizes[1]`, and its experts to the pairs (tensor-parallel, expert-parallel) that `moe_sizes` has for a tp_size. `conversions`
    are the ways to convert it, that without options first; none where it cannot be opened as a model.
    """

    path: str
    kind: str
    architecture: str
    dtype: str
    tensors: int
    parameters: int
    bytes: int
    bytes_by_dtype: Mapping[str, int]
    files: tuple[InspectedFile, ...]
    quantization: str | None
    family: str | None
    problems: tuple[str, ...]
    model: ModelSizes | None = None
    tied_embeddings: bool | None = None
    tp_sizes: tuple[int, ...] = ()
    pp_sizes: tuple[int, ...] = ()
    moe_sizes: Mapping[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    conversions: tuple[ConversionWay, ...] = ()

    @property
    def convertible(self) -> bool:
        """Whether `convert` would take it, with no options but the source."""
        return not self.problems

    def _line(self) -> str:
        what = ", ".join(each for each in (self.architecture, self.quantization or self.dtype, human_bytes(self.bytes)) if each)
        wrong = f"; {many(len(self.problems), 'problem')}" if self.problems else ""
        return f"{self.path}: {what}{wrong}"

    def _rows(self) -> list[tuple[str, str]]:
        sizes = ", ".join(map(str, self.tp_sizes))
        return [
            ("source", f"{self.path} ({self.kind})"),
            ("architecture", f"{self.architecture}{f' (family {self.family})' if self.family else ''}"),
            ("type", self.dtype),
            ("quantization", self.quantization or ""),
            ("size", f"{human_bytes(self.bytes)}, {self.parameters:,} parameters in {many(self.tensors, 'tensor')}"),
            ("files", many(len(self.files), "file")),
            ("tp_size", sizes),
            ("pp_size", f"{self.pp_sizes[0]} to {self.pp_sizes[-1]}" if self.pp_sizes else ""),
            *((f"convert {way.options}".rstrip(), way.says) for way in self.conversions),
            *(("problem", problem) for problem in self.problems),
        ]


def as_inspection(facts: Mapping[str, Any]) -> Inspection:
    """The plain values of `pipeline.planning.inspection.inspect_source`, typed."""
    known = {each.name: facts[each.name] for each in fields(Inspection) if each.name in facts}
    pairs = {size: tuple((tp, ep) for tp, ep in pairs) for size, pairs in facts.get("moe_sizes", {}).items()}
    typed = {
        "files": tuple(InspectedFile(**file) for file in facts["files"]),
        "model": ModelSizes(**facts["model"]) if "model" in facts else None,
        "moe_sizes": pairs,
        "conversions": tuple(ConversionWay(**{**way, "tp_sizes": tuple(way["tp_sizes"])}) for way in facts.get("conversions", ())),
        **{name: tuple(facts.get(name, ())) for name in ("problems", "tp_sizes", "pp_sizes")},
    }
    return Inspection(**{**known, **typed})
