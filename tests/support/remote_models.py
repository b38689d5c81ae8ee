"""Models that transformers has no class for: tiny ones with seeded values, and what each computes, by its published modelling code.

A forward pass here is written from what that code does, in plain torch, and knows nothing of headrace's tables.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

Tensors = dict[str, Tensor]
Config = Mapping[str, Any]

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 0.01,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


@dataclass(frozen=True)
class RemoteModel:
    """A model of a family: its configuration, its tensors, and the logits that it computes of tokens [tokens]."""

    config: Config
    tensors: Tensors
    compute: Callable[[Config, Tensors, Tensor], Tensor]
    beside: Tensors = field(default_factory=dict)  # what belongs to no token: heads for further ones, encoders

    def save(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config))
        save_file({**self.tensors, **self.beside}, directory / "model.safetensors", metadata={"format": "pt"})
        return directory

    def logits(self, tokens: Tensor) -> Tensor:
        return self.compute(self.config, self.tensors, tokens)


def normed(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def turned(heads: Tensor, base: float) -> Tensor:
    """Heads [heads, tokens, size], feature i turned with feature i + size / 2."""
    half = heads.shape[-1] // 2
    angles = torch.arange(heads.shape[1])[:, None] * base ** (-torch.arange(half) / half)
    first, second = heads.split(half, -1)
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def attended(q: Tensor, k: Tensor, v: Tensor, heads: int, kv_heads: int, base: float) -> Tensor:
    """Causal attention of projections [tokens, heads * size], each query head with the key head of its group."""
    q, k, v = (each.unflatten(-1, (count, -1)).transpose(0, 1) for each, count in ((q, heads), (k, kv_heads), (v, kv_heads)))
    q, k = turned(q, base), turned(k, base)
    k, v = (each.repeat_interleave(heads // kv_heads, 0) for each in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -math.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def linear(t: Tensors, name: str, x: Tensor) -> Tensor:
    return functional.linear(x, t[f"{name}.weight"], t.get(f"{name}.bias"))


# A family's modelling


def llama_like(config: Config, t: Tensors, tokens: Tensor) -> Tensor:
    """InternLM 1 and 3, Skywork, MiMo: LLaMA's block, with whatever biases there are."""
    return _llama_like(config, t, tokens, 1.0, 1.0)


def _llama_like(config: Config, t: Tensors, tokens: Tensor, scale: float, added: float) -> Tensor:
    heads = config["num_attention_heads"]
    x = t["model.embed_tokens.weight"][tokens] * scale
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        inner = normed(x, t[f"{layer}.input_layernorm.weight"], config["rms_norm_eps"])
        if f"{layer}.self_attn.W_pack.weight" in t:
            q, k, v = linear(t, f"{layer}.self_attn.W_pack", inner).chunk(3, -1)
        else:
            q, k, v = (linear(t, f"{layer}.self_attn.{part}_proj", inner) for part in "qkv")
        base = config.get("rope_theta", 10000.0)
        inner = attended(q, k, v, heads, config.get("num_key_value_heads", heads), base)
        x = x + linear(t, f"{layer}.self_attn.o_proj", inner) * added
        inner = normed(x, t[f"{layer}.post_attention_layernorm.weight"], config["rms_norm_eps"])
        inner = functional.silu(linear(t, f"{layer}.mlp.gate_proj", inner)) * linear(t, f"{layer}.mlp.up_proj", inner)
        x = x + linear(t, f"{layer}.mlp.down_proj", inner) * added
    x = normed(x, t["model.norm.weight"], config["rms_norm_eps"])
    return functional.linear(x, t.get("lm_head.weight", t["model.embed_tokens.weight"]))


def first_yi(config: Config, t: Tensors, tokens: Tensor) -> Tensor:
    """LLaMA's block with norms ln1 and ln2."""
    named = {name.replace(".ln1.", ".input_layernorm.").replace(".ln2.", ".post_attention_layernorm."): t[name] for name in t}
    return llama_like(config, named, tokens)


def baichuan2(config: Config, t: Tensors, tokens: Tensor) -> Tensor:
    """NormHead: logits of a head whose rows have length 1."""
    head = functional.normalize(t["lm_head.weight"])
    return llama_like(config, {**t, "lm_head.weight": head}, tokens)


def minicpm(config: Config, t: Tensors, tokens: Tensor) -> Tensor:
    """Embeddings times scale_emb, residuals times scale_depth / sqrt(layers), and what the head is given over hidden / base."""
    added = config["scale_depth"] / math.sqrt(config["num_hidden_layers"])
    return _llama_like(config, t, tokens, config["scale_emb"], added) / (config["hidden_size"] / config["dim_model_base"])


