"""Measure what each kind of source costs: `python -m benchmarks.sources`.

One 8B-shaped bf16 model of 4.3 GB as safetensors, PyTorch .bin and a Meta part is converted to TP 2 from each, against `cp -r` of the
output's bytes in alternating pairs, with the peak memory; the three outputs are compared.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.measure import machine, pairs, run
from benchmarks.models import SHAPES, make, tensors, weights

HEADRACE = [sys.executable, "-m", "pipeline.cli", "convert", "--quiet", "--tp_size", "2", "--dtype", "bfloat16"]
TO_META = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "tok_embeddings",
    "lm_head": "output",
}


def as_bin(source: Path, target: Path) -> None:
    """Write the same tensors in one .bin file."""
    target.mkdir(parents=True)
    shutil.copy(source / "config.json", target)
    weights_by_name = {}
    for path in sorted(source.glob("*.safetensors")):
        weights_by_name |= load_file(path)
    torch.save(weights_by_name, target / "pytorch_model.bin")


def as_meta(source: Path, target: Path, layers: int) -> None:
    """Write the same bytes under Meta's names in one part. Heads are not interleaved as Meta's are, so the outputs' rows differ."""
    target.mkdir(parents=True)
    config = {**SHAPES["8B"], "num_hidden_layers": layers}
    weights_by_name, renamed = {}, {}
    for path in sorted(source.glob("*.safetensors")):
        weights_by_name |= load_file(path)
    for name, _ in tensors(config):
        new = name.removeprefix("model.") if ".layers." in name or name == "model.norm.weight" else name
        for old, meta in TO_META.items():
            new = new.replace(old, meta) if old in name else new
        renamed[new] = weights_by_name[name]
    torch.save(renamed, target / "consolidated.00.pth")
    params = {
        "dim": 4096,
        "n_layers": layers,
        "n_heads": 32,
        "n_kv_heads": 8,
        "vocab_size": 128256,
        "norm_eps": 1e-5,
        "hidden_dim": 14336,
    }
    (target / "params.json").write_text(json.dumps({**params, "rope_theta": 500000.0}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="a directory with 30 GB free")
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    print(machine())
    source, packed, meta = work / "safetensors", work / "bin", work / "meta"
    print(f"source: {make(source, '8B', layers=arguments.layers, noise=weights()) / 1e9:.2f} GB of 8B-shaped bf16")
    as_bin(source, packed)
    as_meta(source, meta, arguments.layers)
    reference, output = work / "reference", work / "output"
    run([*HEADRACE, "--model_dir", str(source), "--output_dir", str(reference), "--scheduler", "threads"], remove=reference)
    for name, flags in (
        ("safetensors", ["--model_dir", str(source)]),
        ("PyTorch .bin", ["--model_dir", str(packed)]),
        ("Meta, one part", ["--meta_ckpt_dir", str(meta)]),
    ):
        command = [*HEADRACE, *flags, "--output_dir", str(output), "--scheduler", "threads"]
        run(command, remove=output)
        same = all(
            filecmp.cmp(reference / rank, output / rank, shallow=False) for rank in ("rank0.safetensors", "rank1.safetensors")
        )
        shutil.rmtree(output)
        measured = pairs(command, output, reference, arguments.pairs)
        print(f"{name}: {measured.row()}; output {'equal to' if same else 'other than'} that of safetensors", flush=True)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
