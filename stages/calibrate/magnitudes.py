"""The largest magnitudes of activations, added up over samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import BadInput, Problem
from stages.verify.forward.transformers_model import row_blocks

# In `headrace calibrate` and in a conversion, whose --dtype is that of what it writes.
LARGER = "Give --calibration_dtype bfloat16 or float32, which hold more than float16, or mend the checkpoint"


def largest_of_rows(weight: Tensor) -> Tensor:
    """float32 [out]: the largest magnitude of each row of a matrix [out, in], a few rows at a time."""
    return torch.cat([weight[start:stop].abs().amax(1).float() for start, stop in row_blocks(tuple(weight.shape))])


class Magnitudes:
    """The largest magnitudes of each channel of what linears take and give; float32 arrays by "<module>|x", "|y" and "|w"."""

    def __init__(self) -> None:
        self.largest: dict[str, Tensor] = {}

    def see(self, name: str, values: Tensor) -> None:
        """Take in values [..., channels]."""
        if not values.numel():
            return
        found = values.detach().reshape(-1, values.shape[-1]).abs().amax(0).float()
        before = self.largest.get(name)
        self.largest[name] = found if before is None else torch.maximum(before, found)

    def complete(self, alike: Sequence[str]) -> None:
        """Give those of some modules that have seen nothing the largest of what the others take: experts that no token came to."""
        names = [f"{module}|x" for module in alike]
        seen = [self.largest[name] for name in names if name in self.largest]
        for name in names:
            if seen and name not in self.largest:
                self.largest[name] = torch.stack(seen).amax(0)

    def arrays(self) -> dict[str, np.ndarray]:
        """The values that were found. Raises BadInput naming a module of whose values some were no numbers."""
        for name, values in self.largest.items():
            if not bool(values.isfinite().all()):
                found = "activations that are not finite"
                raise BadInput([Problem(name.partition("|")[0], found, "numbers that the type can hold", LARGER)])
        return {name: values.cpu().numpy() for name, values in self.largest.items()}
