"""A decoder's logits from the files of its ranks, as TensorRT-LLM's classes compute them, in plain float32 torch.

Nothing of headrace's and nothing of transformers': what a rank's tensors mean is said by config.json and by the checkpoint format
alone. Every tensor must be used, and those that each rank has a copy of must be the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

GEMMA = ("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM")
PHI = ("Phi3ForCausalLM", "PhiMoEForCausalLM")


def tanh_gelu(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


# TensorRT-LLM knows one GELU, by all of its names.
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": tanh_gelu,
    "gelu_pytorch_tanh": tanh_gelu,
}


def logits(directory: Path, tokens: Tensor) -> Tensor:
    """The logits [tokens, vocabulary] of one sequence, by the checkpoint in `directory`."""
    config = json.loads((directory / "config.json").read_text())
    ranks = [Rank(load_file(directory / f"rank{n}.safetensors")) for n in range(config["mapping"]["world_size"])]
    assert len(ranks) == len(list(directory.glob("rank*.safetensors")))
    result = Decoder(config, ranks).logits(tokens)
    assert [sorted(rank.tensors.keys() - rank.used) for rank in ranks] == [[]] * len(ranks), "tensors that nothing needs"
    return result


class Rank:
    """A rank's tensors, and which of them were asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.used = tensors, set[str]()

    def __getitem__(self, name: str) -> Tensor:
        self.used.add(name)
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors


@dataclass(frozen=True)
class Module:
    """A module on the ranks of one pipeline stage."""

    ranks: Sequence[Rank]
    name: str

    def __truediv__(self, name: str) -> Module:
        return Module(self.ranks, f"{self.name}.{name}" if self.name else name)

    def has(self, parameter: str) -> bool:
        return f"{self.name}.{parameter}" in self.ranks[0]

    def each(self, parameter: str = "weight") -> list[Tensor]:
        return [rank[f"{self.name}.{parameter}"] for rank in self.ranks]

    def copied(self, parameter: str = "weight") -> Tensor:
        """A parameter of which every rank has a copy."""
        first, *others = self.each(parameter)
        assert all(first.equal(other) for other in others), self.name
        return first

    def column(self, x: Tensor) -> list[Tensor]:
        """What each rank has of the output of a module that is split by rows."""
        biases = self.each("bias") if self.has("bias") else [None] * len(self.ranks)
        return [functional.linear(x, weight, bias) for weight, bias in zip(self.each(), biases, strict=True)]

    def row(self, parts: Sequence[Tensor]) -> Tensor:
        """The sum over the ranks of a module that is split by columns; its bias counts once."""
        products = [functional.linear(part, weight) for part, weight in zip(parts, self.each(), strict=True)]
        result = torch.stack(products).sum(0)
        return result + self.copied("bias") if self.has("bias") else result


