"""ModelConfig: a model's sizes and settings, from config.json, GGUF metadata or params.json by the family's table.

config.json is read in both styles: top-level `rope_theta` / `rope_scaling` / `torch_dtype`, and transformers 5's
`rope_parameters` / `dtype` (checkpoint-format, section 12).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from pipeline.errors import BadInput, Problem
from pipeline.model.rotary import LONG_ROPE, rotary_scaling
from pipeline.model.tables import Family, layout


@dataclass(frozen=True)
class ModelConfig:
    """What the layout's tables may name. Sizes count elements; `head_size` 0 means hidden_size / num_attention_heads."""

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
        """Rows of an expert's first projection: of its own size where the model has one."""
        return self.moe_intermediate_size or self.intermediate_size

    @property
    def rotary_embedding_dim(self) -> int:
        return int(self.head_size * self.rotary_pct)

    @property
    def rotary_type(self) -> str:
        """How positions are scaled, as the configuration names it; "default" for not at all."""
        scaling = self.rotary_scaling or {}
        return str(scaling.get("rope_type", scaling.get("type", "default")))

    @property
    def position_embedding_type(self) -> str:
        return "long_rope" if self.long_rope else "rope_gpt_neox"

    @property
    def long_rope(self) -> Mapping[str, Any]:
        """What a long rope says of itself (Phi-3's two lists of factors); nothing where positions are scaled otherwise."""
        scaling = dict(self.rotary_scaling or {}) if self.rotary_type in LONG_ROPE else {}
        if scaling and "original_positions" in self.settings:
            # Some files keep beside `rope_scaling` how many positions the model was trained on before.
            scaling.setdefault("original_max_position_embeddings", self.settings["original_positions"])
        return scaling

    @property
    def scaled_attention_multiplier(self) -> float:
        """As TensorRT-LLM counts it, on top of its own 1 / sqrt(head_size). The reference forgets that where the model says 1."""
        return self.attention_multiplier * math.sqrt(self.head_size)

    @property
    def normalization_mode(self) -> int:
        """Whether the weights of the chosen experts are brought to a sum of 1 (TensorRT-LLM's RENORMALIZE) or left (NONE)."""
        return int(bool(self.settings.get("norm_topk_prob")))

    @property
    def output_multiplier_scale(self) -> float:
        return 1 / self.logits_scaling

    def dimension(self, name: str) -> int:
        """A size by the name that layout tables use; a number stands for itself."""
        return int(name) if name.isdigit() else int(getattr(self, name))

    def value(self, name: str) -> Any:
        """What config.json's template and the tables call `name`: one of the settings, or a field; `a.b` is `b` of the table `a`.

        None where there is neither.
        """
        table, _, key = name.partition(".")
        value = self.settings[table] if table in self.settings else getattr(self, table, None)
        return value.get(key) if key and isinstance(value, Mapping) else value