def qwen(config: Config, t: Tensors, tokens: Tensor) -> Tensor:
    """w1(x) * silu(w2(x)); q, k and v are thirds of c_attn. Neither dynamic NTK nor log-n up to seq_length."""
    heads, epsilon = config["num_attention_heads"], config["layer_norm_epsilon"]
    x = t["transformer.wte.weight"][tokens]
    for n in range(config["num_hidden_layers"]):
        layer = f"transformer.h.{n}"
        inner = normed(x, t[f"{layer}.ln_1.weight"], epsilon)
        q, k, v = linear(t, f"{layer}.attn.c_attn", inner).chunk(3, -1)
        x = x + linear(t, f"{layer}.attn.c_proj", attended(q, k, v, heads, heads, config["rotary_emb_base"]))
        inner = normed(x, t[f"{layer}.ln_2.weight"], epsilon)
        inner = linear(t, f"{layer}.mlp.w1", inner) * functional.silu(linear(t, f"{layer}.mlp.w2", inner))
        x = x + linear(t, f"{layer}.mlp.c_proj", inner)
    return functional.linear(normed(x, t["transformer.ln_f.weight"], epsilon), t["lm_head.weight"])


def arctic(config: Config, t: Tensors, tokens: Tensor) -> Tensor:
    """Experts of what attention reads, added to a dense MLP of what it gives; the shares of a token's experts sum to 1."""
    heads, kv_heads, epsilon = config["num_attention_heads"], config["num_key_value_heads"], config["rms_norm_eps"]

    def mlp(name: str, x: Tensor) -> Tensor:
        inner = functional.silu(linear(t, f"{name}.w1", x)) * linear(t, f"{name}.w3", x)
        return linear(t, f"{name}.w2", inner)

    x = t["model.embed_tokens.weight"][tokens]
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        inner = normed(x, t[f"{layer}.input_layernorm.weight"], epsilon)
        q, k, v = (linear(t, f"{layer}.self_attn.{part}_proj", inner) for part in "qkv")
        after = x + linear(t, f"{layer}.self_attn.o_proj", attended(q, k, v, heads, kv_heads, config["rope_theta"]))
        dense = mlp(f"{layer}.residual_mlp", normed(after, t[f"{layer}.residual_layernorm.weight"], epsilon))
        inner = normed(x, t[f"{layer}.post_attention_layernorm.weight"], epsilon)
        shares = linear(t, f"{layer}.block_sparse_moe.gate", inner).softmax(-1)
        chosen = shares.topk(config["num_experts_per_tok"], -1)
        mixed = torch.zeros_like(x)
        for place in range(len(tokens)):
            weights = chosen.values[place] / chosen.values[place].sum()
            for weight, expert in zip(weights, chosen.indices[place].tolist(), strict=True):
                mixed[place] += weight * mlp(f"{layer}.block_sparse_moe.experts.{expert}", inner[place])
        x = after + dense + mixed
    return linear(t, "lm_head", normed(x, t["model.norm.weight"], epsilon))


# Their tensors


