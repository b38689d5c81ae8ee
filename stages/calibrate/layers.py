"""The decoder layers of transformers' model, run one by one: each is filled with weights, run on all samples, and emptied again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import BadInput, Problem
from stages.calibrate.awq_inputs import AwqSettings, LayerInputs
from stages.verify.forward.tensors import to_torch
from stages.verify.forward.transformers_model import build_model, parameter_parts, quiet, row_blocks, rows_of_tokens
from stages.verify.named_weights import NamedWeights

TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
LEAST_WEIGHT = 1e-8  # of a row's largest magnitude, as the reference has it


class _Recorded(Exception):
    """Ends a forward pass whose layers only note what they are given."""


class Magnitudes:
    """The largest magnitudes of each channel of what linears take and give; float32 arrays by "<module>|x", "|y" and "|w"."""

    def __init__(self) -> None:
        self.largest: dict[str, Tensor] = {}

    def see(self, name: str, values: Tensor) -> None:
        """Take in values [..., channels]."""
        found = values.detach().reshape(-1, values.shape[-1]).abs().amax(0).float()
        before = self.largest.get(name)
        self.largest[name] = found if before is None else torch.maximum(before, found)

    def arrays(self) -> dict[str, np.ndarray]:
        """The values that were found. Raises BadInput naming a module of whose values some were no numbers."""
        for name, values in self.largest.items():
            if not bool(values.isfinite().all()):
                found = "activations that are not finite"
                remedy = "Give --dtype bfloat16 or float32, whose range is larger, or mend the checkpoint"
                raise BadInput([Problem(name.partition("|")[0], found, "numbers that the type can hold", remedy)])
        return {name: values.numpy() for name, values in self.largest.items()}


class LayeredModel:
    """transformers' model for `config`, whose decoder layers take `weights` one after the other, in a type by its name.

    Raises BadInput where transformers is not installed or does not know the model, or where a layer's parameters have no weights of
    their shapes.
    """

    def __init__(self, config: Mapping[str, Any], weights: NamedWeights, dtype: str) -> None:
        self._weights, self._dtype = weights, TYPES[dtype]
        # As NVIDIA's script runs models; it has no cap on scores.
        self._eager = bool(config.get("attn_logit_softcapping"))
        with quiet():
            self._model = build_model(config, self._dtype, "eager" if self._eager else "sdpa")
        names = {id(module): name for name, module in self._model.named_modules()}
        embedding: nn.Module = self._model.get_input_embeddings()
        embedding.register_forward_pre_hook(rows_of_tokens(weights, f"{names[id(embedding)]}.weight", self._dtype))
        self._layers: Sequence[nn.Module] = list(self._model.get_decoder().layers)
        self._names = [names[id(layer)] for layer in self._layers]
        self._given: list[dict[str, Any]] = []
        known = set(weights.names())
        self._parts = {
            f"{front}.{name}": parameter_parts(f"{front}.{name}", tuple(parameter.shape), known)
            for front, layer in zip(self._names, self._layers, strict=True)
            for name, parameter in layer.named_parameters()
        }
        parts = [part for some in self._parts.values() for part in some]
        shapes = {part.name: tuple(weights.shape(part.name)) if part.name in known else None for part in parts}
        problems = []
        for part in parts:
            if shapes[part.name] != part.shape:
                found = "no such weight" if shapes[part.name] is None else f"shape {shapes[part.name]}"
                problems.append(Problem(part.name, found, f"shape {list(part.shape)}, as transformers' model has it"))
        if problems:
            raise BadInput(problems)

    def __len__(self) -> int:
        return len(self._layers)

    def linears(self, number: int) -> list[str]:
        """The names of a layer's linear modules."""
        layer, front = self._layers[number], self._names[number]
        return [f"{front}.{name}" for name, module in layer.named_modules() if isinstance(module, nn.Linear)]

    def widths(self, number: int) -> dict[str, int]:
        """The in-features of a layer's linear modules, by name."""
        layer, front = self._layers[number], self._names[number]
        return {f"{front}.{name}": module.in_features for name, module in layer.named_modules() if isinstance(module, nn.Linear)}

    def layer_bytes(self) -> int:
        """The bytes of the weights of the largest layer."""
        counts = (sum(parameter.numel() for parameter in layer.parameters()) for layer in self._layers)
        return max(counts) * self._dtype.itemsize

    @property
    def hidden(self) -> int:
        """The features of an activation between two layers."""
        return int(self._model.config.get_text_config().hidden_size)

    @property
    def vocabulary(self) -> int:
        """The tokens that there are."""
        return int(self._model.config.get_text_config().vocab_size)

    @property
    def positions(self) -> int:
        """The longest sequence."""
        return int(self._model.config.get_text_config().max_position_embeddings)

    def token_bytes(self, length: int) -> int:
        """The most bytes of activations that a token of a sample of some length takes inside a layer.

        What each linear takes and gives, the largest four times (activated, multiplied, and in float32 where magnitudes are taken),
        and scores of all positions where attention is computed by parts.
        """
        widths = [max(module.weight.shape) for layer in self._layers for module in layer.modules() if isinstance(module, nn.Linear)]
        heads = int(self._model.config.get_text_config().num_attention_heads) if self._eager else 1
        itemsize, widest = self._dtype.itemsize, max(widths)
        return (8 * self.hidden + 4 * widest) * itemsize + 4 * widest + heads * length * (2 * itemsize + 4)

    def embedded(self, tokens: np.ndarray) -> np.ndarray:
        """The first layer's input for a sample, [tokens, hidden], in the model's type.

        The other things that layers are given, such as masks and rotary embeddings, are noted: they are those of every sample of
        that length.
        """
        inputs: list[Tensor] = []
        given: list[dict[str, Any]] = []

        def note(hidden: Tensor, *_: Any, **more: Any) -> Tensor:
            inputs.append(hidden)
            given.append(more)
            if len(given) == len(self._layers):
                raise _Recorded
            return hidden

        before = [layer.forward for layer in self._layers]
        try:
            for layer in self._layers:
                layer.forward = note
            with torch.no_grad(), quiet():
                self._model.get_decoder()(input_ids=torch.from_numpy(np.array(tokens, dtype=np.int64))[None], use_cache=False)
        except _Recorded:
            pass
        finally:
            for layer, forward in zip(self._layers, before, strict=True):
                layer.forward = forward
        self._given = given
        return _array(inputs[0][0])

    @contextmanager
    def filled(self, number: int, search: LayerInputs | None = None) -> Iterator[Magnitudes]:
        """A layer with its weights in memory, whose linears tell `Magnitudes`, and a `search`, of all that goes through `run`."""
        layer, front, seen = self._layers[number], self._names[number], Magnitudes()
        empty = dict(layer.named_parameters())
        for name, parameter in empty.items():
            values = torch.empty(parameter.shape, dtype=self._dtype)
            for part in self._parts[f"{front}.{name}"]:
                self._read(part.name, values[part.place])
            _set(layer, name, nn.Parameter(values, requires_grad=False))
        hooks = []
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                full = f"{front}.{name}"
                seen.largest[f"{full}|w"] = module.weight.abs().amax(1).float().clip(LEAST_WEIGHT)
                hooks.append(module.register_forward_hook(_telling(seen, full)))
                hooks += [search.hook(full, module)] if search else []
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()
            for name, parameter in empty.items():
                _set(layer, name, parameter)

    def searching(self, settings: AwqSettings, tokens: int) -> LayerInputs:
        """A search of a layer's scales, for `filled`. `tokens`: of all samples."""
        return LayerInputs(settings, self._dtype, tokens)

    def run(self, number: int, hidden: np.ndarray) -> np.ndarray:
        """The output of a layer, which is filled, for one sample [tokens, hidden]."""
        with torch.no_grad():
            result = self._layers[number](to_torch(hidden)[None], **self._given[number])
        return _array((result[0] if isinstance(result, tuple) else result)[0])

    def _read(self, name: str, into: Tensor) -> None:
        for start, stop in row_blocks(tuple(into.shape)):
            into[start:stop] = to_torch(self._weights.rows(name, start, stop))


def _telling(seen: Magnitudes, name: str) -> Any:
    """A hook that tells of what a linear takes and gives."""

    def tell(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.see(f"{name}|x", inputs[0])
        seen.see(f"{name}|y", output)

    return tell


def _set(layer: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(layer.get_submodule(module), leaf, parameter)


def _array(values: Tensor) -> np.ndarray:
    values = values.contiguous()
    if values.dtype == torch.bfloat16:
        return values.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return values.numpy()
