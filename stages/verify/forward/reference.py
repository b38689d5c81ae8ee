"""reference: run the source's own model with transformers, layer by layer.

In memory are one decoder layer's weights at a time, the embedding's rows of the prompt's tokens, and a block of lm_head's rows: so
a model can run that is far larger than the machine's memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import Problem, VerificationFailed
from stages.verify.forward.tensors import to_torch
from stages.verify.forward.transformers_model import (
    ParameterPart,
    build_model,
    parameter_parts,
    quiet,
    refused_configuration,
    row_blocks,
    rows_of_tokens,
    set_head_epsilon,
)
from stages.verify.named_weights import NamedWeights


class Reference:
    """transformers' model for `config` with some `weights`, on the CPU, in float32."""

    def __init__(self, config: Mapping[str, Any], weights: NamedWeights, head_epsilon: float = 0.0) -> None:
        """`head_epsilon`: in the place of transformers' own in the norms of q and k; 0 for its own.

        Raises VerificationFailed naming parameters without a weight, and weights without a parameter or of another shape.

        Raises BadInput where transformers is not installed, or does not know the model.
        """
        self._weights = weights
        with quiet():
            self._model = build_model(config)
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
        embedding = self._parts[self._embedding_name][0].name
        self._embedding.register_forward_pre_hook(rows_of_tokens(weights, embedding, torch.float32))
        self._head.forward = self._logits

    def logits(self, tokens: Tensor) -> Tensor:
        """The logits of one sequence of tokens, int64 [tokens]: float32 [tokens, vocabulary], or [tokens, labels] of a classifier.

        Raises IndexError for no tokens, and for tokens beyond the embedding; BadInput for a configuration whose masks transformers
        does not make, such as one of local layers without a window.
        """
        rows = self._weights.shape(self._parts[self._embedding_name][0].name)[0]
        if tokens.ndim != 1 or not tokens.numel() or int(tokens.min()) < 0 or int(tokens.max()) >= rows:
            raise IndexError(f"tokens of shape {list(tokens.shape)}; expected one sequence of tokens 0 to {rows - 1}")
        try:
            with torch.no_grad(), quiet():
                if self._classifier:  # which gives the last token's alone
                    hidden = self._model.get_decoder()(input_ids=tokens[None], use_cache=False).last_hidden_state
                    return self._logits(hidden[0])
                result: Tensor = self._model(input_ids=tokens[None], use_cache=False).logits[0]
        except ValueError as error:
            raise refused_configuration(error) from error
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
            result[name] = parameter_parts(weight_name, tuple(parameter.shape), weight_names)
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
        for start, stop in row_blocks(tuple(into.shape)):
            into[start:stop] = to_torch(self._weights.rows(name, start, stop))

    def _logits(self, hidden: Tensor) -> Tensor:
        """Compute lm_head of `hidden` [..., hidden], some of its rows at a time."""
        (part,) = self._parts[self._head_name]
        result = torch.empty(*hidden.shape[:-1], part.shape[0])
        for start, stop in row_blocks(part.shape):
            rows = to_torch(self._weights.rows(part.name, start, stop)).float()
            result[..., start:stop] = functional.linear(hidden, rows)
        bias = self._head.bias
        return result + bias if isinstance(bias, Tensor) else result
