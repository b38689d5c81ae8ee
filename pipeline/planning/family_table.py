"""List the families: of each the kind of source, what its ranks can be, and what they were compared with. `headrace families`.

The targets follow from the table of what TensorRT-LLM's classes compute (docs/format/runtime-1.2.md, sections a and c).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.model.computes import EXPERTS
from pipeline.model.runtime import runtime
from pipeline.model.tables import Family, families, layout
from pipeline.planning.quantizations import QUANTIZATIONS
from stages.quantization.modules import linear
from stages.read.text_part import wrappers

# What `proof` of a family's table says.
PROOFS: Mapping[str, str] = {
    "converter": "NVIDIA's converter 0.17, its files byte for byte",
    "transformers": "transformers' class, logit for logit",
    "modelling code": "its published modelling code, logit for logit",
    "the same model": "the same model in Hugging Face's files, byte for byte",
}
MLP_ALONE = "(MLP alone)"


def list_families() -> list[dict[str, Any]]:
    """Every family of `configs/families`.

    Each has its name, the kind of source, the architectures that it is for, TensorRT-LLM's class and the layout for it, the values
    of `--quantization` that its ranks can have (`targets`), whether they can have pipeline stages, and what they were compared with
    (`proof`).
    """
    return [_row(family) for family in families()]


def list_texts() -> dict[str, str]:
    """Every wrapper whose text is converted, with its text's architecture; "" for the one that its configuration says."""
    return dict(wrappers())


def _row(family: Family) -> dict[str, Any]:
    architecture = family.architecture or family.architectures[0]
    own = runtime().classes.get(architecture)
    return {
        "family": family.name,
        "source": family.container,
        "architectures": list(family.architectures),
        "class": own.name if own else None,
        "layout": family.layout,
        "targets": list(_targets(family, architecture)),
        "pipeline_stages": bool(own and own.pipeline_stages),
        "proof": [PROOFS[word] for word in family.proof],
    }


def _targets(family: Family, architecture: str) -> Iterator[str]:
    target = layout(family.layout)
    features = {*runtime().features.get(architecture, ())}
    features |= {EXPERTS} if any(module.experts for module in target.modules.values()) else set()
    rows = ((slot, row) for row in family.rename.values() for to in row.to if (slot := target.find(to.format(layer=0, expert=0))))
    moved = any(row.operation and linear(slot.module) for slot, row in rows)  # whose codes cannot be kept
    for name, named in QUANTIZATIONS.items():
        variant = runtime().attention.get(named.algorithm or "")
        lacking = features & set(variant.lacks) if variant else set()
        # Experts that a container stacks are no modules of transformers', which a calibration would know.
        if named.kind_of or (named.measured and EXPERTS in features and family.container != "huggingface"):
            continue
        if named.calibrated and (family.container != "huggingface" or moved):
            continue
        if (EXPERTS in features and named.algorithm in runtime().no_experts) or (variant and lacking & set(variant.refused)):
            continue
        yield f"{name} {MLP_ALONE}" if lacking else name
