"""Load the table of `configs/runtime/`: what the classes of one release of TensorRT-LLM compute, load and arrange.

Planning refuses or adapts by it, and verification holds finished outputs against the same table (`pipeline.model.computes`).
Facts: docs/format/runtime-1.2.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from pipeline.model.table_files import load_table
from pipeline.model.tables import CONFIGS

TABLE = "tensorrt_llm-1.2"  # of the release that outputs are written for


@dataclass(frozen=True)
class ModelClass:
    """One of TensorRT-LLM's model classes.

    Parameters
    ----------
    name
        headrace's short name of it: "llama", "qwen", "phi" or "gemma".
    architectures
        The values of config.json's `architecture` that it takes.
    pipeline_stages
        Whether its layers can be split over pipeline stages.
    rope
        The kinds of `rotary_scaling` that it computes.
    long_rope
        Whether it reads the factors of long rope.
    derived_head_size
        Whether its heads are hidden_size / num_attention_heads wide, whatever config.json says.
    unscaled
        Architectures for which it would scale more layers than the model does, so that nothing may be scaled.
    head_norm_epsilon
        The epsilon of its q and k norms; 0 where the norms' own holds.
    """

    name: str
    architectures: tuple[str, ...]
    pipeline_stages: bool
    rope: tuple[str, ...]
    long_rope: bool
    derived_head_size: bool = False
    unscaled: tuple[str, ...] = ()
    head_norm_epsilon: float = 0.0


@dataclass(frozen=True)
class RopeKind:
    """A kind of `rotary_scaling`.

    `needs`: keys that must be there. `only`: the one value of a key that is computed. `because`: why a missing key matters.
    `overlooked`: keys that neither the class nor transformers reads, each with what other programs do of it.
    `length`: what the class takes for an original_max_position_embeddings that is missing; 0 where it takes none. `declared`: keys
    that a Hugging Face model has, as transformers has no value for them, where the class has.
    `position_embedding_type`: config.json's that goes with this kind, and with no other; "" for the usual one.
    `remedy`: what a plan advises. `section`: the fact's, in docs/format/runtime-1.2.md.
    """

    needs: tuple[str, ...]
    only: Mapping[str, Any] = field(default_factory=dict)
    overlooked: Mapping[str, str] = field(default_factory=dict)
    length: int = 0
    declared: tuple[str, ...] = ()
    position_embedding_type: str = ""
    because: str = ""
    remedy: str = ""
    section: str = ""


@dataclass(frozen=True)
class AttentionVariant:
    """The attention and norms that an algorithm puts in the place of a class's own.

    Parameters
    ----------
    name
        TensorRT-LLM's name of that attention.
    lacks
        The features that it does not compute.
    refused
        Those of them that no list of excluded modules brings back.
    exclude
        The list of excluded modules for a model with one of the others; () where the algorithm takes no list.
    plain
        The modules that a list must exclude for a feature to be computed; under "" those that every such list must.
    recipe
        The patterns that Meta's recipe excludes beside the list.
    remedy, section
        What a plan advises, and the fact's section in docs/format/runtime-1.2.md.
    """

    name: str
    lacks: tuple[str, ...]
    refused: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    plain: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    recipe: tuple[str, ...] = ()
    remedy: str = ""
    section: str = ""


@dataclass(frozen=True)
class WeightOrder:
    """The letters of the orders in which a GPU generation's kernels read integer weights: of a matrix, of a stack of experts."""

    matrix: str
    stack: str


@dataclass(frozen=True)
class LongAttention:
    """Attention that no class computes, and that is the plain one up to a length. `title`: what it is called. `length`: where the
    value of its key in a source's configuration says the length in tokens.
    """

    title: str
    length: str


