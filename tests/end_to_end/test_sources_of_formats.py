"""What is quantized does not depend on where the model came from: GGUF, memory, a directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import convert
from tests.support import checkpoints, gguf_files
from tests.support import quantized_checkpoints as source
from tests.support.quantized_checkpoints import LLAMA, MIXTRAL
from tests.support.rank_matrices import AGAIN


@pytest.mark.parametrize("config", [LLAMA, MIXTRAL], ids=["dense", "experts"])
@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_gguf_is_quantized_as_the_checkpoint_that_it_holds(kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    from tests.stages.read.test_gguf_conversion import back

    held = back(config, gguf_files.write(tmp_path / "model.gguf", config, source.values(config), kind))
    checkpoints.save(tmp_path / "model", config, held)
    options = {"tp_size": 2, "dtype": "bfloat16", "scheduler": "threads", **AGAIN["int8"][0]}
    convert(model_dir=tmp_path / "model.gguf", output_dir=tmp_path / "ours", **options)
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "theirs", **options)
    for rank in range(2):
        ours, theirs = ((tmp_path / side / f"rank{rank}.safetensors").read_bytes() for side in ("ours", "theirs"))
        assert ours == theirs


@pytest.mark.parametrize("scheduler", ["threads", "local"])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_model_in_memory_is_quantized_as_the_directory_that_it_saves(kind: str, scheduler: str, tmp_path: Path) -> None:
    import transformers

    config = MIXTRAL if kind == "mixtral" else LLAMA
    torch.manual_seed(0)
    of_class = {"mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM)}.get(
        kind, (transformers.LlamaConfig, transformers.LlamaForCausalLM)
    )
    settings = {
        key: value for key, value in config.items() if key not in ("architectures", "model_type", "torch_dtype", "rope_theta")
    }
    model = of_class[1](of_class[0](**settings)).to(torch.float16)
    model.save_pretrained(tmp_path / "model")
    options = {"tp_size": 2, "scheduler": scheduler, **AGAIN["int4"][0]}
    convert(model=model, output_dir=tmp_path / "ours", **options)
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "theirs", **options)
    for rank in range(2):
        ours, theirs = ((tmp_path / side / f"rank{rank}.safetensors").read_bytes() for side in ("ours", "theirs"))
        assert ours == theirs
