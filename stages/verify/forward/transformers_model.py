"""transformers' own model for a configuration, without weights: its parameters take no memory until they are filled."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.errors import BadInput, Problem
from stages.verify.forward.tensors import to_torch
from stages.verify.named_weights import NamedWeights

BLOCK_BYTES = 32 << 20  # of float32, read at once
# Keys that do not describe the model, but how its weights were stored or how it was run.
DROPPED = ("quantization_config", "compression_config", "auto_map", "torch_dtype", "dtype", "transformers_version")
# The names of transformers' classes that differ from the architecture in config.json.
CLASSES = {"PhiMoEForCausalLM": "PhimoeForCausalLM"}
# How transformers 5 holds the experts of a layer: [E, 2 I, H], the activated half first, and [E, H, I].
STACKS = {"gate_up_proj": (("w1", "gate_proj"), ("w3", "up_proj")), "down_proj": (("w2", "down_proj"),)}
# block_sparse_moe.gate in files
ROUTERS = (".mlp.gate.weight", ".mlp.router.weight", ".block_sparse_moe.router.weight")


@dataclass(frozen=True)
class ParameterPart:
    """A weight and the part of a parameter that it fills: the index `place`, which has a `shape`."""

    name: str
    place: tuple[int | slice, ...]
    shape: tuple[int, ...]


def parameter_parts(name: str, shape: tuple[int, ...], weight_names: set[str]) -> list[ParameterPart]:
    """The weights that fill a parameter: the one of its name, or those that files have in its place."""
    if name in weight_names:
        return [ParameterPart(name, (), shape)]
    for router in ROUTERS:
        renamed = name.replace(router, ".block_sparse_moe.gate.weight")
        if name.endswith(router) and renamed in weight_names:
            return [ParameterPart(renamed, (), shape)]
    front, _, leaf = name.rpartition(".")
    if not front.endswith((".mlp.experts", ".block_sparse_moe.experts")) or leaf not in STACKS or len(shape) != 3:
        return [ParameterPart(name, (), shape)]
    numbered = f"{front.removesuffix('.experts').rpartition('.')[0]}.block_sparse_moe.experts"
    style = 0 if any(weight.startswith(f"{numbered}.") for weight in weight_names) else 1
    projections, rows = STACKS[leaf], shape[1] // len(STACKS[leaf])
    return [
        ParameterPart(
            f"{front if style else numbered}.{expert}.{projection[style]}.weight",
            (expert, slice(n * rows, (n + 1) * rows)),
            (rows, shape[2]),
        )
        for expert in range(shape[0])
        for n, projection in enumerate(projections)
    ]


def rows_of_tokens(weights: NamedWeights, name: str, dtype: torch.dtype) -> Callable[..., tuple[Any, ...]]:
    """A hook that, before an embedding runs, sets its rows to those of the tokens, and replaces these by their places there.

    `name`: of the embedding among the weights.
    """

    def embed(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        used, places = torch.unique(arguments[0], return_inverse=True)
        rows = [to_torch(weights.rows(name, token, token + 1)).to(dtype) for token in used.tolist()]
        module.weight = nn.Parameter(torch.cat(rows), requires_grad=False)
        return (places, *arguments[1:])

    return embed


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The rows [start, stop) of blocks of a float32 array, each of at most BLOCK_BYTES, or of one row."""
    row_bytes = 4 * torch.Size(shape[1:]).numel()
    step = max(BLOCK_BYTES // max(row_bytes, 1), 1)
    yield from ((start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def build_model(config: Mapping[str, Any], dtype: torch.dtype = torch.float32, attention: str = "eager") -> Any:
    """Build the model, with its parameters on the meta device and its buffers computed.

    `dtype`: of its parameters. `attention`: which of transformers' implementations it has.
    """
    transformers = transformers_library()
    architecture = str((config.get("architectures") or [None])[0])
    kind: Any = getattr(transformers, CLASSES.get(architecture, architecture), None)
    if not hasattr(kind, "config_class"):
        found = f"{architecture}, which transformers {transformers.__version__} has no class for"
        raise BadInput([Problem("architectures", found, "a model that transformers runs")])
    try:
        settings = kind.config_class.from_dict(_plain(config))
        settings._experts_implementation = "eager"
        with torch.device("meta"):
            model = kind._from_config(settings, dtype=dtype, attn_implementation=attention).eval()
    except Exception as error:  # transformers' own checks of a configuration raise errors of many kinds
        raise refused_configuration(error) from error
    _compute_buffers(model)
    model.get_input_embeddings().padding_idx = None  # it says nothing of a forward pass, and may lie beyond the rows in use
    return model


def refused_configuration(error: Exception) -> BadInput:
    """The problem of a configuration that transformers makes or runs no model of."""
    found = f"what transformers {transformers_library().__version__} refuses ({type(error).__name__}: {error})"
    return BadInput([Problem("the model's configuration", found, "a configuration of its architecture")])


def set_head_epsilon(model: nn.Module, epsilon: float) -> None:
    """Give the norms of q and k in one of transformers' models another epsilon."""
    for name, module in model.named_modules():
        if name.endswith((".q_norm", ".k_norm")):
            for key in ("variance_epsilon", "eps"):
                if hasattr(module, key):
                    setattr(module, key, epsilon)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the configuration in the form that transformers 5 reads, which also writes in it."""
    plain = copy.deepcopy({key: value for key, value in config.items() if key not in DROPPED})
    scaling = plain.get("rope_scaling")
    if isinstance(scaling, dict) and scaling.get("type") == "mrope":  # of text, whose positions are the same on every axis
        del plain["rope_scaling"]
    # Early Phi-3 models call longrope "su"; where transformers renames it, it loses the trained length.
    if isinstance(scaling, dict) and scaling.get("type") == "su":
        scaling["type"] = "longrope"
    return plain


def _compute_buffers(model: Any) -> None:
    """Compute rotary frequencies and other buffers by the model's own initialization, as when it is loaded from files."""
    for name, module in model.named_modules():
        buffers = [key for key, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        for key in buffers:
            # NaN, so that a buffer that is not computed shows.
            module._buffers[key] = torch.full_like(module._buffers[key], float("nan"), device="cpu")
        if buffers:
            model._init_weights(module)
        for key in buffers:
            if bool(module._buffers[key].isnan().any()):
                found = "a buffer that transformers leaves to be loaded"
                raise BadInput([Problem(f"{name}.{key}", found, "a computed one", "Install transformers 5 or newer")])


def transformers_library() -> Any:
    """The library. Raises BadInput where it is not installed."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        remedy = "Install it with: pip install 'headrace[verify]'"
        raise BadInput([Problem("transformers", f"not installed ({error})", "the library that runs the source", remedy)]) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' warnings, which are about models that are loaded in other ways."""
    logging = transformers_library().logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
