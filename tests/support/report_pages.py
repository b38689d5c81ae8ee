"""Checkpoints and verification summaries of any size for the tests of `headrace report`, without a tensor behind them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.tensor.checkpoint import Checkpoint

KINDS = {
    "input_layernorm": ["input_layernorm"],
    "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.dense": ["self_attn.o_proj"],
    "post_layernorm": ["post_attention_layernorm"],
    "mlp.fc": ["mlp.gate_proj"],
    "mlp.gate": ["mlp.up_proj"],
    "mlp.proj": ["mlp.down_proj"],
}
OUTSIDE = {"vocab_embedding": ["model.embed_tokens"], "ln_f": ["model.norm"], "lm_head": ["lm_head"]}
FINDING = {
    "level": "integrity",
    "subject": "rank1.safetensors: transformer.layers.3.mlp.fc.weight",
    "found": "xxh3 1f2e3d4c5b6a7988",
    "expected": "xxh3 a1b2c3d4e5f60718, as headrace.json has it",
    "remedy": "The file changed after it was written: convert again, or copy it again from where it came",
}


@dataclass(frozen=True)
class Shape:
    """A tensor's shape and type; the rest of a file's tensor is not asked for."""

    shape: tuple[int, ...]
    dtype: np.dtype


def checkpoint(layers: int = 32, tp: int = 2, pp: int = 1, *, provenance: bool = True, **options: Any) -> Checkpoint:
    """A Llama of 8B's sizes in bytes of weights, headers only."""
    hidden, inner, vocab = 4096, 14336, 128256
    int8, fp16 = np.dtype(np.int8), np.dtype(np.float16)
    shapes = {
        "input_layernorm.weight": Shape((hidden,), fp16),
        "attention.qkv.weight": Shape((hidden, 6144 // tp), int8),
        "attention.qkv.per_channel_scale": Shape((6144 // tp,), fp16),
        "attention.dense.weight": Shape((hidden // tp, hidden), int8),
        "post_layernorm.weight": Shape((hidden,), fp16),
        "mlp.fc.weight": Shape((hidden, inner // tp), int8),
        "mlp.gate.weight": Shape((hidden, inner // tp), int8),
        "mlp.proj.weight": Shape((inner // tp, hidden), int8),
    }
    ranks = []
    for rank in range(tp * pp):
        held = range(layers // pp)
        tensors = {f"transformer.layers.{n}.{name}": shape for n in held for name, shape in shapes.items()}
        if rank < tp:
            tensors["transformer.vocab_embedding.weight"] = Shape((vocab, hidden), fp16)
        if rank >= tp * (pp - 1):
            tensors["transformer.ln_f.weight"] = Shape((hidden,), fp16)
            tensors["lm_head.weight"] = Shape((vocab // tp, hidden), fp16)
        ranks.append(tensors)
    config = {
        "architecture": "LlamaForCausalLM",
        "dtype": "float16",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": vocab,
        "mapping": {"world_size": tp * pp, "tp_size": tp, "pp_size": pp},
        "quantization": {"quant_algo": "W8A16", "kv_cache_quant_algo": None},
    }
    told = headrace_json(tp=tp, pp=pp, **options) if provenance else {}
    return Checkpoint(Path("/ranks/llama-3.1-8b-int8-tp2"), config, tuple(ranks), told)  # type: ignore[arg-type]


def headrace_json(*, tp: int = 2, pp: int = 1, cuts: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    """What headrace.json says of a quantizing run of half a minute, or of one with cuts."""
    seconds = {"read": 3.1, "cast": 4.3, "quantize": 21.9, "shard": 1.2, "checksum": 2.6, "write": 8.4}
    if "unpack" in cuts:
        seconds["unpack"] = 6.2
    nbytes = {"read": 16.1e9, "cast": 16.1e9, "quantize": 14e9, "shard": 5.6e9, "checksum": 9.1e9, "write": 9.1e9, "unpack": 8e9}
    return {
        "headrace": "0.1.0",
        "id": "19301a808b492c34b771a39c42b93ce4bc8e49f2396cfab67a6609252413e6b4",
        "source": {
            "path": "/models/Llama-3.1-8B-Instruct",
            "kind": "Hugging Face safetensors",
            "files": [
                {
                    "path": f"model-{n:05}-of-00004.safetensors",
                    "size_bytes": 4_976_698_672,
                    "mtime_ns": 1_721_700_000_000_000_000 + n,
                    "header_sha256": f"{n}" * 64,
                }
                for n in range(1, 5)
            ],
        },
        "options": {"tp_size": tp, "pp_size": pp, "dtype": "auto", "use_weight_only": True, "sm": 80},
        "left_out": {"model.layers.0.self_attn.rotary_emb.inv_freq": "computed by the loader"},
        "notes": [],
        "copied": ["tokenizer.json"],
        "timings": {
            "seconds": 28.4,
            "stages": {name: {"seconds": value, "bytes": nbytes[name]} for name, value in seconds.items()},
            "phases": {**{f"scratch after {stage}": 11.0 for stage in cuts}, "write": 26.2},
        },
        **more,
    }


def tensor(
    name: str, kind: str, layer: int | None, sources: list[str], snr: float | None, storage: str, ranks: int
) -> dict[str, Any]:
    """A tensor of a round trip with figures that belong together; `snr` None: bit-identical."""
    rms = 0.0 if snr is None else 10 ** (-snr / 20)
    return {
        "name": name,
        "layer": layer,
        "kind": kind,
        "ranks": list(range(ranks)),
        "elements": 4096 * 4096,
        "storage": storage,
        "exact": snr is None,
        "max_abs": rms / 20,
        "relative_rms": rms,
        "snr_db": snr,
        "cosine": 1.0 if snr is None else 1 / (1 + rms * rms) ** 0.5,
        "bound": 0.0 if snr is None else 0.93,
        "sources": sources,
    }


def summary(layers: int = 32, ranks: int = 2, *, snr: float = 41.0, storage: str = "weight-only", **more: Any) -> dict[str, Any]:
    """A verification that passed, of a model whose matrices are quantized and whose norms and embedding are as they were."""
    random_ = random.Random(layers)
    tensors = []
    for kind, sources in OUTSIDE.items():
        name = "lm_head.weight" if kind == "lm_head" else f"transformer.{kind}.weight"
        tensors.append(tensor(name, kind, None, [f"{source}.weight" for source in sources], None, "dense", ranks))
    for layer in range(layers):
        for n, (kind, sources) in enumerate(KINDS.items()):
            names = [f"model.layers.{layer}.{source}.weight" for source in sources]
            # The first and the last layers are the hardest to quantize.
            edge = 5 * (0.6**layer + 0.5 ** (layers - 1 - layer)) if n in (1, 6) else 0
            value = None if "norm" in kind else snr + n / 4 + random_.uniform(-0.7, 0.7) - edge
            kept = "dense" if "norm" in kind else storage
            tensors.append(tensor(f"transformer.layers.{layer}.{kind}.weight", kind, layer, names, value, kept, ranks))
    against = {
        "top1_agreement": 0.984375,
        "max_abs": 0.41,
        "max_relative": 0.021,
        "kl_mean": 0.0012,
        "kl_max": 0.038,
        "bound": 0.05,
    }
    joined = {"top1_agreement": 1.0, "max_abs": 0.0, "max_relative": 0.0, "kl_mean": 0.0, "kl_max": 0.0, "bound": 1e-3}
    return {
        "directory": "/ranks/llama-3.1-8b-int8-tp2",
        "source": "/models/Llama-3.1-8B-Instruct",
        "version": "0.1.0",
        "ok": True,
        "seconds": 75.25,
        "findings": [],
        "integrity": {"tensors": 323 * ranks, "bytes": 9_100_000_000, "checksums": 323 * ranks, "seconds": 3.9},
        "round_trip": {"seconds": 48.6, "bytes": 25_200_000_000, "tensors": tensors},
        "logits": {
            "tokens": 64,
            "seconds": 22.75,
            "comparisons": [{"against": "source", **against}, {"against": "joined ranks", **joined}],
        },
        **more,
    }


def failed(layers: int = 32, **more: Any) -> dict[str, Any]:
    """The same with a finding of each level, and a tensor whose error is more than allowed."""
    made = summary(layers, **more)
    bad = next(one for one in made["round_trip"]["tensors"] if one["name"] == "transformer.layers.3.mlp.fc.weight")
    bad |= {"snr_db": 2.7, "bound": 61.4, "relative_rms": 0.73, "max_abs": 0.19, "cosine": 0.704}
    name = bad["name"]
    findings = [
        FINDING,
        {**FINDING, "level": "round trip", "subject": name, "found": "9 of 64 values off", "expected": "0.5 there, by the source"},
        {**FINDING, "level": "logits", "subject": "/ranks/tp2", "found": "logits differ", "expected": "at most 1e-3", "remedy": ""},
    ]
    return {**made, "ok": False, "findings": findings}
