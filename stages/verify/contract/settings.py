"""config.json as a whole: what the loader's model classes take from it, checked.

Facts: checkpoint format, sections 5 and 6; families. A value that no shape can be told without makes the settings unusable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import Problem
from stages.verify.contract.parallel import Parallel, read_mapping
from stages.verify.contract.quantized import FP8_ROWWISE, Quantization, read_quantization
from stages.verify.contract.reader import Reader

# The loader's model class by architecture, of those that headrace writes.
CLASSES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "llama",
    "GraniteForCausalLM": "llama",
    "ExaoneForCausalLM": "llama",
    "InternLM2ForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen",
    "Qwen2MoeForCausalLM": "qwen",
    "Qwen3ForCausalLM": "qwen",
    "Qwen3MoeForCausalLM": "qwen",
    "Phi3ForCausalLM": "phi",
    "PhiMoEForCausalLM": "phi",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma",
    "Gemma3ForCausalLM": "gemma",
}
# What these models are, by the setting that the class goes by.
QWEN_TYPES = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
MIXTURES = ("MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "PhiMoEForCausalLM")
DTYPES = ("float16", "bfloat16", "float32")
POSITIONS = ("rope_gpt_neox", "long_rope", "yarn")
# What `MoeConfig(**dict)` takes in one version or another from 0.13 to 1.2.1.
MOE_KEYS = (
    "num_experts",
    "shared_expert_intermediate_size",
    "top_k",
    "normalization_mode",
    "sparse_mixer_epsilon",
    "tp_mode",
    "topk_method",
    "device_limited_n_group",
    "device_limited_topk_group",
    "device_limited_routed_scaling_factor",
)
ALONE = {"world_size": 1, "tp_size": 1, "pp_size": 1}  # in the place of a mapping that is missing, which is said once
# Of the LLaMA class: anything else asks for other modules.
CONSTANTS = {
    "residual_mlp": False,
    "fc_after_embed": False,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "layer_idx_offset": 0,
}


@dataclass(frozen=True)
class Settings:
    """What the shapes hang on. `experts`: 0 for a model without. `embedding`: the axis that ranks share, "" for none."""

    architecture: str
    dtype: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    heads: int
    kv_heads: int
    head_size: int
    positions: int
    rotary_size: int
    hidden_act: str
    attention_bias: bool
    mlp_bias: bool
    experts: int
    expert_size: int
    shared_size: int
    embedding: str
    parallel: Parallel
    quantization: Quantization

    @property
    def model_class(self) -> str:
        return CLASSES[self.architecture]

    @property
    def qk_norms(self) -> bool:
        """Whether q and k are normalised by head: known by the architecture, whatever `qk_layernorm` says."""
        return self.architecture in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Gemma3ForCausalLM")

    @property
    def inter_norms(self) -> bool:
        """Whether norms stand on both sides of the MLP."""
        return self.architecture in ("Gemma2ForCausalLM", "Gemma3ForCausalLM")

    @property
    def layer_norms(self) -> bool:
        """Whether norms are of the kind that has biases."""
        return self.architecture == "PhiMoEForCausalLM"


def read_settings(config: Mapping[str, Any]) -> tuple[Settings | None, list[Problem]]:
    """The settings, or None where shapes cannot be told, and everything that is wrong with config.json."""
    reader = Reader(config)
    architecture = reader.text("architecture", tuple(CLASSES))
    dtype = reader.text("dtype", DTYPES)
    reader.text("hidden_act")
    reader.text("position_embedding_type", POSITIONS)
    for key in ("norm_epsilon", "rotary_base"):
        reader.positive(key)
    hidden, heads = reader.size("hidden_size"), reader.size("num_attention_heads", most=1 << 16)
    if not reader.has("head_size") and hidden % heads:
        reader.wrong("head_size", f"a size, as num_attention_heads {heads} does not divide hidden_size {hidden}", fatal=True)
    head_size = reader.size("head_size", default=hidden // heads or 1)
    rotary = reader.size("rotary_embedding_dim", most=head_size, default=head_size)
    layers = reader.size("num_hidden_layers", most=4096)
    kind = CLASSES.get(architecture, "")
    experts, expert_size, shared_size, moe = _experts(reader, architecture)
    given = reader.table("mapping")
    parallel, mapping = read_mapping(ALONE if given is None else given, layers, experts > 0)
    quantization, block = read_quantization(config)
    settings = Settings(
        architecture=architecture,
        dtype=dtype,
        vocab_size=reader.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=reader.size("intermediate_size"),
        num_layers=layers,
        heads=heads,
        kv_heads=reader.size("num_key_value_heads", most=1 << 16),
        head_size=head_size,
        positions=reader.size("max_position_embeddings"),
        rotary_size=rotary,
        hidden_act=str(config.get("hidden_act")),
        # Phi's class knows by itself.
        attention_bias=architecture == "PhiMoEForCausalLM" if kind == "phi" else reader.flag("attn_bias", kind == "qwen"),
        mlp_bias=kind != "phi" and reader.flag("mlp_bias"),
        experts=experts,
        expert_size=expert_size,
        shared_size=shared_size,
        embedding=_embedding(reader, kind, parallel.tp),
        parallel=parallel,
        quantization=quantization,
    )
    _by_class(reader, architecture, settings)
    usable = all(each.usable for each in (reader, moe, mapping, block))
    if usable:
        _divisible(reader, settings)
    problems = [*reader.problems, *moe.problems, *mapping.problems, *block.problems]
    return (settings if usable and reader.usable else None), problems


def _experts(reader: Reader, architecture: str) -> tuple[int, int, int, Reader]:
    """How many experts there are, their size and that of the shared one, and what is wrong with `moe`."""
    if (not reader.has("moe") and architecture not in MIXTURES) or CLASSES.get(architecture) == "gemma":
        return 0, 0, 0, Reader({})
    if architecture == "Phi3ForCausalLM":
        reader.wrong("moe", "no such key: the class takes it for a mixture of experts", "Remove it")
    given = reader.table("moe")
    if given is None:
        return 0, 0, 0, Reader({})
    moe = Reader(given, "moe.")
    moe.keys(MOE_KEYS)
    experts, chosen = moe.size("num_experts", least=0, most=1 << 16), moe.size("top_k", least=0)
    mixture = architecture in MIXTURES
    if (experts == 0) != (chosen == 0) or chosen > experts:
        moe.wrong("top_k", f"from 1 to num_experts {experts}, or both 0", fatal=True)
    if mixture and experts < 2:
        moe.wrong("num_experts", f"2 or more: {architecture} is a mixture of experts", fatal=True)
    if experts < 2:
        return 0, 0, 0, moe
    if CLASSES.get(architecture) != "qwen" or not mixture:
        return experts, reader.size("intermediate_size"), 0, moe
    shared = reader.size("moe_shared_expert_intermediate_size") if architecture == "Qwen2MoeForCausalLM" else 0
    return experts, reader.size("moe_intermediate_size"), shared, moe


def _embedding(reader: Reader, kind: str, tp: int) -> str:
    """The axis of the embedding that ranks share. Gemma's class shares it whenever there are several."""
    parallel = reader.flag("use_parallel_embedding")
    axis = reader.size("embedding_sharding_dim", least=0, most=1, default=0)
    parallel = tp > 1 if kind == "gemma" else parallel
    return ("vocabulary", "hidden")[axis] if parallel and tp > 1 else ""


