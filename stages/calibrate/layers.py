"""The decoder layers of transformers' model, run one by one: each is filled with weights, run on all samples, and emptied again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import BadInput, Problem
from pipeline.model.awq_settings import AwqSettings
from stages.calibrate.awq_inputs import LayerInputs
from stages.calibrate.devices import device_of, moved, to_numpy
from stages.calibrate.experts import ExpertPart, ExpertStack, Watching, expert_parts
from stages.calibrate.magnitudes import Magnitudes, largest_of_rows
from stages.verify.forward.tensors import to_torch
from stages.verify.forward.transformers_model import build_model, parameter_parts, quiet, row_blocks, rows_of_tokens
from stages.verify.named_weights import NamedWeights

TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
LEAST_WEIGHT = 1e-8  # of a row's largest magnitude, as the reference has it


class _Recorded(Exception):
    """Ends a forward pass whose layers only note what they are given."""


@dataclass(frozen=True)
class LayerSizes:
    """The bytes of a layer's weights: all, those of experts among them, and the largest matrices of one expert."""

    total: int
    experts: int
    one_expert: int


class LayeredModel:
    """transformers' model for `config`, whose decoder layers take `weights` one after the other, in a type by its name.

    `device`: where layers run, by torch's name. Raises BadInput where transformers is not installed or does not know the model, the
    device is not there, or a layer's parameters have no weights of their shapes.
    """

    def __init__(self, config: Mapping[str, Any], weights: NamedWeights, dtype: str, device: str = "cpu") -> None:
        self._weights, self._dtype, self._device = weights, TYPES[dtype], device_of(device)
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
        self._stacks = {name: stack for name, several in self._parts.items() if (stack := expert_parts(several))}

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def began(self) -> bool:
        """Whether a sample has been embedded, so that it is known what layers are given beside activations."""
        return bool(self._given)

    def linears(self, number: int) -> list[str]:
        """The names of a layer's linear modules, those of its experts among them."""
        layer, front = self._layers[number], self._names[number]
        found = [f"{front}.{name}" for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
        return [*found, *(part.module for parts in self._stacks_of(number).values() for each in parts for part in each)]

    def shapes(self, number: int) -> dict[str, tuple[int, int]]:
        """The out- and in-features of a layer's linear modules, without those of experts, by name."""
        found = ((name, module) for name, module in self._layers[number].named_modules() if isinstance(module, nn.Linear))
        return {f"{self._names[number]}.{name}": (module.out_features, module.in_features) for name, module in found}

    def sizes(self) -> LayerSizes:
        """The bytes of the weights of the largest layer."""
        return max((self._sizes(number) for number in range(len(self))), key=lambda sizes: sizes.total)

    def _sizes(self, number: int) -> LayerSizes:
        itemsize, stacks = self._dtype.itemsize, self._stacks_of(number)
        held = {f"{self._names[number]}.{name}": each for name, each in self._layers[number].named_parameters()}
        of_stacks = [held[name] for name in stacks]
        return LayerSizes(
            sum(each.numel() for each in held.values()) * itemsize,
            sum(each.numel() for each in of_stacks) * itemsize,
            sum(each[0].numel() for each in of_stacks) * itemsize,
        )

    def token_flops(self, length: int) -> float:
        """The floating point operations of a token of a sample of some length in the largest layer."""
        sizes, settings = self.sizes(), self._model.config.get_text_config()
        experts = max((len(parts) for parts in self._stacks.values()), default=1)
        used = (getattr(settings, "num_experts_per_tok", None) or experts) / experts
        weights = (sizes.total - sizes.experts + sizes.experts * used) / self._dtype.itemsize
        return 2 * weights + 4 * length * self.hidden

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
        widths += [max(parameter.shape[1:]) for layer in self._layers for parameter in layer.parameters() if parameter.ndim == 3]
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
        self._given = [moved(each, self._device) for each in given]
        return to_numpy(inputs[0][0])

    @contextmanager
    def filled(self, number: int, one_by_one: bool = False, search: LayerInputs | None = None) -> Iterator[Magnitudes]:
        """A layer with its weights in memory, whose linears tell `Magnitudes`, and a `search`, of all that goes through `run`.

        `one_by_one`: experts are read each time that they are asked for.
        """
        layer, front, seen = self._layers[number], self._names[number], Magnitudes()
        empty, stacks = dict(layer.named_parameters()), self._stacks_of(number)
        held = {}
        with ExitStack() as stack:
            for name, parameter in empty.items():
                parts = stacks.get(f"{front}.{name}")
                if parts:
                    held[name] = ExpertStack(parts, parameter, self._device, self._read, not one_by_one)
                    stack.enter_context(_in_place(layer, name, held[name]))
                    continue
                values = torch.empty(parameter.shape, dtype=self._dtype, device=self._device)
                for part in self._parts[f"{front}.{name}"]:
                    self._read(part.name, values[part.place])
                stack.callback(_set, layer, name, parameter)
                _set(layer, name, nn.Parameter(values, requires_grad=False))
            for module in layer.modules():
                module._buffers.update({key: moved(buffer, self._device) for key, buffer in module._buffers.items()})
            for name, module in layer.named_modules():
                if isinstance(module, nn.Linear):
                    full = f"{front}.{name}"
                    seen.largest[f"{full}|w"] = largest_of_rows(module.weight).clip(LEAST_WEIGHT)
                    stack.callback(module.register_forward_hook(_telling(seen, full)).remove)
                    if search:
                        stack.callback(search.hook(full, module).remove)
            if stacks:
                stack.enter_context(Watching(seen.see))
            yield seen
            for experts in held.values():
                for alike in experts.modules():
                    seen.complete(alike)

    def searching(self, settings: AwqSettings, tokens: int) -> LayerInputs:
        """A search of a layer's scales, for `filled`. `tokens`: of all samples."""
        return LayerInputs(settings, self._dtype, tokens)

    def run(self, number: int, hidden: np.ndarray) -> np.ndarray:
        """The output of a layer, which is filled, for one sample [tokens, hidden]."""
        with torch.no_grad():
            result = self._layers[number](to_torch(hidden)[None].to(self._device), **self._given[number])
        return to_numpy((result[0] if isinstance(result, tuple) else result)[0])

    def _read(self, name: str, into: Tensor) -> None:
        for start, stop in row_blocks(tuple(into.shape)):
            into[start:stop] = to_torch(self._weights.rows(name, start, stop))

    def _stacks_of(self, number: int) -> dict[str, tuple[tuple[ExpertPart, ...], ...]]:
        return {name: parts for name, parts in self._stacks.items() if name.startswith(f"{self._names[number]}.")}


def _telling(seen: Magnitudes, name: str) -> Any:
    """A hook that tells of what a linear takes and gives."""

    def tell(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.see(f"{name}|x", inputs[0])
        seen.see(f"{name}|y", output)

    return tell


@contextmanager
def _in_place(layer: nn.Module, name: str, experts: ExpertStack) -> Iterator[None]:
    """Have a module answer with some experts where it is asked for its parameter."""
    place, _, leaf = name.rpartition(".")
    module = layer.get_submodule(place)
    parameter = module._parameters.pop(leaf)
    module.__dict__[leaf] = experts
    try:
        yield
    finally:
        del module.__dict__[leaf]
        module._parameters[leaf] = parameter


def _set(layer: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(layer.get_submodule(module), leaf, parameter)
