"""reference: run the source's own model with transformers, layer by layer.

In memory are one decoder layer's weights at a time, the embedding's rows of the prompt's tokens, and a block of lm_head's rows: so
a model can run that is far larger than the machine's memory.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import BadInput, Problem, VerificationFailed
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


class Reference:
    """transformers' model for `config` with some `weights`, on the CPU, in float32."""

    def __init__(self, config: Mapping[str, Any], weights: NamedWeights, head_epsilon: float = 0.0) -> None:
        """`head_epsilon`: in the place of transformers' own in the norms of q and k; 0 for its own.

        Raises VerificationFailed naming parameters without a weight, and weights without a parameter or of another shape.

        Raises BadInput where transformers is not installed, or does not know the model.
        """
        self._weights = weights
        with _quiet():
            self._model = _build(config)
        if head_epsilon:
            set_head_epsilon(self._model, head_epsilon)
        self._embedding: nn.Module = self._model.get_input_embeddings()
        self._classifier = hasattr(self._model, "score")
        self._head: nn.Module = self._model.score if self._classifier else self._model.get_output_embeddings()
        self._parts = self._matched(bool(self._model.config.tie_word_embeddings))
        layers: Sequence[nn.Module] = self._model.get_decoder().layers
        names = {id(module): name for name, module in self._model.named_modules()}
        inside = {f"{names[id(layer)]}.": layer for layer in layers}
        outer = [name for name in self._parts if not name.startswith(tuple(inside))]
        self._fill([name for name in outer if name not in (self._embedding_name, self._head_name)])
        for front, layer in inside.items():
            self._on_demand(layer, [name for name in self._parts if name.startswith(front)])
        self._embedding.register_forward_pre_hook(self._embed)
        self._head.forward = self._logits

    def logits(self, tokens: Tensor) -> Tensor:
        """The logits of one sequence of tokens, int64 [tokens]: float32 [tokens, vocabulary], or [tokens, labels] of a classifier.

        Raises IndexError for no tokens, and for tokens beyond the embedding.
        """
        rows = self._weights.shape(self._parts[self._embedding_name][0].name)[0]
        if tokens.ndim != 1 or not tokens.numel() or int(tokens.min()) < 0 or int(tokens.max()) >= rows:
            raise IndexError(f"tokens of shape {list(tokens.shape)}; expected one sequence of tokens 0 to {rows - 1}")
        with torch.no_grad(), _quiet():
            if self._classifier:  # which gives the last token's alone
                hidden = self._model.get_decoder()(input_ids=tokens[None], use_cache=False).last_hidden_state
                return self._logits(hidden[0])
            result: Tensor = self._model(input_ids=tokens[None], use_cache=False).logits[0]
        return result

    def _matched(self, tied: bool) -> dict[str, list[ParameterPart]]:
        """Match the weights with the model's parameters; returns the parts of each parameter by its name."""
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        names = {id(module): name for name, module in self._model.named_modules()}
        self._embedding_name = f"{names[id(self._embedding)]}.weight"
        self._head_name = f"{names[id(self._head)]}.weight"
        weight_names = set(self._weights.names())
        result, problems = {}, []
        for name, parameter in parameters.items():
            weight_name = self._embedding_name if name == self._head_name and name not in weight_names and tied else name
            result[name] = _parts(weight_name, tuple(parameter.shape), weight_names)
            for part in result[name]:
                shape = self._weights.shape(part.name) if part.name in weight_names else None
                if shape is None:
                    problems.append(Problem(part.name, "no such weight", f"one of shape {list(part.shape)}, as the model has it"))
                elif tuple(shape) != part.shape:
                    problems.append(Problem(part.name, f"shape {list(shape)}", f"{list(part.shape)}, as the model has it"))
        used = {part.name for parts in result.values() for part in parts}
        extra = sorted(weight_names - used)
        problems += [Problem(name, "a weight that the model has no place for", "the model's parameters alone") for name in extra]
        if problems:
            raise VerificationFailed(problems)
        return result

    def _on_demand(self, layer: nn.Module, names: Sequence[str]) -> None:
        """Keep a layer's parameters in memory only while it runs."""
        empty = {name: self._model.get_parameter(name) for name in names}

        def load(*_: Any) -> None:
            self._fill(names)

        def drop(*_: Any) -> None:
            for name, parameter in empty.items():
                self._set(name, parameter)

        layer.register_forward_pre_hook(load)
        layer.register_forward_hook(drop)

    def _fill(self, names: Sequence[str]) -> None:
        """Read some parameters from the weights."""
        for name in names:
            values = torch.empty(self._model.get_parameter(name).shape)
            for part in self._parts[name]:
                self._read(part.name, values[part.place])
            self._set(name, nn.Parameter(values, requires_grad=False))

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        module, _, leaf = name.rpartition(".")
        setattr(self._model.get_submodule(module), leaf, parameter)

    def _read(self, name: str, into: Tensor) -> None:
        for start, stop in _blocks(tuple(into.shape)):
            into[start:stop] = to_torch(self._weights.rows(name, start, stop))

    def _embed(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before the embedding runs, set its rows to those of the prompt's tokens, and replace the tokens by their places there."""
        used, places = torch.unique(arguments[0], return_inverse=True)
        name = self._parts[self._embedding_name][0].name
        rows = [to_torch(self._weights.rows(name, token, token + 1)).float() for token in used.tolist()]
        module.weight = nn.Parameter(torch.cat(rows), requires_grad=False)
        return (places, *arguments[1:])

    def _logits(self, hidden: Tensor) -> Tensor:
        """Compute lm_head of `hidden` [..., hidden], some of its rows at a time."""
        (part,) = self._parts[self._head_name]
        result = torch.empty(*hidden.shape[:-1], part.shape[0])
        for start, stop in _blocks(part.shape):
            rows = to_torch(self._weights.rows(part.name, start, stop)).float()
            result[..., start:stop] = functional.linear(hidden, rows)
        bias = self._head.bias
        return result + bias if isinstance(bias, Tensor) else result


def _parts(name: str, shape: tuple[int, ...], weight_names: set[str]) -> list[ParameterPart]:
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


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The rows [start, stop) of blocks of a float32 array, each of at most BLOCK_BYTES, or of one row."""
    row_bytes = 4 * torch.Size(shape[1:]).numel()
    step = max(BLOCK_BYTES // max(row_bytes, 1), 1)
    yield from ((start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _build(config: Mapping[str, Any]) -> Any:
    """Build the model, with its parameters on the meta device and its buffers computed."""
    transformers = _transformers()
    architecture = str((config.get("architectures") or [None])[0])
    kind: Any = getattr(transformers, CLASSES.get(architecture, architecture), None)
    if not hasattr(kind, "config_class"):
        found = f"{architecture}, which transformers {transformers.__version__} has no class for"
        raise BadInput([Problem("architectures", found, "a model that transformers runs")])
    try:
        settings = kind.config_class.from_dict(_plain(config))
        settings._experts_implementation = "eager"
        with torch.device("meta"):
            model = kind._from_config(settings, dtype=torch.float32, attn_implementation="eager").eval()
    except Exception as error:  # transformers' own checks of a configuration raise errors of many kinds
        found = f"what transformers {transformers.__version__} refuses ({type(error).__name__}: {error})"
        raise BadInput([Problem("the model's configuration", found, "a configuration of its architecture")]) from error
    _compute_buffers(model)
    model.get_input_embeddings().padding_idx = None  # it says nothing of a forward pass, and may lie beyond the rows in use
    return model


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


def _transformers() -> Any:
    """The library. Raises BadInput where it is not installed."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        remedy = "Install it with: pip install 'headrace[verify]'"
        raise BadInput([Problem("transformers", f"not installed ({error})", "the library that runs the source", remedy)]) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' warnings, which are about models that are loaded in other ways."""
    logging = _transformers().logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
