"""Values of config.json that a class computes with and that no shape depends on: of the right kind, and what the class asks for.

Facts: docs/format/checkpoint.md, section 5; docs/format/families.md; docs/format/runtime-1.2.md, section f.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.model.computes import LOCAL_ROPE
from pipeline.model.runtime import runtime
from stages.verify.contract.reader import ConfigReader, is_number

# The `qwen_type` by which the Qwen class tells these models apart.
QWEN_TYPES = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Qwen2VLForConditionalGeneration": "qwen2_vl",
    "Qwen2ForSequenceClassification": "qwen2",
}
BESIDE_EXPERTS = "ArcticForCausalLM"  # whose layers have a dense MLP, too
INTER_NORMS = ("Gemma2ForCausalLM", "Gemma3ForCausalLM")  # which have norms on both sides of the MLP
LAYER_NORMS = "PhiMoEForCausalLM"  # whose norms are layer norms, which have biases
# The LLaMA class asks for other modules where these have other values.
CONSTANTS = {
    "residual_mlp": False,
    "fc_after_embed": False,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "layer_idx_offset": 0,
}
# Keys by which a mixture has layers without experts: the class makes none.
ALL_LAYERS: dict[str, tuple[Any, ...]] = {
    "mlp_only_layers": (None, []),
    "decoder_sparse_step": (None, 1),
}
# Numbers, by whether they may be 0, and whether null: where the key is missing, the class has a default.
NUMBERS = {
    "embedding_multiplier": (True, False),
    "attention_multiplier": (True, False),
    "residual_multiplier": (True, False),
    "output_multiplier_scale": (True, False),
    "attn_logit_softcapping": (True, True),
    "final_logit_softcapping": (True, True),
    "query_pre_attn_scalar": (False, True),
    "rope_local_base_freq": (False, True),
}
# The same, of `rotary_scaling`. TensorRT-LLM does not read an attention_factor.
SCALING = {
    **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "alpha"), (False, False)),
    **dict.fromkeys(("mscale", "mscale_all_dim"), (True, False)),
    "original_max_position_embeddings": (False, False),
    "attention_factor": (False, True),
}


def class_name(architecture: str) -> str:
    """The short name of the loader's class of an architecture: "llama", "qwen", "phi" or "gemma"; "" where it has none."""
    own = runtime().classes.get(architecture)
    return own.name if own else ""


def number_of_experts(config: Mapping[str, Any]) -> int:
    """The experts of a layer by config.json's `moe`: 0 for a dense model, as a single one is none, and Gemma's class has none."""
    moe = config.get("moe")
    count = moe.get("num_experts") if isinstance(moe, Mapping) else None
    if not isinstance(count, int) or count < 2 or class_name(str(config.get("architecture"))) == "gemma":
        return 0
    return count


def check_class_values(reader: ConfigReader, architecture: str, rotary_size: int) -> None:
    """Record what is wrong with the values that a class computes with. `rotary_size`: the features of a head that are rotated."""
    config, kind = reader.values, class_name(architecture)
    required = ("query_pre_attn_scalar",) if architecture in INTER_NORMS else ()
    for key, (zero, null) in NUMBERS.items():
        if key in required:
            reader.positive(key)
        else:
            reader.optional_number(key, zero=zero, null=null)
    if kind == "llama":
        _llama(reader, architecture)
    if kind == "qwen":
        reader.text("qwen_type", (QWEN_TYPES[architecture],))
        if reader.flag("use_logn_attn"):
            reader.wrong("use_logn_attn", "false: the class scales the scores, and no model that it takes does")
        for key, values in ALL_LAYERS.items() if number_of_experts(config) else ():
            if config.get(key) not in values:
                reader.wrong(key, f"{values[-1]}: the class has experts in every layer")
    if LOCAL_ROPE in runtime().features.get(architecture, ()):
        reader.optional_size("_sliding_window_pattern")
    if kind == "phi":
        _phi(reader, architecture, rotary_size)
    _scaling(reader, rotary_size)


def _llama(reader: ConfigReader, architecture: str) -> None:
    constants = {**CONSTANTS, "residual_mlp": architecture == BESIDE_EXPERTS}
    if architecture == BESIDE_EXPERTS and not reader.has("residual_mlp"):
        reader.wrong("residual_mlp", "true: the model has a dense MLP beside its experts")
    for key, value in constants.items():
        if reader.has(key) and reader.values[key] != value:
            reader.wrong(key, str(value).lower())


def _phi(reader: ConfigReader, architecture: str, rotary_size: int) -> None:
    config = reader.values
    share = config.get("rotary_pct")
    if not is_number(share) or not 0 < share <= 1:
        reader.wrong("rotary_pct", "a share of a head, above 0 and at most 1: the class has no default", "Convert it again")
    if config.get("position_embedding_type") != "long_rope":
        return
    trained = config.get("original_max_position_embeddings")
    if not is_number(trained) or trained < 2:
        reader.wrong("original_max_position_embeddings", "a number of positions")
    for key in ("longrope_short_mscale", "longrope_long_mscale") if architecture == LAYER_NORMS else ():
        reader.positive(key)
    for key in ("longrope_scaling_short_factors", "longrope_scaling_long_factors"):
        factors = config.get(key)
        each = factors if isinstance(factors, list) else []
        if len(each) != rotary_size // 2 or not all(is_number(factor) and factor > 0 for factor in each):
            reader.wrong(key, f"a list of {rotary_size // 2} factors")


def _scaling(reader: ConfigReader, rotary_size: int) -> None:
    """Check the numbers of `rotary_scaling`; which kinds a class computes, and by which keys, `pipeline.model.computes` says."""
    scaling = reader.values.get("rotary_scaling")
    if isinstance(scaling, Mapping):
        inner = ConfigReader(scaling, "rotary_scaling.")
        for key, (zero, null) in SCALING.items():
            inner.optional_number(key, zero=zero, null=null)
        reader.problems += inner.problems
    if reader.values.get("position_embedding_type") == "mrope":
        section = scaling.get("mrope_section") if isinstance(scaling, Mapping) else None
        parts = [part for part in section if isinstance(part, int)] if isinstance(section, list) and len(section) == 3 else []
        if len(parts) != 3 or sum(parts) != rotary_size // 2:
            reader.wrong("rotary_scaling", f"mrope_section: three numbers, {rotary_size // 2} in all")