class Decoder:
    """The model that config.json describes, over all of its ranks."""

    def __init__(self, config: Mapping[str, Any], ranks: Sequence[Rank]) -> None:
        self.config = config
        mapping = config["mapping"]
        self.tp, self.pp, self.ep = mapping["tp_size"], mapping["pp_size"], mapping["moe_ep_size"]
        assert mapping["moe_tp_size"] * self.ep == self.tp
        self.stages = [ranks[n * self.tp : (n + 1) * self.tp] for n in range(self.pp)]
        self.architecture = config["architecture"]
        self.gemma, self.phi = self.architecture in GEMMA, self.architecture in PHI
        self.head_size, self.epsilon = config["head_size"], config["norm_epsilon"]

    def logits(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for number, layer in self.layers():
            x = self.layer(layer, number, x)
        last = self.stages[-1]
        x = self.norm(Module(last, "transformer.ln_f"), x)
        whole = torch.cat(Module(last, "lm_head").column(x), -1)
        rows = torch.cat(Module(last, "lm_head").each())
        assert whole.shape[-1] == -(-self.config["vocab_size"] // self.tp) * self.tp
        assert not rows[self.config["vocab_size"] :].any(), "padding must be zeros"
        result = whole[:, : self.config["vocab_size"]] * self.config.get("output_multiplier_scale", 1.0)
        cap = self.config.get("final_logit_softcapping")
        return torch.tanh(result / cap) * cap if cap else result

    def embed(self, tokens: Tensor) -> Tensor:
        module = Module(self.stages[0], "transformer.vocab_embedding")
        if self.config["use_parallel_embedding"]:
            dim = self.config["embedding_sharding_dim"]
            table = torch.cat(module.each(), dim)
            assert not table[self.config["vocab_size"] :].any(), "padding must be zeros"
        else:
            table = module.copied()
        # Gemma's class scales by itself.
        scale = math.sqrt(self.config["hidden_size"]) if self.gemma else self.config.get("embedding_multiplier", 1.0)
        return table[tokens] * scale

    def layers(self) -> Iterator[tuple[int, Module]]:
        """The layers by their number in the model: on a stage they count from 0, and the first stages have one more."""
        count, number = self.config["num_hidden_layers"], 0
        for n, stage in enumerate(self.stages):
            for local in range(count // self.pp + (n < count % self.pp)):
                yield number, Module(stage, f"transformer.layers.{local}")
                number += 1
        assert number == count

    def layer(self, layer: Module, number: int, x: Tensor) -> Tensor:
        between = self.config.get("inter_layernorms", False)
        scale = self.config.get("residual_multiplier", 1.0)
        attended = self.attention(layer / "attention", number, self.norm(layer / "input_layernorm", x))
        if between:
            attended = self.norm(layer / "post_layernorm", attended)
        x = x + attended * scale
        inner = self.mlp(layer / "mlp", self.norm(layer / ("pre_feedforward_layernorm" if between else "post_layernorm"), x))
        if between:
            inner = self.norm(layer / "post_feedforward_layernorm", inner)
        return x + inner * scale

    def norm(self, module: Module, x: Tensor) -> Tensor:
        if self.architecture == "PhiMoEForCausalLM":
            return functional.layer_norm(x, x.shape[-1:], module.copied(), module.copied("bias"), self.epsilon)
        # Gemma's too: its weights are stored with the 1 added.
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon) * module.copied()

    # Attention

    def attention(self, module: Module, number: int, x: Tensor) -> Tensor:
        heads, kv_heads = self.config["num_attention_heads"] // self.tp, -(-self.config["num_key_value_heads"] // self.tp)
        local = self.is_local(number)
        turn, mask = self.rotation(len(x), local), self.mask(len(x), local)
        parts = []
        for qkv in (module / "qkv").column(x):
            q, k, v = (
                part.unflatten(-1, (-1, self.head_size)).transpose(0, 1)
                for part in qkv.split([n * self.head_size for n in (heads, kv_heads, kv_heads)], -1)
            )
            if self.normalizes_heads():
                q, k = self.norm(module / "q_layernorm", q), self.norm(module / "k_layernorm", k)
            k, v = (part.repeat_interleave(heads // kv_heads, 0) for part in (turn(k), v))
            scores = turn(q) @ k.transpose(1, 2) / (math.sqrt(self.head_size) * self.q_scaling())
            cap = self.config.get("attn_logit_softcapping")
            if cap:
                scores = torch.tanh(scores / cap) * cap
            weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
            parts.append((weights @ v).transpose(0, 1).flatten(1))
        return (module / "dense").row(parts)

    def normalizes_heads(self) -> bool:
        # The classes know it by these, whatever `qk_layernorm` says.
        return self.config.get("qwen_type") in ("qwen3", "qwen3_moe") or self.architecture == "Gemma3ForCausalLM"

    def q_scaling(self) -> float:
        """What TensorRT-LLM's attention divides the scores by, on top of sqrt(head_size)."""
        if "query_pre_attn_scalar" in self.config:
            return math.sqrt(self.config["query_pre_attn_scalar"] / self.head_size)
        return 1 / self.config.get("attention_multiplier", 1.0)

    def is_local(self, number: int) -> bool:
        pattern = self.config.get("_sliding_window_pattern")
        return bool(pattern and (number + 1) % pattern)

    def mask(self, length: int, local: bool) -> Tensor:
        distance = torch.arange(length)[:, None] - torch.arange(length)[None]
        return (distance >= 0) & (distance < (self.config["sliding_window"] if local else length))

    def rotation(self, length: int, local: bool) -> Callable[[Tensor], Tensor]:
        """What turns the heads [heads, length, head_size] by their positions: the first `rotary_embedding_dim` of each."""
        config, size = self.config, self.config["rotary_embedding_dim"]
        base = config["rope_local_base_freq"] if local else config["rotary_base"]
        periods = torch.tensor([base ** (n / size) for n in range(0, size, 2)])
        scale = 1.0
        if config["position_embedding_type"] == "long_rope":
            factors, scale = self.long_rope(length)
            periods = periods * torch.tensor(factors)
        else:
            assert config["position_embedding_type"] == "rope_gpt_neox"
            scaling = config["rotary_scaling"]
            if scaling:
                assert scaling.get("type", scaling.get("rope_type")) == "linear"
                periods = periods * scaling["factor"]
        angles = torch.arange(length)[:, None] / periods
        cos, sin = angles.cos() * scale, angles.sin() * scale

        def turn(heads: Tensor) -> Tensor:
            a, b, rest = heads.split([size // 2, size // 2, heads.shape[-1] - size], -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

        return turn

    def long_rope(self, length: int) -> tuple[Sequence[float], float]:
        """The factors of the periods, and that of the turned values."""
        config = self.config
        trained = config["original_max_position_embeddings"]
        kind = "long" if length > trained else "short"
        factors = config[f"longrope_scaling_{kind}_factors"]
        if self.architecture == "PhiMoEForCausalLM":
            return factors, config[f"longrope_{kind}_mscale"]
        growth = config["max_position_embeddings"] / trained
        return factors, math.sqrt(1 + math.log(growth) / math.log(trained)) if growth > 1 else 1.0

    # The MLP, and its experts

    def mlp(self, module: Module, x: Tensor) -> Tensor:
        if (module / "router").has("weight"):
            return self.experts(module, x)
        if self.phi:
            return (module / "proj").row([self.halves(part) for part in (module / "fc").column(x)])
        act = ACTIVATIONS[self.config["hidden_act"]]
        pairs = zip((module / "fc").column(x), (module / "gate").column(x), strict=True)
        return (module / "proj").row([act(activated) * factor for activated, factor in pairs])

    def halves(self, x: Tensor) -> Tensor:
        """One projection for both: the factor, then what is activated."""
        assert self.config["hidden_act"] == "swiglu"
        factor, activated = x.chunk(2, -1)
        return factor * functional.silu(activated)

    def experts(self, module: Module, x: Tensor) -> Tensor:
        shares = self.route(functional.linear(x, (module / "router").copied()))
        held = self.config["moe"]["num_experts"] // self.ep
        result = torch.zeros_like(x)
        for n, (fc, proj) in enumerate(zip((module / "fc").each(), (module / "proj").each(), strict=True)):
            assert len(fc) == len(proj) == held
            for e in range(held):
                output = functional.linear(self.halves(functional.linear(x, fc[e])), proj[e])
                result += output * shares[:, n % self.ep * held + e, None]
        if (module / "shared_expert_gate").has("weight"):
            shared = module / "shared_expert"
            output = (shared / "proj").row([self.halves(part) for part in (shared / "fc").column(x)])
            result += output * torch.sigmoid(functional.linear(x, (module / "shared_expert_gate").copied()))
        return result

    def route(self, scores: Tensor) -> Tensor:
        """How much of each expert's output each token takes: [tokens, experts], 0 for the experts it does not go to."""
        moe = self.config["moe"]
        if moe["normalization_mode"] == 2:
            return self.sparse_mixer(scores, moe["top_k"], 2 * moe["sparse_mixer_epsilon"])
        shares = scores.softmax(-1)
        best = shares.topk(moe["top_k"], -1)
        result = torch.zeros_like(shares).scatter(-1, best.indices, best.values)
        assert moe["normalization_mode"] in (0, 1)
        return result / result.sum(-1, keepdim=True) if moe["normalization_mode"] else result

    def sparse_mixer(self, scores: Tensor, count: int, margin: float) -> Tensor:
        """One expert after the other: its share among those that score nearly as much, less those already chosen."""
        result, left = torch.zeros_like(scores), scores
        for _ in range(count):
            top = left.max(-1, keepdim=True)
            near = (top.values - left) / torch.maximum(left.abs(), top.values) <= margin
            shares = left.masked_fill(~near, -math.inf).softmax(-1)
            result = result.scatter(-1, top.indices, shares.gather(-1, top.indices))
            left = left.scatter(-1, top.indices, -math.inf)
        return result
