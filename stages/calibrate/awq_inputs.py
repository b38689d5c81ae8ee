"""The inputs of a layer's linears, as far as AWQ's search needs them: the mean magnitude of each in-feature, and tokens to try on.

Linears that take the same activations, as queries, keys and values do, have one scale: which they are is seen as the layer
runs. Of its input a linear keeps tokens, evenly taken from all samples; or, where these are more than the input has features, the
sums of products of each two features, from which the error of an output follows as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import BadInput, Problem
from pipeline.model.awq_settings import AwqSettings
from stages.calibrate.awq_search import search
from stages.calibrate.magnitudes import LARGER

SCALE, ERRORS = "awq", "awq_error"  # of a module, in the file


class TakenInput:
    """One input [tokens, features], over all samples. `every`: of how many tokens one is kept; `count`: of all tokens."""

    def __init__(self, features: int, every: int, count: int, device: torch.device) -> None:
        self.names: list[str] = []
        self._every, self._seen, self.kept = every, 0, 0
        self._sums = torch.zeros(features, dtype=torch.float64, device=device)
        many = -(-count // every) > features
        self._products = torch.zeros(features, features, device=device) if many else None
        self._rows: list[Tensor] = []

    def see(self, values: Tensor) -> None:
        """Take in values [..., features] of some tokens."""
        rows = values.detach().reshape(-1, values.shape[-1])
        self._sums += rows.abs().sum(0, dtype=torch.float64)
        some = rows[-self._seen % self._every :: self._every].float()
        self._seen, self.kept = self._seen + len(rows), self.kept + len(some)
        if self._products is None:
            self._rows.append(some)
        else:
            self._products.addmm_(some.T, some)

    def magnitudes(self) -> Tensor:
        """float32 [features]: the mean magnitude of each."""
        return (self._sums / max(self._seen, 1)).float()

    def error_of(self) -> Callable[[Tensor], float]:
        """The sum of squares, over the kept tokens, of the outputs of a weight [rows, features]."""
        if self._products is not None:
            products = self._products
            return lambda weight: float(((weight @ products) * weight).sum(dtype=torch.float64))
        rows = torch.cat(self._rows)
        self._rows = [rows]
        return lambda weight: float((rows @ weight.T).square_().sum(dtype=torch.float64))


class LayerInputs:
    """Watches the linears of one layer while all samples run through it. `count`: the tokens of all samples."""

    def __init__(self, settings: AwqSettings, dtype: torch.dtype, count: int) -> None:
        self._settings, self._dtype, self._count = settings, dtype, count
        self._modules: dict[str, nn.Linear] = {}
        self._inputs: list[TakenInput] = []
        self._leads: dict[str, TakenInput | None] = {}  # by a linear's name: its input, or None where another has taken it in
        self._running: list[tuple[Tensor, TakenInput]] = []  # of the first sample

    def hook(self, name: str, module: nn.Linear) -> Any:
        """Watch a linear; returns the hook, to be removed."""
        self._modules[name] = module
        return module.register_forward_hook(lambda _, inputs, __: self._see(name, inputs[0]))

    def _see(self, name: str, values: Tensor) -> None:
        if name not in self._leads:
            shared = next((taken for other, taken in self._running if _same(other, values)), None)
            if shared is None:
                taken = TakenInput(values.shape[-1], self._settings.taken(self._count), self._count, values.device)
                self._inputs.append(taken)
                self._running.append((values, taken))
            self._leads[name] = None if shared else taken
            (shared or taken).names.append(name)
        else:
            self._running.clear()  # a second sample: all have been seen
        if (lead := self._leads[name]) is not None:
            lead.see(values)

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """`<module>|awq` float32 [in] of each linear, and `<module>|awq_error` float32 [2]: of round-to-nearest and of the scale.

        Raises BadInput naming a module whose activations are no numbers, or whose in-features are no whole groups.
        """
        self._running.clear()
        for taken in self._inputs:
            magnitudes, size = taken.magnitudes(), self._settings.group_size
            if not bool(magnitudes.isfinite().all()):
                found = "activations that are not finite"
                raise BadInput([Problem(taken.names[0], found, "numbers that the type can hold", LARGER)])
            weights = [self._modules[name].weight for name in taken.names]
            if len(magnitudes) % size:
                raise BadInput([Problem(taken.names[0], f"{len(magnitudes)} in-features", f"a multiple of {size}")])
            result = search(magnitudes, taken.error_of(), taken.kept, weights, size, self._dtype)
            for name, *errors in zip(taken.names, result.nearest, result.searched, strict=True):
                yield f"{name}|{SCALE}", result.scale.cpu().numpy()
                yield f"{name}|{ERRORS}", np.array(errors, dtype=np.float32)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, both in memory, are the same memory, or hold the same."""
    if one.shape != other.shape:
        return False
    return (one.data_ptr() == other.data_ptr() and one.stride() == other.stride()) or torch.equal(one, other)
