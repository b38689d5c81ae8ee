"""`headrace inspect`: the facts of a checkpoint of every kind and family, as a table and as JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.support import checkpoints, gguf_files, meta_files
from tests.support.checkpoints import LLAMA, MIXTRAL
from tests.support.inspections import facts, inspected, table
from tests.support.places import DATA

MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "head_dim": 16, "sliding_window": 32}
TIED = {**LLAMA, "tie_word_embeddings": True, "torch_dtype": "bfloat16"}


def sizes(config: dict[str, Any]) -> dict[str, int]:
    names = ["num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size"]
    return {**{name: config[name] for name in names}, "head_size": checkpoints.head_size(config)}


def check(path: Path, expected: dict[str, Any], config: dict[str, Any], positions: int = 128) -> dict[str, Any]:
    """Compare what is said as JSON with what was written; returns what is said beside that."""
    said = inspected(path)
    assert {name: said.pop(name) for name in expected} == expected
    model = said.pop("model")
    assert model.pop("max_position_embeddings") == positions
    experts = {name: model.pop(name) for name in ("num_experts", "experts_per_token") if name in model}
    if config.get("num_local_experts"):
        assert experts == {"num_experts": config["num_local_experts"], "experts_per_token": config["num_experts_per_tok"]}
    else:
        assert not experts
    assert model == sizes(config)
    assert said.pop("pp_sizes") == [1, config["num_hidden_layers"]]
    files = said.pop("files")
    homes = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    assert {file["file"]: file["bytes"] for file in files} == {file.name: file.stat().st_size for file in homes}
    return said


@pytest.mark.parametrize(
    ("config", "family", "tied"),
    [(LLAMA, "llama", False), (MISTRAL, "mistral", False), (TIED, "llama", True), (MIXTRAL, "mixtral", False)],
    ids=["llama", "mistral", "tied", "mixtral"],
)
def test_a_hugging_face_directory(config: dict[str, Any], family: str, tied: bool, tmp_path: Path) -> None:
    path = tmp_path / "model"
    expected = {
        "path": str(path),
        "kind": "Hugging Face safetensors",
        "architecture": config["architectures"][0],
        "family": family,
        "dtype": config["torch_dtype"],
        "quantization": None,
        "tied_embeddings": tied,
        **facts(checkpoints.write(path, config)),
        "tp_sizes": [1, 2, 4, 8],
        "problems": [],
    }
    rest = check(path, expected, config)
    assert rest.keys() == {"conversions"} | ({"moe_sizes"} if "num_local_experts" in config else set())


def test_shards(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "model", LLAMA, shards=3)
    said = inspected(tmp_path / "model")
    # The index is read, and holds nothing of the model.
    homes = [tmp_path / "model" / name for name in ("config.json", *(f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)))]
    assert said["files"] == [{"file": home.name, "bytes": home.stat().st_size} for home in homes]
    assert {name: said[name] for name in facts(source)} == facts(source)


def test_pytorch_files(tmp_path: Path) -> None:
    source = checkpoints.values(LLAMA)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA))
    tensors = {name: meta_files.tensor(array) for name, array in source.items()}
    torch.save(tensors, tmp_path / "model" / "pytorch_model.bin")
    expected = {"kind": "Hugging Face PyTorch .bin", "family": "llama", "dtype": "float16", **facts(source), "problems": []}
    check(tmp_path / "model", expected, LLAMA)


@pytest.mark.parametrize(("parts", "files"), [(1, 0), (4, 0), (2, 2)])
def test_a_meta_checkpoint(parts: int, files: int, tmp_path: Path) -> None:
    path = tmp_path / "model"
    config = {**LLAMA, "torch_dtype": "bfloat16"}
    source = checkpoints.values(config)
    meta_files.write(path, config, source, parts, files=files)
    said = inspected(path)
    kind = f"Meta checkpoint ({parts} part{'s' if parts > 1 else ''})"
    expected = {"kind": kind, "architecture": "LlamaForCausalLM", "family": "meta_llama", "dtype": "bfloat16", **facts(source)}
    assert {name: said[name] for name in expected} == expected
    assert (said["tied_embeddings"], said["tp_sizes"], said["pp_sizes"], said["problems"]) == (False, [1, 2, 4, 8], [1, 3], [])
    assert said["model"] == {**sizes(LLAMA), "max_position_embeddings": 2048}
    assert len(said["files"]) == 1 + parts * max(files, 1)


@pytest.mark.parametrize(("kind", "quantization"), [("F16", None), ("F32", None), ("Q8_0", "gguf"), ("Q4_0", "gguf")])
def test_a_gguf_file(kind: str, quantization: str | None, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    gguf_files.write(path, LLAMA, checkpoints.values(LLAMA), kind)
    said = check(path, {"kind": f"GGUF ({kind})", "architecture": "llama", "family": "gguf_llama", "problems": []}, LLAMA)
    assert said["quantization"] == quantization
    assert said["dtype"] == {"F16": "float16", "F32": "float32"}.get(kind)
    assert said["bytes"] == sum(said["bytes_by_dtype"].values()) < path.stat().st_size
    assert (said["tied_embeddings"], said["tp_sizes"]) == (False, [1, 2, 4, 8])


def test_a_gguf_file_with_experts(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    gguf_files.write(path, MIXTRAL, checkpoints.values(MIXTRAL))
    said = check(path, {"architecture": "llama+experts", "family": "gguf_mixtral", "problems": []}, MIXTRAL)
    assert said["moe_sizes"]["4"] == [[1, 4], [2, 2], [4, 1]]


# Of each model its family, and what config.json calls the sizes that are not called so everywhere.
FAMILIES = {
    "exaone": ("exaone", {"num_hidden_layers": "num_layers"}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3", {}),
    "internlm2": ("internlm2", {}),
    "phi3": ("phi3", {}),
    "phi3_longrope": ("phi3", {}),
    "phimoe": ("phimoe", {}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen2_tied": ("qwen2", {}),
    "qwen3_untied": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", {}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str) -> None:
    path = DATA / "families" / "models" / name
    family, names = FAMILIES[name]
    config = json.loads((path / "config.json").read_text())
    config = {**config, **config.get("text_config", {})}
    said = inspected(path)
    with safe_open(path / "model.safetensors", "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    assert (said["family"], said["architecture"]) == (family, json.loads((path / "config.json").read_text())["architectures"][0])
    assert (said["tensors"], said["parameters"]) == (len(shapes), sum(map(math.prod, shapes.values())))
    if name == "internlm2":
        (problem,) = said["problems"]
        assert "rope_scaling.alpha: found dynamic without it" in problem
        assert "--rope_scaling none" in problem
    else:
        assert said["problems"] == []
    assert said["model"]["num_hidden_layers"] == said["pp_sizes"][1] or (family.startswith("phi") and said["pp_sizes"] == [1, 1])
    assert said["quantization"] is None
    assert said["dtype"] == (config.get("torch_dtype") or config["dtype"])
    for size in ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        assert said["model"][size] == config[names.get(size, size)], size
    heads = [key for key in shapes if key in ("lm_head.weight", "output.weight")]
    assert said["tied_embeddings"] is not bool(heads)
    assert bool(said["model"].get("num_experts")) is ("moe" in name)
    shown = table(path)
    assert shown["family"] == [f"{family} ({said['architecture']})"]
    assert shown["embeddings"] == ["tied" if said["tied_embeddings"] else "not tied"]


def test_the_table_says_what_the_json_says(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", MIXTRAL)
    shown, said = table(tmp_path / "model"), inspected(tmp_path / "model")
    assert shown["path"][0].replace(" ", "") == str(tmp_path / "model").replace(" ", "")
    assert shown["source"] == ["Hugging Face safetensors, 2 files, 60 tensors, 818.4 KiB"]
    assert shown["family"] == ["mixtral (MixtralForCausalLM)"]
    assert shown["weights"] == [f"{said['parameters']:,} parameters; F16 818.4 KiB; --dtype auto: from float16"]
    assert shown["quantization"] == ["none"]
    assert shown["model"] == [", ".join(f"{name} {value}" for name, value in said["model"].items())]
    assert shown["embeddings"] == ["not tied"]
    assert shown["tp_size"] == ["1, 2, 4, 8"]
    assert shown["pp_size"][0].startswith("1 to 3")
    for size, pairs in said["moe_sizes"].items():
        text = ", ".join(f"{tp} x {ep}" for tp, ep in pairs)
        assert f"tp_size {size}: moe_tp_size x moe_ep_size {text}" in shown["pp_size"][0]
