"""The weights of a checkpoint's ranks put together again, by Hugging Face's names: what transformers can run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pipeline.tensor.checkpoint import Checkpoint
from stages.verify.matrices import matrix
from stages.verify.roundtrip.origin import Piece
from stages.verify.values import read


class Joined:
    """`shapes`: of the source's tensors, of which `pieces` say where each part is. Quantized weights are given as numbers."""

    def __init__(self, checkpoint: Checkpoint, pieces: Iterable[Piece], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.checkpoint, self.shapes = checkpoint, shapes
        self.pieces: dict[str, list[Piece]] = defaultdict(list)
        for piece in pieces:
            if piece.source:
                self.pieces[piece.source].append(piece)

    def names(self) -> tuple[str, ...]:
        """The tensors of the source that the ranks hold."""
        return tuple(name for name in self.shapes if name in self.pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """float32 [stop - start, ...]: gathered from the ranks; of copies, any."""
        result = torch.zeros(stop - start, *self.shapes[name][1:])
        for piece in self.pieces[name]:
            first, last = max(start, piece.source_rows[0]), min(stop, piece.source_rows[1])
            if first < last:
                row = piece.rows[0] + first - piece.source_rows[0]
                values = self._read(piece, row, row + last - first) - piece.added
                place = result[first - start : last - start]
                (place[:, slice(*piece.columns)] if piece.columns else place).copy_(values)
        return result

    def _read(self, piece: Piece, start: int, stop: int) -> Tensor:
        tensor = self.checkpoint.ranks[piece.rank][piece.tensor]
        if len(tensor.shape) == 1:
            return read(tensor, ((start, stop),)).float()
        held = matrix(self.checkpoint, piece.rank, piece.module, piece.expert)
        values = held.rows(start, stop)
        return values if held.prequant is None else values * held.prequant
