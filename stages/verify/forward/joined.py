"""Join the weights of a checkpoint's ranks again, under Hugging Face's names, so that transformers can run them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

from pipeline.tensor.checkpoint import Checkpoint
from stages.verify.matrices import matrix
from stages.verify.roundtrip.origin import Origin
from stages.verify.values import read, to_float32


class JoinedWeights:
    """The ranks' weights by the source's names, quantized ones as numbers.

    `origins`: of the ranks' tensors in the source's. `shapes`: of the source's tensors by name.
    """

    def __init__(self, checkpoint: Checkpoint, origins: Iterable[Origin], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.checkpoint, self.shapes = checkpoint, shapes
        self.origins: dict[str, list[Origin]] = defaultdict(list)
        for origin in origins:
            if origin.source:
                self.origins[origin.source].append(origin)

    def names(self) -> tuple[str, ...]:
        """The names of the source's tensors that the ranks hold."""
        return tuple(name for name in self.shapes if name in self.origins)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the source's tensor."""
        return self.shapes[name]

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop), float32 [stop - start, ...], gathered from the ranks; of copies, any one."""
        result = np.zeros((stop - start, *self.shapes[name][1:]), dtype=np.float32)
        for origin in self.origins[name]:
            first, last = max(start, origin.source_rows[0]), min(stop, origin.source_rows[1])
            if first < last:
                row = origin.rows[0] + first - origin.source_rows[0]
                values = self._read(origin, row, row + last - first) - np.float32(origin.added)
                place = result[first - start : last - start]
                (place[:, slice(*origin.columns)] if origin.columns else place)[...] = values
        return result

    def _read(self, origin: Origin, start: int, stop: int) -> np.ndarray:
        tensor = self.checkpoint.ranks[origin.rank][origin.tensor]
        if len(tensor.shape) == 1:
            return to_float32(read(tensor, ((start, stop),)))
        stored = matrix(self.checkpoint, origin.rank, origin.module, origin.expert)
        values = stored.rows(start, stop)
        return values if stored.prequant is None else values * stored.prequant
