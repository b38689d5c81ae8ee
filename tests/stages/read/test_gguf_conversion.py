"""A GGUF file converts to the same bytes as the Hugging Face checkpoint of the values that it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from pipeline import convert
from tests.support import checkpoints, gguf_files
from tests.support.gguf_files import EXPERTS, NAMES

# A few heads of an odd count, so that a rank's part is never a power of two.
GQA = {**checkpoints.LLAMA, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 93}
CASES = {
    "F16": (checkpoints.LLAMA, "F16"),
    "BF16": ({**checkpoints.LLAMA, "torch_dtype": "bfloat16"}, "BF16"),
    "F32": (checkpoints.LLAMA, "F32"),
    "tied": ({**GQA, "tie_word_embeddings": True}, "Q8_0"),
    "Q4_0": (GQA, "Q4_0"),
    "Q4_1": (GQA, "Q4_1"),
    "experts": (checkpoints.MIXTRAL, "F16"),
    "packed experts": (checkpoints.MIXTRAL, "Q8_0"),
}


def back(config: dict[str, Any], held: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """GGUF's tensors under their Hugging Face names, rotary halves put back: by index, not by headrace's operation."""
    size = checkpoints.head_size(config)
    order = [*range(0, size, 2), *range(1, size, 2)]
    names = {ours: theirs for theirs, ours in NAMES.items()}
    result = {}
    for name, array in held.items():
        *layer, short, parameter = name.split(".")
        prefix = f"model.layers.{layer[1]}." if layer else ""
        if short in EXPERTS.values():
            (theirs,) = (theirs for theirs, ours in EXPERTS.items() if ours == short)
            result |= {f"{prefix}block_sparse_moe.experts.{e}.{theirs}.weight": array[e] for e in range(len(array))}
            continue
        if short in ("attn_q", "attn_k"):
            rows = [head * size + row for head in range(len(array) // size) for row in order]
            array = array[rows]
        result[f"{prefix}{names[short]}.{parameter}"] = array
    return result


@pytest.mark.parametrize(("config", "kind"), CASES.values(), ids=CASES)
def test_a_gguf_file_is_the_checkpoint_that_it_holds(config: dict[str, Any], kind: str, tmp_path: Path) -> None:
    held = gguf_files.write(tmp_path / "model.gguf", config, checkpoints.values(config), kind)
    plain = back(config, held)
    assert plain.keys() == checkpoints.shapes(config).keys()
    dtype = "bfloat16" if kind == "BF16" else "float16"
    exact = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}.get(kind, np.float32)
    assert all(array.astype(exact).astype(np.float32).tobytes() == array.tobytes() for array in plain.values() if array.ndim > 1)
    checkpoints.save(tmp_path / "model", {**config, "torch_dtype": "float32"}, plain)
    options = {"dtype": dtype, "tp_size": 2, "pp_size": 2, "scheduler": "threads"}
    convert(model_dir=tmp_path / "model.gguf", output_dir=tmp_path / "ours", **options)
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "theirs", **options)
    for rank in range(4):
        ours, theirs = ((tmp_path / side / f"rank{rank}.safetensors").read_bytes() for side in ("ours", "theirs"))
        assert ours == theirs, rank
