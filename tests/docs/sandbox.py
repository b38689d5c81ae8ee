"""A folder in which the commands of a page are run: tiny models by the names that the pages use, and the files that they speak of.

Absolute folders of the pages (/models, /ranks, /engines) lie below `root` in it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support import act_ranges, checkpoints, gguf_files, meta_files, quantized_checkpoints
from tests.support.places import ROOT, SMOLLM2

# Enough heads and features for what pages ask for: 8 ranks, 2 stages, groups of 128 on 4 ranks.
MODEL = {
    **checkpoints.LLAMA,
    "num_hidden_layers": 2,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 1024,
    "torch_dtype": "bfloat16",
}
FLOAT16 = {**MODEL, "torch_dtype": "float16"}
WORDS = ["<unk>", "</s>", "The", "capital", "of", "France", "is", "Paris", ".", "a", "the", "model"]
FOLDERS = ("/models", "/ranks", "/engines")


def make_models(folder: Path) -> None:
    """Every model that a page names."""
    tensors = checkpoints.write(folder / "Llama-3.1-8B", MODEL)
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(folder / "Llama-3.1-8B")
    for name in ("Llama-3.1-70B", "models/Llama-3.1-70B-Instruct", "models/llama-small", "YOUR_MODEL"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copytree(folder / "Llama-3.1-8B", folder / name, copy_function=_link)
    checkpoints.write(folder / "Llama-2-7b-hf", FLOAT16)
    for name, group in (("Llama-3.1-8B-GPTQ", 128), ("Llama-3.1-8B-GPTQ-g32", 32)):
        quantized_checkpoints.write(folder / name, FLOAT16, quantized_checkpoints.gptq(group=group))
    parts = quantized_checkpoints.gptq(group=128)
    stored, _ = quantized_checkpoints.quantized(quantized_checkpoints.values(FLOAT16), parts, MODEL["num_hidden_layers"])
    save_file(stored, folder / "llama-7b-4bit-gs128.safetensors")
    meta_files.write(folder / "Meta-Llama-3-8B/original", MODEL, tensors)
    gguf_files.write(folder / "model.gguf", FLOAT16, checkpoints.values(FLOAT16))
    act_ranges.write(folder / "ranges.safetensors", quantized_checkpoints.values(FLOAT16))
    save_file({"input_ids": np.arange(64, dtype=np.int64).reshape(4, 16) % 96}, folder / "tokens.safetensors")


def furnish(folder: Path, made: Path) -> None:
    """Lay the models, and what the demo has fetched, into a page's folder."""
    for path in made.iterdir():
        if path.is_dir():
            shutil.copytree(path, folder / path.name, copy_function=_link)
        else:
            _link(path, folder / path.name)
    shutil.copytree(made / "models", folder / "root/models", copy_function=_link)
    (folder / SMOLLM2.name).symlink_to(SMOLLM2)
    (folder / "configs").symlink_to(ROOT / "configs")


def placed(text: str, folder: Path) -> str:
    """A command or file of a page with its absolute folders in the sandbox."""
    for name in FOLDERS:
        text = text.replace(f'"{name}/', f'"{folder}/root{name}/').replace(f" {name}/", f" {folder}/root{name}/")
    return text


def _link(source: object, target: object) -> None:
    Path(str(target)).hardlink_to(str(source))
