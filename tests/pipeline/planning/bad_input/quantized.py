"""Small quantized checkpoints, changed so that something of them is wrong, and small ones to be quantized."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.support import checkpoints
from tests.support import quantized_checkpoints as source
from tests.support.commands import headrace
from tests.support.quantized_checkpoints import Arrays, Format

FORMATS = source.formats()
Q, K, DOWN = (f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"))
REQUANTIZED = ("--use_weight_only", "--weight_only_precision")


LLAMA = {**source.LLAMA, "hidden_size": 128, "intermediate_size": 256}


def model_of(tmp_path: Path, kind: Format | str, config: dict[str, Any] = LLAMA, **changed: Any) -> Path:
    """A quantized checkpoint; `changed`: `settings` laid over the quantizer's, and `edit`, which changes the stored tensors.

    Layer 0's q_proj comes first, in a file of its own, so that what is wrong with it is met before anything else.
    """
    kind = FORMATS[kind] if isinstance(kind, str) else kind
    stored, _ = source.quantized(source.values(config), kind, config["num_hidden_layers"])
    edit: Callable[[Arrays], None] = changed.pop("edit", lambda _: None)
    edit(stored)
    said = source.described(config, kind)
    if kind.settings:
        said = {**said, "quantization_config": {**kind.settings, **changed.pop("settings", {})}}
    ahead = {name: np.ascontiguousarray(values) for name, values in stored.items() if name.startswith(f"{Q}.")}
    rest = {name: np.ascontiguousarray(values) for name, values in stored.items() if name not in ahead}
    checkpoints.save(tmp_path / "model", said, rest)
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "rest.safetensors")
    save_file(ahead, tmp_path / "model" / "ahead.safetensors")
    for name, content in kind.files.items():
        (tmp_path / "model" / name).write_text(json.dumps(content))
    assert not changed
    return tmp_path / "model"


def dense_model(tmp_path: Path, config: dict[str, Any] = LLAMA, tensors: Arrays | None = None) -> Path:
    checkpoints.save(tmp_path / "model", config, source.values(config) if tensors is None else tensors)
    return tmp_path / "model"


def without(*names: str) -> Callable[[Arrays], None]:
    def edit(stored: Arrays) -> None:
        for name in names:
            del stored[name]

    return edit


def with_tensors(**tensors: np.ndarray) -> Callable[[Arrays], None]:
    """Adds tensors to layer 0's q_proj, or replaces them."""

    def edit(stored: Arrays) -> None:
        stored.update({f"{Q}.{name}": values for name, values in tensors.items()})

    return edit


def dense(*modules: str) -> Callable[[Arrays], None]:
    """Modules that are not quantized, though the others are."""

    def edit(stored: Arrays) -> None:
        plain = source.values(LLAMA)
        for module in modules:
            for name in [name for name in stored if name.startswith(f"{module}.")]:
                del stored[name]
            stored[f"{module}.weight"] = plain[f"{module}.weight"]

    return edit


def otherwise(module: str, kind: Format) -> Callable[[Arrays], None]:
    """A module that is quantized in another way than the others."""

    def edit(stored: Arrays) -> None:
        weight = source.values(LLAMA)[f"{module}.weight"].astype(np.float32)
        for name in [name for name in stored if name.startswith(f"{module}.")]:
            del stored[name]
        packed = kind.quantizer(module, weight).parameters
        stored.update({f"{module}.{name}": values for name, values in packed.items()})

    return edit


def plans(model: Path, *flags: object) -> bool:
    return headrace("plan", "--json", "--model_dir", model, "--output_dir", model.parent / "other", *flags).code == 0


def i32(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int32)


def f16(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float16)


def f32(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)