def values(shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """Seeded values under which every parameter matters: norms around 1, biases around 0."""
    generator = torch.Generator().manual_seed(3)
    result = {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            result[name] = drawn if "embed" in name or "wte" in name else drawn * 2 / shape[-1] ** 0.5
        else:
            result[name] = drawn * 0.3 + (0 if name.endswith("bias") else 1)
    return result


def llama_shapes(config: Config, biases: tuple[str, ...] = (), fused: bool = False) -> dict[str, tuple[int, ...]]:
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    kv = config.get("num_key_value_heads", heads) * hidden // heads
    attention = {"q_proj": hidden, "k_proj": kv, "v_proj": kv, "o_proj": hidden}
    if fused:
        attention = {"W_pack": 3 * hidden, "o_proj": hidden}
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        result["lm_head.weight"] = (vocab, hidden)
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        for name, rows in attention.items():
            result[f"{layer}.self_attn.{name}.weight"] = (rows, hidden)
            if name in biases:
                result[f"{layer}.self_attn.{name}.bias"] = (rows,)
        result |= {
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
        }
    return result


def arctic_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    result = {name: shape for name, shape in llama_shapes(config).items() if ".mlp." not in name}
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        result |= {f"{layer}.residual_layernorm.weight": (hidden,)}
        result |= {f"{layer}.residual_mlp.{name}.weight": (hidden, hidden) for name in ("w1", "w2", "w3")}
        result |= {f"{layer}.block_sparse_moe.gate.weight": (config["num_local_experts"], hidden)}
        for expert in range(config["num_local_experts"]):
            front = f"{layer}.block_sparse_moe.experts.{expert}"
            result |= {f"{front}.w1.weight": (inner, hidden), f"{front}.w3.weight": (inner, hidden)}
            result |= {f"{front}.w2.weight": (hidden, inner)}
    return result


def yi_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    names = {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}
    shapes = llama_shapes(config)
    return {".".join(names.get(part, part) for part in name.split(".")): shape for name, shape in shapes.items()}


def qwen_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"] // 2, config["vocab_size"]
    result: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (vocab, hidden),
        "transformer.ln_f.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for n in range(config["num_hidden_layers"]):
        layer = f"transformer.h.{n}"
        result |= {
            f"{layer}.ln_1.weight": (hidden,),
            f"{layer}.ln_2.weight": (hidden,),
            f"{layer}.attn.c_attn.weight": (3 * hidden, hidden),
            f"{layer}.attn.c_attn.bias": (3 * hidden,),
            f"{layer}.attn.c_proj.weight": (hidden, hidden),
            f"{layer}.mlp.w1.weight": (inner, hidden),
            f"{layer}.mlp.w2.weight": (inner, hidden),
            f"{layer}.mlp.c_proj.weight": (hidden, inner),
        }
    return result


def remote_models(**sizes: Any) -> dict[str, RemoteModel]:
    """One model of each family, with `sizes` in the place of the tiny ones."""
    base = {**SIZES, **sizes}
    grouped = {**base, "num_key_value_heads": base["num_attention_heads"] // 2}

    def named(architecture: str, kind: str, config: Config, **more: Any) -> dict[str, Any]:
        return {**config, **more, "architectures": [architecture], "model_type": kind}

    internlm = named("InternLMForCausalLM", "internlm", base, bias=True)
    internlm3 = named("InternLM3ForCausalLM", "internlm3", grouped, bias=False, qkv_bias=False, rope_theta=500.0)
    skywork = named("SkyworkForCausalLM", "skywork", grouped, hidden_act="silu")
    xverse = named("XverseForCausalLM", "xverse", base, hidden_act="silu", rope_theta=500.0)
    aquila = named("AquilaForCausalLM", "aquila", grouped, hidden_act="silu")
    yi = named("YiForCausalLM", "Yi", grouped, rope_theta=5000.0)
    heads = [base["num_attention_heads"] // 2] * base["num_hidden_layers"]
    deci = named("DeciLMForCausalLM", "deci", grouped, num_key_value_heads_per_layer=heads)
    mimo = named("MiMoForCausalLM", "mimo", grouped, attention_bias=True, num_nextn_predict_layers=1, rope_theta=640.0)
    baichuan1 = named("BaiChuanForCausalLM", "baichuan", base, hidden_act="silu")
    baichuan = named("BaichuanForCausalLM", "baichuan", base, hidden_act="silu")
    scales = {"scale_emb": 3, "scale_depth": 1.4, "dim_model_base": 16}
    mini = named("MiniCPMForCausalLM", "minicpm", base, **scales)
    mini_tied = named("MiniCPMForCausalLM", "minicpm", {**grouped, "tie_word_embeddings": True}, **scales)
    qwen1 = named(
        "QWenLMHeadModel",
        "qwen",
        {key: value for key, value in base.items() if key not in ("rms_norm_eps", "hidden_act")},
        intermediate_size=2 * base["intermediate_size"],
        layer_norm_epsilon=0.01,
        kv_channels=base["hidden_size"] // base["num_attention_heads"],
        rotary_emb_base=500.0,
        rotary_pct=1.0,
        no_bias=True,
        seq_length=64,
        use_dynamic_ntk=True,
        use_logn_attn=True,
    )
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_layer_frequency": 1, "parallel_attn_mlp_res": True}
    snow = named("ArcticForCausalLM", "arctic", grouped, rope_theta=500.0, **experts)
    further = {f"model.mtp_layers.0.{name}.weight": torch.ones(8) for name in ("input_layernorm", "final_layernorm")}
    qkv = ("q_proj", "k_proj", "v_proj")
    return {
        "internlm": RemoteModel(internlm, values(llama_shapes(internlm, (*qkv, "o_proj"))), llama_like),
        "internlm3": RemoteModel(internlm3, values(llama_shapes(internlm3)), llama_like),
        "skywork": RemoteModel(skywork, values(llama_shapes(skywork)), llama_like),
        "xverse": RemoteModel(xverse, values(llama_shapes(xverse)), llama_like),
        "aquila": RemoteModel(aquila, values(llama_shapes(aquila)), llama_like),
        "yi": RemoteModel(yi, values(yi_shapes(yi)), first_yi),
        "decilm": RemoteModel(deci, values(llama_shapes(deci)), llama_like),
        "mimo": RemoteModel(mimo, values(llama_shapes(mimo, qkv)), llama_like, further),
        "baichuan1": RemoteModel(baichuan1, values(llama_shapes(baichuan1, fused=True)), llama_like),
        "baichuan": RemoteModel(baichuan, values(llama_shapes(baichuan, fused=True)), baichuan2),
        "minicpm": RemoteModel(mini, values(llama_shapes(mini)), minicpm),
        "minicpm_tied": RemoteModel(mini_tied, values(llama_shapes(mini_tied)), minicpm),
        "arctic": RemoteModel(snow, values(arctic_shapes(snow)), arctic),
        "qwen": RemoteModel(qwen1, values(qwen_shapes(qwen1)), qwen, {"transformer.visual.proj": torch.ones(8, 8)}),
    }
