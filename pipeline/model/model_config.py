"""ModelConfig: a model's sizes and settings, read from config.json, GGUF metadata or params.json by the family's table.

config.json is read in both styles: top-level `rope_theta` / `rope_scaling` / `torch_dtype`, and transformers 5's
`rope_parameters` / `dtype` (docs/format/checkpoint.md, section 12).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from pipeline.errors import BadInput, Problem
from pipeline.model.config_values import assumed, family_settings, lookup, typed_value, wrong_type
from pipeline.model.multipliers import Multipliers
from pipeline.model.rotary import LONG_ROPE, MROPE, rotary_scaling, scaling_kind, two_values
from pipeline.model.tables import Family, layout


@dataclass(frozen=True)
class ModelConfig(Multipliers):
    """A model's sizes and settings; layout tables refer to them by the names of the attributes.

    Sizes count elements. `head_size` is 0 only while it is being read: it then becomes hidden_size / num_attention_heads.
    `tie_word_embeddings` is None where the source does not say. `settings`: values that only one family or layout has a use for.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    max_position_embeddings: int
    hidden_act: str
    norm_epsilon: float
    rotary_base: float
    rotary_scaling: Mapping[str, Any] | None = None
    rotary_pct: float = 1.0
    head_size: int = 0
    attn_bias: bool = False
    mlp_bias: bool = False
    residual_mlp: bool = False
    norm_bias: bool = False
    lm_head_bias: bool = False
    qk_norm: bool = False
    inter_layernorms: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    num_labels: int = 0
    tie_word_embeddings: bool | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def q_size(self) -> int:
        """Rows of the query projection."""
        return self.num_attention_heads * self.head_size

    @property
    def kv_size(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.num_key_value_heads * self.head_size

    @property
    def expert_intermediate_size(self) -> int:
        """Rows of an expert's first projection: `moe_intermediate_size` where the model has one, else `intermediate_size`."""
        return self.moe_intermediate_size or self.intermediate_size

    @property
    def rotary_embedding_dim(self) -> int:
        return int(self.head_size * self.rotary_pct)

    @property
    def own_head_size(self) -> int | None:
        """The size of a head where it is not the one that TensorRT-LLM computes of the other sizes, else None."""
        return self.head_size if self.head_size * self.num_attention_heads != self.hidden_size else None

    @property
    def rotary_type(self) -> str:
        """The kind of position scaling by the configuration's name, such as "llama3"; "default" for none."""
        return scaling_kind(self.rotary_scaling or {})

    @property
    def position_embedding_type(self) -> str:
        return "long_rope" if self.long_rope else "rope_gpt_neox"

    @property
    def plain_rotary_scaling(self) -> Mapping[str, Any] | None:
        """The scaling of rotary positions other than a long rope's, which has keys of its own."""
        return None if self.long_rope else self.rotary_scaling

    @property
    def mrope_scaling(self) -> Mapping[str, Any] | None:
        """The scaling of a model whose positions have several axes, as TensorRT-LLM reads it; another scaling as it is."""
        if self.rotary_type not in (MROPE, "default"):
            return self.rotary_scaling
        return {"type": MROPE, "mrope_section": self.settings.get("mrope_section")}

    @property
    def long_rope(self) -> Mapping[str, Any]:
        """The parameters of a long rope, such as Phi-3's two lists of factors; empty for any other kind of scaling."""
        scaling = dict(self.rotary_scaling or {}) if self.rotary_type in LONG_ROPE else {}
        if scaling and self.settings.get("original_positions") is not None:
            # Some files keep the original number of positions beside `rope_scaling` instead of inside it.
            scaling.setdefault("original_max_position_embeddings", self.settings["original_positions"])
        return scaling

    @property
    def normalization_mode(self) -> int:
        """1 (RENORMALIZE) where the weights of the chosen experts are scaled to a sum of 1, 0 (NONE) where they are not."""
        return int(bool(self.settings.get("norm_topk_prob")))

    def dimension(self, name: str) -> int:
        """Return a size by its name in layout tables; a number as text, such as "1", is returned as that number."""
        return int(name) if name.isdigit() else int(getattr(self, name))

    def value(self, name: str) -> Any:
        """Return the setting or else the field called `name`, None where there is neither; `a.b` is entry `b` of the table `a`."""
        table, _, key = name.partition(".")
        value = self.settings[table] if table in self.settings else getattr(self, table, None)
        return value.get(key) if key and isinstance(value, Mapping) else value


# The least and the greatest value of each size. Anything else is a mistake in the file, and could make planning take for ever.
_BOUNDS = {
    "vocab_size": (1, 1 << 31),
    "hidden_size": (1, 1 << 31),
    "num_hidden_layers": (1, 4096),
    "num_attention_heads": (1, 1 << 16),
    "num_key_value_heads": (1, 1 << 16),
    "intermediate_size": (1, 1 << 31),
    "max_position_embeddings": (1, 1 << 31),
    "head_size": (1, 1 << 20),
    "num_experts": (0, 4096),
    "experts_per_token": (0, 4096),
    "moe_intermediate_size": (0, 1 << 31),
    "shared_expert_intermediate_size": (0, 1 << 31),
    "num_labels": (0, 1 << 31),
}
_POSITIVE = ("norm_epsilon", "rotary_base", "embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
_NESTED = ("rotary_base", "rotary_pct")  # fields that the two styles of config.json have in other places
_NOT_BY_KEY = ("architecture", "rotary_scaling", "settings")  # fields that are not read through `family.fields`


def model_config(config: Mapping[str, Any], family: Family, architecture: str, file: str) -> ModelConfig:
    """Read a model's configuration by the family's `[model_config]` rows.

    Parameters
    ----------
    config
        The container's metadata: the object of config.json, GGUF's key-value pairs, or params.json.
    family
        The family, whose table says which keys hold which field.
    architecture
        The source's architecture, used where the family does not name its own.
    file
        The name of the configuration in messages.

    Raises
    ------
    BadInput
        Every key that is missing, has a value of another type or out of range, or contradicts another.
    """
    values: dict[str, Any] = {"architecture": family.architecture or architecture}
    problems = []
    for spec in fields(ModelConfig):
        if spec.name in _NOT_BY_KEY:
            continue
        keys = family.fields.get(spec.name, ())
        kind = str(spec.type).split(" |")[0]
        try:
            value = typed_value(config, keys, kind)
        except (TypeError, ValueError, OverflowError):
            problems.append(wrong_type(file, keys, config, kind))
            continue
        if value is not None and spec.name in family.divisors:
            value //= family.divisors[spec.name]
        if value is None:
            value = family.defaults.get(spec.name, assumed(config, family).get(spec.name))
        if value is not None:
            values[spec.name] = value
        elif spec.default is MISSING:
            problems.append(
                Problem(f"{file}: {' or '.join(keys) or spec.name}", "nothing", f"the model's {spec.name}", "Add the key")
            )
    values["rotary_scaling"], wrong = rotary_scaling(config, file)
    problems += wrong
    for name in _NESTED:
        said = {key: value for key in family.fields.get(name, ()) if (value := lookup(config, key)) is not None}
        problems += two_values(said, file)
    problems += _out_of_range(values, family, file)
    if problems:
        raise BadInput(problems)
    if not _has_experts(family):  # what a dense model's file says of experts is another model's
        values |= {"num_experts": 0, "experts_per_token": 0}
    if not values.get("head_size"):
        hidden, heads = values["hidden_size"], values["num_attention_heads"]
        if hidden % heads:
            remedy = "Give head_dim, or mend one of them"
            raise BadInput([Problem(f"{file}: hidden_size", str(hidden), f"a multiple of num_attention_heads = {heads}", remedy)])
        values["head_size"] = hidden // heads
    model = ModelConfig(**values, settings=family_settings(config, family))
    problems = [p for name, allowed in family.expect.items() for p in _unexpected(name, model, allowed, family, file)]
    problems += [p for name, range_ in family.numbers.items() for p in _no_number(name, model, range_, family, file)]
    if problems:
        raise BadInput(problems)
    return model


def _unexpected(name: str, model: ModelConfig, allowed: tuple[Any, ...], family: Family, file: str) -> list[Problem]:
    value = model.value(name)
    if value is None or value in allowed:
        return []
    keys = family.keys(name) or (name,)
    remedy = "TensorRT-LLM's model class has no other, so that the engine would compute something else"
    return [Problem(f"{file}: {' or '.join(keys)}", repr(value), " or ".join(map(repr, allowed)) or "null", remedy)]


def _no_number(name: str, model: ModelConfig, range_: str, family: Family, file: str) -> list[Problem]:
    value = model.value(name)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and (0 < value <= sys.float_info.max or (value == 0 and range_ == "of 0 or more")):
        return []
    return [Problem(f"{file}: {' or '.join(family.keys(name))}", repr(value), f"a number {range_}")]


def _has_experts(family: Family) -> bool:
    return any(module.experts for module in layout(family.layout).modules.values())


def _out_of_range(values: Mapping[str, Any], family: Family, file: str) -> list[Problem]:
    def subject(name: str) -> str:
        return f"{file}: {' or '.join(family.fields.get(name, (name,)))}"

    problems = [
        Problem(subject(name), str(values[name]), f"{low} to {high}")
        for name, (low, high) in _BOUNDS.items()
        if name in values and not low <= values[name] <= high
    ]
    for name in _POSITIVE:
        if name in values and not (math.isfinite(values[name]) and values[name] > 0):
            problems.append(Problem(subject(name), str(values[name]), "a number greater than 0"))
    if not 0 < values.get("rotary_pct", 1.0) <= 1:  # false for NaN too
        problems.append(Problem(subject("rotary_pct"), str(values["rotary_pct"]), "a share of a head: above 0, at most 1"))
    kv_heads = values.get("num_key_value_heads", 1)
    heads = values.get("num_attention_heads", kv_heads)
    if not problems and heads % kv_heads:
        problems.append(Problem(subject("num_key_value_heads"), str(kv_heads), f"a divisor of num_attention_heads = {heads}"))
    if _has_experts(family):
        experts, chosen = values.get("num_experts", 0), values.get("experts_per_token", 0)
        if experts < 2:
            expected = "2 or more: the model has experts, and TensorRT-LLM's class takes a single one for none"
            problems.append(Problem(subject("num_experts"), str(experts), expected))
        elif not 1 <= chosen <= experts:
            problems.append(Problem(subject("experts_per_token"), str(chosen), f"1 to {experts}, the number of experts"))
        for name in ("moe_intermediate_size", "shared_expert_intermediate_size"):
            if family.fields.get(name) and not values.get(name):
                found, expected = str(values.get(name, "nothing")), "1 or more: the class has experts of a size of their own"
                problems.append(Problem(subject(name), found, expected, "Give the size that their tensors have"))
    elif values.get("num_experts", 0) > 1:
        problems.append(
            Problem(subject("num_experts"), str(values["num_experts"]), "none: models of this architecture have no experts")
        )
    return problems
