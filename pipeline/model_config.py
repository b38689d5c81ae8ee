"""ModelConfig: a model's sizes and settings, from config.json, GGUF metadata or params.json by the family's table.

config.json is read in both styles: top-level `rope_theta` / `rope_scaling` / `torch_dtype`, and transformers 5's
`rope_parameters` / `dtype` (checkpoint-format, section 12).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from pipeline.errors import BadInput, Problem
from pipeline.tables import Family, layout


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
    num_experts: int = 0
    experts_per_token: int = 0
    tie_word_embeddings: bool | None = None

    @property
    def q_size(self) -> int:
        """Rows of the query projection."""
        return self.num_attention_heads * self.head_size

    @property
    def kv_size(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.num_key_value_heads * self.head_size

    @property
    def rotary_embedding_dim(self) -> int:
        return int(self.head_size * self.rotary_pct)

    def dimension(self, name: str) -> int:
        """A size by the name that layout tables use."""
        return int(getattr(self, name))


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
}


def model_config(config: Mapping[str, Any], family: Family, architecture: str, file: str) -> ModelConfig:
    """Read a model's configuration by the family's `[model_config]` rows.

    Raises BadInput naming `file` and every key that is missing, has another type than expected, or contradicts another.
    """
    values: dict[str, Any] = {"architecture": family.architecture or architecture}
    problems = []
    for spec in fields(ModelConfig):
        if spec.name in ("architecture", "rotary_scaling"):
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
    return ModelConfig(**values)


def _out_of_range(values: Mapping[str, Any], family: Family, file: str) -> list[Problem]:
    def subject(name: str) -> str:
        return f"{file}: {' or '.join(family.fields.get(name, (name,)))}"

    problems = [
        Problem(subject(name), str(values[name]), f"{low} to {high}")
        for name, (low, high) in _BOUNDS.items()
        if name in values and not low <= values[name] <= high
    ]
    for name in ("norm_epsilon", "rotary_base"):
        if name in values and not (math.isfinite(values[name]) and values[name] > 0):
            problems.append(Problem(subject(name), str(values[name]), "a number greater than 0"))
    if any(module.experts for module in layout(family.layout).modules.values()):
        experts, chosen = values.get("num_experts", 0), values.get("experts_per_token", 0)
        if experts < 1:
            problems.append(Problem(subject("num_experts"), str(experts), "1 or more: the model has experts"))
        elif not 1 <= chosen <= experts:
            problems.append(Problem(subject("experts_per_token"), str(chosen), f"1 to {experts}, the number of experts"))
    return problems


def rotary_scaling(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """`rope_scaling` as it is, or what transformers 5 keeps in `rope_parameters`; None where positions are not scaled."""
    scaling = config.get("rope_scaling")
    if scaling is not None:
        if not isinstance(scaling, Mapping):
            raise TypeError
        return dict(scaling)
    parameters = config.get("rope_parameters")
    if parameters is None:
        return None
    if not isinstance(parameters, Mapping):
        raise TypeError
    rest = {key: value for key, value in dict(parameters).items() if key != "rope_theta"}
    return None if rest.get("rope_type", "default") == "default" else rest


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
