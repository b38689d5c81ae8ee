"""Read and check what the loader's model classes take from config.json.

Facts: docs/format/checkpoint.md, sections 5 and 6; docs/format/families.md. Where a value that shapes depend on is wrong, there are
no settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import Problem
from pipeline.model.computes import HEAD_NORMS, replaced_attention
from pipeline.model.runtime import runtime
from stages.verify.contract.class_values import BESIDE_EXPERTS, INTER_NORMS, LAYER_NORMS, check_class_values, class_name
from stages.verify.contract.parallel import MappingSizes, read_mapping
from stages.verify.contract.quantized import QuantizationBlock, read_quantization
from stages.verify.contract.reader import ConfigReader

CLASSIFIERS = ("Qwen2ForSequenceClassification",)  # whose head has a row a label
MIXTURES = (
    "MixtralForCausalLM",
    "ArcticForCausalLM",
    "GraniteMoeForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "PhiMoEForCausalLM",
)
DTYPES = ("float16", "bfloat16", "float32")
POSITIONS = ("rope_gpt_neox", "long_rope", "yarn", "mrope")
# The keys that `MoeConfig(**dict)` takes in some version from 0.13 to 1.2.1.
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
ALONE = {"world_size": 1, "tp_size": 1, "pp_size": 1}  # in place of a missing mapping, which is reported once


@dataclass(frozen=True)
class ContractSettings:
    """The values of config.json that names and shapes of tensors depend on.

    `experts`: 0 for a dense model. `expert_size`, `shared_size`: intermediate sizes of an expert and of the shared one, 0 for none.
    `labels`: of a classifier, 0 for a model of tokens. `embedding`: the axis of the embedding that ranks share, "vocabulary" or
    "hidden", "" for none. `lacking`: the features that the attention of the algorithm does not compute.
    """

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
    parallel: MappingSizes
    quantization: QuantizationBlock
    lacking: tuple[str, ...] = ()
    labels: int = 0

    @property
    def head_rows(self) -> int:
        """The rows of lm_head on a rank: its share of the labels, or of the vocabulary, which is padded."""
        return self.labels // self.parallel.tp if self.labels else -(-self.vocab_size // self.parallel.tp)

    @property
    def model_class(self) -> str:
        """The loader's class: "llama", "qwen", "phi" or "gemma"."""
        return runtime().classes[self.architecture].name

    @property
    def qk_norms(self) -> bool:
        """Whether q and k are normalised by head.

        The architecture decides, whatever `qk_layernorm` says; an attention that the algorithm puts in the place of the class's own
        may have no such norms.
        """
        return HEAD_NORMS in runtime().features.get(self.architecture, ()) and HEAD_NORMS not in self.lacking

    @property
    def inter_norms(self) -> bool:
        """Whether norms stand on both sides of the MLP."""
        return self.architecture in INTER_NORMS

    @property
    def residual_mlp(self) -> bool:
        """Whether layers have a dense MLP, as wide as the model, beside their experts."""
        return self.architecture == BESIDE_EXPERTS

    @property
    def layer_norms(self) -> bool:
        """Whether norms are layer norms, which have biases."""
        return self.architecture == LAYER_NORMS


def read_settings(config: Mapping[str, Any]) -> tuple[ContractSettings | None, list[Problem]]:
    """Read the settings, None where shapes cannot be told, and list everything that is wrong with config.json."""
    reader = ConfigReader(config)
    architecture = reader.text("architecture", tuple(runtime().classes))
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
    if rotary % 2:
        odd = "rotary_embedding_dim" if reader.has("rotary_embedding_dim") else "head_size"
        reader.wrong(odd, "an even number: features are rotated in pairs")
    layers = reader.size("num_hidden_layers", most=4096)
    kind = class_name(architecture)
    experts, expert_size, shared_size, moe = _experts(reader, architecture)
    mapping_values = reader.table("mapping")
    parallel, mapping = read_mapping(ALONE if mapping_values is None else mapping_values, layers, experts > 0)
    quantization, block = read_quantization(config)
    settings = ContractSettings(
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
        # Phi's class does not read the key.
        attention_bias=architecture == LAYER_NORMS if kind == "phi" else reader.flag("attn_bias", kind == "qwen"),
        mlp_bias=kind != "phi" and reader.flag("mlp_bias"),
        experts=experts,
        expert_size=expert_size,
        shared_size=shared_size,
        embedding=_embedding(reader, kind, parallel.tp),
        parallel=parallel,
        quantization=quantization,
        lacking=replaced.lacks if (replaced := replaced_attention(config)) else (),
        labels=reader.size("num_labels") if architecture in CLASSIFIERS else 0,
    )
    check_class_values(reader, architecture, rotary)
    if quantization.algorithm and dtype == "float32":
        reader.wrong("dtype", f"float16 or bfloat16, as the kernels of {quantization.algorithm} need")
    usable = all(each.usable for each in (reader, moe, mapping, block))
    if usable:
        _divisible(reader, settings)
    problems = [*reader.problems, *moe.problems, *mapping.problems, *block.problems]
    return (settings if usable and reader.usable else None), problems


def _experts(reader: ConfigReader, architecture: str) -> tuple[int, int, int, ConfigReader]:
    """The number of experts, their size, the shared expert's size, and the reader that holds what is wrong with `moe`."""
    if (not reader.has("moe") and architecture not in MIXTURES) or class_name(architecture) == "gemma":
        return 0, 0, 0, ConfigReader({})
    if architecture == "Phi3ForCausalLM":
        reader.wrong("moe", "no such key: the class takes it for a mixture of experts", "Remove it")
    moe_values = reader.table("moe")
    if moe_values is None:
        return 0, 0, 0, ConfigReader({})
    moe = ConfigReader(moe_values, "moe.")
    moe.check_keys(MOE_KEYS)
    moe.optional_number("sparse_mixer_epsilon", zero=True, null=False)
    if moe.has("normalization_mode"):
        moe.size("normalization_mode", least=0, most=16)
    experts, chosen = moe.size("num_experts", least=0, most=1 << 16), moe.size("top_k", least=0)
    mixture = architecture in MIXTURES
    if (experts == 0) != (chosen == 0) or chosen > experts:
        moe.wrong("top_k", f"from 1 to num_experts {experts}, or both 0", fatal=True)
    if mixture and experts < 2:
        moe.wrong("num_experts", f"2 or more: {architecture} is a mixture of experts", fatal=True)
    if experts < 2:
        return 0, 0, 0, moe
    if class_name(architecture) != "qwen" or not mixture:
        return experts, reader.size("intermediate_size"), 0, moe
    shared = reader.size("moe_shared_expert_intermediate_size") if architecture == "Qwen2MoeForCausalLM" else 0
    return experts, reader.size("moe_intermediate_size"), shared, moe


def _embedding(reader: ConfigReader, kind: str, tp: int) -> str:
    """The axis of the embedding that ranks share. Gemma's class splits it whenever there are several ranks."""
    parallel = reader.flag("use_parallel_embedding")
    axis = reader.size("embedding_sharding_dim", least=0, most=1, default=0)
    parallel = tp > 1 if kind == "gemma" else parallel
    return ("vocabulary", "hidden")[axis] if parallel and tp > 1 else ""


def _divisible(reader: ConfigReader, settings: ContractSettings) -> None:
    """Check that sizes can be split over the ranks (docs/format/checkpoint.md, sections 2 and 12)."""
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
    if settings.labels:
        shares.append(("num_labels", settings.labels, "tp_size", tp))
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
