"""Make a checkpoint of this folder with the tool that it is named after: `python make.py auto-round/sym`, run in this folder.

Each needs its tool, which no test does: README.md says which versions made what is here. The tool's own numbers for each linear, by
its own code, go into expected.json as SHA-256 sums.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "GPTQMODEL_CPU_WORKERS": "2"}

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS, HIDDEN = 64, 128
KEPT = ("config.json", "model.safetensors", "hf_quant_config.json", "expected.json")
Weights = dict[str, torch.Tensor]


def dense(dtype: torch.dtype) -> LlamaForCausalLM:
    """The model that all are made of: one layer, whose rows are not centred, so that zero points differ."""
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_hidden_layers": 1, "vocab_size": WORDS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.08, tie_word_embeddings=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.add_(0.06 * torch.rand(parameter.shape[0], 1))
    return model.to(dtype).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({"<unk>": 0, **{f"w{n}": n for n in range(1, WORDS)}}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>")


def texts() -> list[str]:
    random = torch.Generator().manual_seed(5)
    return [" ".join(f"w{int(n)}" for n in torch.randint(1, WORDS, (40,), generator=random)) for _ in range(32)]


def linears(model: torch.nn.Module, weight: Callable[[Any], torch.Tensor], found: str) -> Weights:
    """The numbers of a layer's linears; those of the tool have an attribute `found`."""
    modules = {name: module for name, module in model.named_modules() if name.endswith("_proj") and hasattr(module, found)}
    return {name: weight(module).detach() for name, module in modules.items()}


# --- GPTQModel


def gptqmodel(out: Path, dtype: torch.dtype, **settings: Any) -> Weights:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    with TemporaryDirectory() as base:
        dense(dtype).save_pretrained(base)
        tokenizer().save_pretrained(base)
        model = GPTQModel.load(base, QuantizeConfig(**settings), device="cpu")
        words = tokenizer()
        model.quantize([words(text)["input_ids"] for text in texts()], batch_size=4)
        model.save(str(out))
    backend = BACKEND.AUTO if settings.get("method") == "fp8" else BACKEND.GPTQ_TORCH
    read = GPTQModel.load(str(out), backend=backend, device="cpu", dtype=torch.float32 if backend is BACKEND.AUTO else dtype)
    return linears(read.model, lambda module: module.dequantize_weight().T, "dequantize_weight")


# --- AutoRound


def auto_round(out: Path, dtype: torch.dtype, packing: str, *, reload: bool = True, **settings: Any) -> Weights:
    """`reload`: the numbers are those of the checkpoint's own layers, else those of AutoRound's model before it is packed."""
    from auto_round import AutoRound

    def run(packing: str, folder: str) -> Path:
        with TemporaryDirectory() as base:
            dense(dtype).save_pretrained(base)
            model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        usual = {"group_size": 64, "iters": 0, "disable_opt_rtn": True, "dataset": texts(), "nsamples": 8, "seqlen": 32}
        AutoRound(model, tokenizer(), device_map="cpu", **usual, **settings).quantize_and_save(folder, format=packing)
        return next(path.parent for path in Path(folder).rglob("config.json"))

    with TemporaryDirectory() as folder, TemporaryDirectory() as fake:
        shutil.copytree(run(packing, folder), out)
        if not reload:
            read = AutoModelForCausalLM.from_pretrained(run("fake", fake), dtype="auto")
            return linears(read, lambda module: module.weight, "weight")
    read = AutoModelForCausalLM.from_pretrained(out, dtype=dtype, device_map="cpu")
    return linears(read, lambda module: module(torch.eye(module.infeatures, dtype=dtype)).T, "qweight")


# --- ModelOpt


