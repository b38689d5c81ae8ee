"""Read from config.json what the model computes, with TensorRT-LLM's own defaults for missing keys.

Facts: docs/format/checkpoint.md, sections 1, 5 and 6; docs/format/families.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import BadInput, Problem
from pipeline.model.computes import (
    CAPPED_SCORES,
    HEAD_NORMS,
    LOCAL_ROPE,
    SCALED_SCORES,
    conflicts,
    features,
    layer_windows,
    model_class,
    replaced_attention,
)
from pipeline.model.runtime import runtime
from stages.verify.forward.rank_layout import RankLayout

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")  # of a gated MLP; TensorRT-LLM knows one GELU, by both names
ROUTINGS = (None, 0, 1, 2)  # None and 0: shares as they are; 1: shares that sum to one; 2: sparse mixer
NEEDED = ("architecture", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "mapping")
BESIDE_EXPERTS = "ArcticForCausalLM"  # has a dense MLP beside its experts
WITHOUT = "a model that is computed without it"


@dataclass(frozen=True)
class DecoderSettings(RankLayout):
    """config.json as the model's classes read it.

    Raises BadInput naming keys that are missing, or that ask for something that the decoder does not compute.
    """

    def __post_init__(self) -> None:
        missing = [Problem(f"config.json: {key}", "nothing", "a value") for key in NEEDED if key not in self.config]
        if missing:
            raise BadInput(missing)
        problems = list(self._unknown())
        if problems:
            raise BadInput(problems)

    def _unknown(self) -> list[Problem]:
        moe, step = self.experts > 0, self.config.get("decoder_sparse_step")
        architectures = tuple(runtime().classes)
        activations = ("swiglu",) if moe or self.kind == "phi" else ACTIVATIONS
        wrong = [
            ("architecture", self.architecture, self.architecture in architectures, f"one of {', '.join(architectures)}"),
            ("hidden_act", self.config["hidden_act"], self.config["hidden_act"] in activations, f"one of {', '.join(activations)}"),
            ("moe.normalization_mode", self.routing, self.routing in ROUTINGS, f"one of {ROUTINGS}"),
            *(
                (key, self.config[key], not self.config[key], WITHOUT)
                for key in (
                    *(() if self.architecture == BESIDE_EXPERTS else ("residual_mlp",)),
                    "fc_after_embed",
                    "use_logn_attn",
                    *(("mlp_only_layers",) if moe else ()),
                )
                if key in self.config
            ),
            ("decoder_sparse_step", step, not moe or step in (None, 1), "1"),
        ]
        problems = [Problem(f"config.json: {key}", repr(found), expected) for key, found, right, expected in wrong if not right]
        # Of an attention without some features the class computes what is left; the other conflicts leave nothing to compute.
        other = (each for each in conflicts(self.config) if each.key != "quantization.exclude_modules")
        problems += [Problem(f"config.json: {each.key}", each.found, each.expected) for each in other]
        _, mapping = self.mapping
        return problems if mapping.usable else [*problems, *mapping.problems]

    # Sizes

    @property
    def architecture(self) -> str:
        """The name of the model's class."""
        return str(self.config["architecture"])

    @property
    def kind(self) -> str:
        """The short name of the model's class: "llama", "qwen", "phi" or "gemma"; "" for one that is not known."""
        own = model_class(self.config)
        return own.name if own else ""

    def has(self, feature: str) -> bool:
        """Whether the attention computes a feature of the runtime table: the model has it, and the algorithm does not take it."""
        replaced = replaced_attention(self.config)
        return feature in features(self.config) and not (replaced and feature in replaced.lacks)

    @property
    def vocab(self) -> int:
        """The number of tokens, without padding."""
        return int(self.config["vocab_size"])

    @property
    def outputs(self) -> int:
        """The rows of lm_head, without padding: tokens, or the labels of a classifier."""
        return int(self.config["num_labels"]) if self.architecture == "Qwen2ForSequenceClassification" else self.vocab

    @property
    def hidden(self) -> int:
        """Features of a token between layers."""
        return int(self.config["hidden_size"])

    @property
    def heads(self) -> int:
        """Query heads of a rank."""
        return int(self.config["num_attention_heads"]) // self.tp

    @property
    def kv_heads(self) -> int:
        """Key and value heads of a rank: one at least, which several ranks then have."""
        return -(-int(self.config.get("num_key_value_heads") or self.config["num_attention_heads"]) // self.tp)

    @property
    def head_size(self) -> int:
        """Features of a head."""
        return int(self.config.get("head_size") or self.hidden // int(self.config["num_attention_heads"]))

    @property
    def inner(self) -> int:
        """The intermediate features of a dense MLP on a rank."""
        return int(self.config.get("intermediate_size") or 4 * self.hidden) // self.tp

    @property
    def rotary_size(self) -> int:
        """The first features of a head, which are rotated by position."""
        size = self.config.get("rotary_embedding_dim")
        return int(self.head_size * self.config.get("rotary_pct", 1.0)) if size is None else int(size)

    @property
    def max_positions(self) -> int:
        """The longest sequence that the model is made for; 0 where config.json does not say."""
        return int(self.config.get("max_position_embeddings") or 0)

    @property
    def epsilon(self) -> float:
        """The epsilon of the norms."""
        return float(self.config.get("norm_epsilon", 1e-5))

    # What the classes compute

    @property
    def qkv_bias(self) -> bool:
        """Whether q, k and v have biases. Phi's class reads no key for it, and Qwen's has them where there is none."""
        return self.layer_norm if self.kind == "phi" else bool(self.config.get("attn_bias", self.kind == "qwen"))

    @property
    def dense_bias(self) -> bool:
        """Whether the attention's output projection has a bias: never in Qwen's class."""
        return self.qkv_bias and self.kind != "qwen"

    @property
    def mlp_bias(self) -> bool:
        """Whether the MLP's projections have biases."""
        return bool(self.config.get("mlp_bias", False))

    @property
    def layer_norm(self) -> bool:
        """Whether norms are layer norms, with biases; lm_head may then have a bias, too."""
        return self.architecture == "PhiMoEForCausalLM"

    @property
    def norms_heads(self) -> bool:
        """Whether q and k are normalized by head: the class decides, whatever `qk_layernorm` says."""
        return self.has(HEAD_NORMS)

    @property
    def head_epsilon(self) -> float:
        """The epsilon of those norms: the class passes none on to them (docs/format/runtime-1.2.md, section f3)."""
        own = model_class(self.config)
        return own.head_norm_epsilon if own and own.head_norm_epsilon else self.epsilon

    @property
    def norms_between(self) -> bool:
        """Whether the outputs of attention and MLP are normalized before they are added."""
        return bool(self.config.get("inter_layernorms", False))

    @property
    def fused_mlp(self) -> bool:
        """Whether a dense MLP has one projection for both the factor and the activated half."""
        return self.kind == "phi"

    @property
    def residual_mlp(self) -> bool:
        """Whether a layer has a dense MLP of attention's output, beside experts that read what attention reads."""
        return bool(self.config.get("residual_mlp", False))

    @property
    def embedding_scale(self) -> float:
        """The factor of embeddings. Gemma's class computes it itself."""
        return math.sqrt(self.hidden) if self.kind == "gemma" else float(self.config.get("embedding_multiplier", 1.0))

    @property
    def score_scale(self) -> float:
        """The factor of attention scores: 1 / (sqrt(head_size) * q_scaling)."""
        if not self.has(SCALED_SCORES):
            return 1 / math.sqrt(self.head_size)
        if self.config.get("query_pre_attn_scalar") is not None and self.kind == "gemma":
            return 1 / math.sqrt(self.config["query_pre_attn_scalar"])
        return float(self.config.get("attention_multiplier", 1.0)) / math.sqrt(self.head_size)

    @property
    def score_cap(self) -> float:
        """The soft cap of attention scores; 0 for none. Gemma 3's class has none."""
        return float(self.config.get("attn_logit_softcapping") or 0) if self.has(CAPPED_SCORES) else 0.0

    @property
    def residual_scale(self) -> float:
        """The factor of the outputs of attention and MLP, before they are added."""
        return float(self.config.get("residual_multiplier", 1.0))

    @property
    def logit_scale(self) -> float:
        """The factor of logits."""
        return float(self.config.get("output_multiplier_scale", 1.0))

    @property
    def logit_cap(self) -> float:
        """The soft cap of logits; 0 for none."""
        return float(self.config.get("final_logit_softcapping") or 0)

    def window(self, layer: int) -> int:
        """The number of positions, its own included, that a token of a layer sees: those of `runtime_defaults`; 0 for all.

        No class sets a window of its own (docs/format/runtime-1.2.md, section g). `layer`: by its number in the model.
        """
        windows = layer_windows(self.config, int(self.config["num_hidden_layers"]))
        return windows[layer] if windows else 0

    def is_local(self, layer: int) -> bool:
        """Whether a layer, by its number in the model, has the rope of local layers: all but every `_sliding_window_pattern`-th."""
        pattern = self.config.get("_sliding_window_pattern")
        return bool(pattern and self.has(LOCAL_ROPE) and (layer + 1) % int(pattern))

    # Experts

    @property
    def moe(self) -> Mapping[str, Any]:
        """config.json's `moe`; empty for a model that has none."""
        moe = self.config.get("moe")
        return moe if isinstance(moe, Mapping) else {}

    @property
    def routing(self) -> int | None:
        """`normalization_mode`: how the shares of a token's experts are normalized."""
        mode: int | None = self.moe.get("normalization_mode")
        return mode

    @property
    def expert_inner(self) -> int:
        """The intermediate features of an expert on a rank."""
        own = self.architecture in ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM")
        return int(self.config.get("moe_intermediate_size" if own else "intermediate_size") or 0) // self.moe_tp

    @property
    def shared_inner(self) -> int:
        """The intermediate features of the shared expert on a rank; 0 where there is none."""
        own = self.architecture == "Qwen2MoeForCausalLM"
        return int(self.config.get("moe_shared_expert_intermediate_size") or 0) // self.tp if own else 0