@dataclass(frozen=True)
class Runtime:
    """The facts on one release of TensorRT-LLM.

    Parameters
    ----------
    release
        Its number, such as "1.2".
    classes
        The model class of each architecture.
    features
        What each architecture computes beyond a plain decoder.
    rope
        The kinds of rope by name.
    activations
        The activations of an MLP of two matrices; `activations_remedy`: what a plan advises.
    attention
        The attention of each algorithm that replaces a class's own.
    no_experts
        The algorithms in which it has no experts, each with the reason; `experts_remedy`: what a plan advises.
    always_plain
        The patterns of modules that are never quantized, which stand in every list of excluded modules.
    may_be_plain
        By algorithm, the modules that may stay in 16 bits beside codes, by the ends of their names.
    group_sizes
        The in-features that may share a scale, in the kernels of GPTQ and AWQ.
    grouped
        The algorithms of these kernels.
    misarranged
        The GPU generations for which its loader arranges AWQ's weights in another order than the kernels read.
    orders
        The order of each GPU generation (80 for SM 8.0).
    unserved
        By architecture that no family is for, the reason, and what would do.
    windows
        The key of `runtime_defaults` that holds the attention windows of the layers.
    causal
        By the key of a source's configuration, its value of models whose tokens see those before them alone.
    beyond_a_length
        By the key of a source's configuration, attention that no class computes beyond a length.
    """

    release: str
    classes: Mapping[str, ModelClass]
    features: Mapping[str, tuple[str, ...]]
    rope: Mapping[str, RopeKind]
    activations: tuple[str, ...]
    activations_remedy: str
    attention: Mapping[str, AttentionVariant]
    no_experts: Mapping[str, str]
    experts_remedy: str
    always_plain: tuple[str, ...]
    may_be_plain: Mapping[str, tuple[str, ...]]
    group_sizes: tuple[int, ...]
    grouped: tuple[str, ...]
    misarranged: tuple[int, ...]
    orders: Mapping[int, WeightOrder]
    unserved: Mapping[str, tuple[str, str]]
    windows: str
    causal: Mapping[str, bool]
    beyond_a_length: Mapping[str, LongAttention]


@cache
def runtime() -> Runtime:
    """Return the table of the release that outputs are written for."""
    data = load_table(CONFIGS / "runtime", TABLE)
    classes = [ModelClass(name, **_frozen(row)) for name, row in data["classes"].items()]
    attention: dict[str, AttentionVariant] = {}
    for name, row in data["attention"].items():
        values = _frozen(row)
        variant = AttentionVariant(**{key: value for key, value in values.items() if key != "algorithms"})
        attention |= dict.fromkeys(values.get("algorithms", (name,)), variant)
    return Runtime(
        release=data["release"],
        classes={architecture: each for each in classes for architecture in each.architectures},
        features=_frozen(data["features"]),
        rope={name: RopeKind(**_frozen(row)) for name, row in data["rope"].items()},
        activations=tuple(data["activations"]["gated"]),
        activations_remedy=data["activations"]["remedy"],
        attention=attention,
        no_experts=data["experts"]["refused"],
        experts_remedy=data["experts"]["remedy"],
        always_plain=tuple(data["plain"]["always"]),
        may_be_plain=_frozen(data["plain"]["modules"]),
        group_sizes=tuple(data["kernels"]["group_sizes"]),
        grouped=tuple(data["kernels"]["grouped"]),
        misarranged=tuple(data["kernels"]["misarranged"]),
        orders={int(sm): WeightOrder(**row) for sm, row in data["kernels"]["orders"].items()},
        unserved={name: (row["title"], row["remedy"]) for row in data["unserved"].values() for name in row["architectures"]},
        windows=data["windows"]["key"],
        causal=data["causal"],
        beyond_a_length={key: LongAttention(**row) for key, row in data["beyond_a_length"].items()},
    )


def _frozen(row: Mapping[str, Any]) -> dict[str, Any]:
    """A table with tuples for its lists, also those of the tables in it."""
    return {
        key: tuple(value) if isinstance(value, list) else _frozen(value) if isinstance(value, Mapping) else value
        for key, value in row.items()
    }