def modelopt(out: Path, dtype: torch.dtype, name: str, kind: str, cache: bool = False) -> Weights:
    """`name`: of ModelOpt's settings. `kind`: of its class that stores such a weight."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.export.quant_utils import from_quantized_weight
    from modelopt.torch.quantization import qtensor
    from safetensors.torch import load_file

    words, settings = tokenizer(), getattr(mtq, name)
    if cache:
        settings = mtq.update_quant_cfg_with_kv_cache_quant(settings, mtq.FP8_KV_CFG["quant_cfg"])

    def calibrate(model: torch.nn.Module) -> None:
        with torch.no_grad():
            for text in texts():
                model(torch.tensor([words(text)["input_ids"]]))

    with TemporaryDirectory() as base:
        dense(dtype).save_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    export_hf_checkpoint(mtq.quantize(model, settings, calibrate), export_dir=str(out))
    tensors, weights = load_file(out / "model.safetensors"), {}
    for module in (name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")):
        stored, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"]
        if kind == "fp8":
            weights[module] = from_quantized_weight(stored, scale, kind, torch.float32)
            continue
        shape = torch.Size([stored.shape[0], HIDDEN])
        more = {"double_scale": tensors[f"{module}.weight_scale_2"]} if f"{module}.weight_scale_2" in tensors else {}
        size = {-1: HIDDEN // scale.shape[-1]}
        held = getattr(qtensor, kind)(shape, torch.float32, stored)
        weights[module] = held.dequantize(torch.float32, scale=scale, block_sizes=size, **more)
    return weights


HALF, BRAIN = torch.float16, torch.bfloat16
# How each is made; the type of its numbers; TensorRT-LLM's algorithm that keeps its codes ("" for none), with these options.
MADE: dict[str, tuple[Callable[[Path], Weights], torch.dtype, str, list[str]]] = {
    "gptqmodel/planar": (
        lambda out: gptqmodel(out, HALF, bits=3, group_size=64, sym=False, desc_act=False, format="gptq_p"),
        HALF,
        "W4A16_GPTQ",
        [],
    ),
    "gptqmodel/desc_act": (
        lambda out: gptqmodel(out, HALF, bits=4, group_size=64, sym=False, desc_act=True),
        HALF,
        "W4A16_GPTQ",
        ["--requantize"],
    ),
    "gptqmodel/fp8-block": (
        lambda out: gptqmodel(
            out,
            BRAIN,
            bits=8,
            method="fp8",
            format="float8_e4m3fn",
            weight_scale_method="block",
            weight_block_size=[64, 64],
        ),
        BRAIN,
        "",
        [],
    ),
    "auto-round/sym": (lambda out: auto_round(out, HALF, "auto_round", bits=4, sym=True), HALF, "W4A16_GPTQ", []),
    "auto-round/asym": (
        lambda out: auto_round(out, BRAIN, "auto_round:auto_gptq", reload=False, bits=4, sym=False),
        BRAIN,
        "W4A16_GPTQ",
        [],
    ),
    "modelopt/fp8-kv": (
        lambda out: modelopt(out, BRAIN, "FP8_DEFAULT_CFG", "fp8", cache=True),
        BRAIN,
        "FP8",
        ["--fp8_kv_cache"],
    ),
    "modelopt/nvfp4": (lambda out: modelopt(out, BRAIN, "NVFP4_DEFAULT_CFG", "NVFP4QTensor"), BRAIN, "NVFP4", []),
    "modelopt/mxfp8": (lambda out: modelopt(out, BRAIN, "MXFP8_DEFAULT_CFG", "MXFP8QTensor"), BRAIN, "", []),
}


def described(weights: Weights, dtype: torch.dtype, algorithm: str, options: list[str]) -> dict[str, Any]:
    """What the tests expect: sums of the numbers in the model's type, where a zero has no sign."""
    numbers = {name: (weight.to(dtype) + 0).contiguous() for name, weight in sorted(weights.items())}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "quant_algo": algorithm or None,
        "options": options,
        "layers": 1,
        "rows": {name.split(".", 3)[3]: len(weight) for name, weight in numbers.items()},
        "sha256": {
            name: hashlib.sha256(weight.view(torch.int16).numpy().tobytes()).hexdigest() for name, weight in numbers.items()
        },
    }


def main(names: list[str]) -> None:
    for name in names or list(MADE):
        make, dtype, algorithm, options = MADE[name]
        out = Path(name)
        shutil.rmtree(out, ignore_errors=True)
        expected = described(make(out), dtype, algorithm, options)
        (out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
        shutil.rmtree("logs", ignore_errors=True)  # GPTQModel's
        settings = out / "config.json"  # which says where GPTQModel had moved weights to
        settings.write_text(re.sub(r'("offload_to_disk_path": )"[^"]*"', r'\1""', settings.read_text()))
        for path in out.iterdir():
            if path.name not in KEPT:
                path.unlink()
            else:
                path.chmod(0o644)


if __name__ == "__main__":
    main(sys.argv[1:])