# The least and the greatest of each size: beyond, it is a mistake, and every layer and expert would be planned for nothing.
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
}
_POSITIVE = ("norm_epsilon", "rotary_base", "embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
_NOT_BY_KEY = ("architecture", "rotary_scaling", "settings")  # found in their own ways


def model_config(config: Mapping[str, Any], family: Family, architecture: str, file: str) -> ModelConfig:
    """Read a model's configuration by the family's `[model_config]` rows.

    Raises BadInput naming `file` and every key that is missing, has another type than expected, or contradicts another.
    """
    values: dict[str, Any] = {"architecture": family.architecture or architecture}
    problems = []
    for spec in fields(ModelConfig):
        if spec.name in _NOT_BY_KEY:
            continue
        keys = family.fields.get(spec.name, ())
        kind = str(spec.type).split(" |")[0]
        try:
            value = _value(config, keys, kind)
        except (TypeError, ValueError, OverflowError):
            problems.append(_wrong(file, keys, config, kind))
            continue
        if value is None:
            value = family.defaults.get(spec.name)
        if value is not None:
            values[spec.name] = value
        elif spec.default is MISSING:
            problems.append(
                Problem(f"{file}: {' or '.join(keys) or spec.name}", "nothing", f"the model's {spec.name}", "Add the key")
            )
    try:
        values["rotary_scaling"] = rotary_scaling(config)
    except TypeError:
        key = "rope_scaling" if config.get("rope_scaling") is not None else "rope_parameters"
        problems.append(Problem(f"{file}: {key}", repr(config[key]), "null or an object"))
    problems += _out_of_range(values, family, file)
    if problems:
        raise BadInput(problems)
    if not values.get("head_size"):
        hidden, heads = values["hidden_size"], values["num_attention_heads"]
        if hidden % heads:
            remedy = "Give head_dim, or mend one of them"
            raise BadInput([Problem(f"{file}: hidden_size", str(hidden), f"a multiple of num_attention_heads = {heads}", remedy)])
        values["head_size"] = hidden // heads
    model = ModelConfig(**values, settings=_settings(config, family))
    problems = [p for name, allowed in family.expect.items() for p in _unexpected(name, model, allowed, family, file)]
    problems += _layer_types(model, file)
    if problems:
        raise BadInput(problems)
    return model


def _settings(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Each setting as the configuration has it, null too; where it has no such key, the family's default."""
    result = {}
    for name, keys in family.settings.items():
        found = [value for key in keys if (value := lookup(config, key)) is not None]
        absent = not found and not any(key in config for key in keys)
        result[name] = found[0] if found else family.defaults.get(name) if absent else None
    return result


def _layer_types(model: ModelConfig, file: str) -> list[Problem]:
    """Local and full layers must alternate as the pattern says, which is all that TensorRT-LLM is told."""
    types, pattern = model.settings.get("layer_types"), model.settings.get("sliding_window_pattern")
    if not types or not pattern:
        return []
    expected = ["full_attention" if n % pattern == 0 else "sliding_attention" for n in range(1, model.num_hidden_layers + 1)]
    if list(types) == expected:
        return []
    return [
        Problem(f"{file}: layer_types", "another order of layers", f"every {pattern}. layer full, as sliding_window_pattern says")
    ]


def _unexpected(name: str, model: ModelConfig, allowed: tuple[Any, ...], family: Family, file: str) -> list[Problem]:
    value = model.value(name)
    if value is None or value in allowed:
        return []
    keys = family.fields.get(name, family.settings.get(name, (name,)))
    remedy = "TensorRT-LLM's model class has no other, so that the engine would compute something else"
    return [Problem(f"{file}: {' or '.join(keys)}", repr(value), " or ".join(map(repr, allowed)) or "null", remedy)]


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
    kv_heads = values.get("num_key_value_heads", 1)
    heads = values.get("num_attention_heads", kv_heads)
    if not problems and heads % kv_heads:
        problems.append(Problem(subject("num_key_value_heads"), str(kv_heads), f"a divisor of num_attention_heads = {heads}"))
    if any(module.experts for module in layout(family.layout).modules.values()):
        experts, chosen = values.get("num_experts", 0), values.get("experts_per_token", 0)
        if experts < 1:
            problems.append(Problem(subject("num_experts"), str(experts), "1 or more: the model has experts"))
        elif not 1 <= chosen <= experts:
            problems.append(Problem(subject("experts_per_token"), str(chosen), f"1 to {experts}, the number of experts"))
    return problems


def lookup(config: Mapping[str, Any], key: str) -> Any:
    """`config[key]`, where a dotted key that is not there itself names a nested table; None where there is nothing."""
    if config.get(key) is not None:
        return config[key]
    head, _, rest = key.partition(".")
    inner = config.get(head)
    return lookup(inner, rest) if rest and isinstance(inner, Mapping) else None


def _value(config: Mapping[str, Any], keys: tuple[str, ...], kind: str) -> Any:
    found = [value for value in (lookup(config, key) for key in keys) if value is not None]
    if not found:
        return None
    if kind == "bool":
        if not all(isinstance(value, bool) for value in found):
            raise TypeError
        return any(found)
    value = found[0]
    if kind == "str":
        if not isinstance(value, str):
            raise TypeError
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    if kind == "int" and value != int(value):
        raise ValueError
    # A float keeps the type that the file gave it: TensorRT-LLM compares values, not spellings.
    return int(value) if kind == "int" else value


def _wrong(file: str, keys: tuple[str, ...], config: Mapping[str, Any], kind: str) -> Problem:
    expected = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a string"}[kind]
    key = next(key for key in keys if lookup(config, key) is not None)
    return Problem(f"{file}: {key}", repr(lookup(config, key)), expected)
