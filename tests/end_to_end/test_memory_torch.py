"""Peak memory is bounded by the setting for PyTorch files too, transposed tensors and the legacy format included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.end_to_end.test_memory import peak
from tests.support import checkpoints

CONFIG: dict[str, Any] = {
    **checkpoints.LLAMA,
    "vocab_size": 32768,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "torch_dtype": "bfloat16",
}
# Their storages hold the transpose, so that each of their rows is spread over all of it.
TRANSPOSED = ("lm_head.weight", "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight")


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 MB of bf16, twice the limit, of which only the shard in the legacy format takes disk; no test looks at the values."""
    directory = tmp_path_factory.mktemp("big")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    shards: tuple[dict[str, torch.Tensor], ...] = ({}, {}, {})
    for name, shape in checkpoints.shapes(CONFIG).items():
        made = torch.empty(shape[::-1], dtype=torch.bfloat16).T if name in TRANSPOSED else torch.empty(shape, dtype=torch.bfloat16)
        shards[0 if "embed" in name else 1 if ".mlp." in name else 2][name] = made
    torch.save(shards[0], directory / "pytorch_model-00001-of-00003.bin", _use_new_zipfile_serialization=False)
    with torch.serialization.skip_data():  # space for the storages, and no bytes: a sparse file
        for number, shard in enumerate(shards[1:], 2):
            torch.save(shard, directory / f"pytorch_model-0000{number}-of-00003.bin")
    return directory


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_pytorch_files(big: Path, dtype: str, tmp_path: Path) -> None:
    limit = 200 << 20
    out = str(tmp_path / "out")
    measured = peak(model_dir=str(big), output_dir=out, tp_size=2, dtype=dtype, scheduler="threads", workers=2, memory_limit=limit)
    assert measured["peak"] <= measured["projected"] <= limit < measured["written"]