def _by_class(reader: Reader, architecture: str, settings: Settings) -> None:
    """What one class alone asks for."""
    config, kind = reader.values, CLASSES.get(architecture)
    if kind == "llama":
        for key, value in CONSTANTS.items():
            if reader.has(key) and config[key] != value:
                reader.wrong(key, str(value).lower())
    if kind == "qwen":
        reader.text("qwen_type", (QWEN_TYPES[architecture],))
    if settings.inter_norms:
        reader.positive("query_pre_attn_scalar")
    if kind == "phi" and config.get("position_embedding_type") == "long_rope":
        mscales = ("longrope_short_mscale", "longrope_long_mscale") if settings.layer_norms else ()
        for key in ("original_max_position_embeddings", *mscales):
            reader.positive(key)
        for key in ("longrope_scaling_short_factors", "longrope_scaling_long_factors"):
            if not isinstance(config.get(key), list) or len(config[key]) != settings.rotary_size // 2:
                reader.wrong(key, f"a list of {settings.rotary_size // 2} factors")
    algorithm = settings.quantization.algorithm
    if algorithm and settings.dtype == "float32":
        reader.wrong("dtype", f"float16 or bfloat16, as the kernels of {algorithm} need")
    if settings.experts and algorithm in (FP8_ROWWISE, "W8A16_GPTQ"):
        reader.wrong("quantization", f"another algorithm: TensorRT-LLM has no experts in {algorithm}", found=algorithm)


def _divisible(reader: Reader, settings: Settings) -> None:
    """What the ranks must be able to share out (checkpoint format, sections 2 and 12)."""
    parallel = settings.parallel
    tp = parallel.tp
    shares = [("num_attention_heads", settings.heads, "tp_size", tp)]
    if not settings.experts:
        shares.append(("intermediate_size", settings.intermediate_size, "tp_size", tp))
    else:
        own = settings.model_class == "qwen" and settings.architecture in MIXTURES
        key = "moe_intermediate_size" if own else "intermediate_size"
        shares.append((key, settings.expert_size, "moe_tp_size", parallel.moe_tp))
        shares.append(("moe.num_experts", settings.experts, "moe_ep_size", parallel.moe_ep))
    if settings.shared_size:
        shares.append(("moe_shared_expert_intermediate_size", settings.shared_size, "tp_size", tp))
    if settings.embedding == "hidden":
        shares.append(("hidden_size", settings.hidden_size, "tp_size", tp))
    for key, size, by, count in shares:
        if size % count:
            reader.wrong(key, f"a multiple of {by} {count}", found=str(size), fatal=True)
    if max(settings.kv_heads, tp) % min(settings.kv_heads, tp):
        reader.wrong("num_key_value_heads", f"a multiple or a divisor of tp_size {tp}", fatal=True)
    if settings.kv_heads > settings.heads:
        reader.wrong("num_key_value_heads", f"at most num_attention_heads {settings.heads}", fatal=True)
