"""The progress of a calibration: layers that are done, samples of the one that is not, and the time that the rest may take.

Not locked: its owner is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.sinks.activations import Activations


class LayerProgress:
    """Adds up what the layers of a run took. `left` of `layers` are to be done; `files`: where samples of one that is not show."""

    def __init__(self, left: int = 0, layers: int = 0, files: Activations | None = None, now: float = 0.0) -> None:
        self.left, self.layers, self._files = left, layers or left, files
        self._seconds: list[float] = []
        self._begun, self._seen = now, 0

    @property
    def done(self) -> int:
        """How many layers are done, those of earlier runs included."""
        return self.layers - self.left

    def advanced(self, seconds: float, now: float) -> None:
        """Take in that a layer is done, at a time by the clock."""
        self.left -= 1
        self._begun, self._seen = now, 0
        if seconds:  # 0 of what a lost worker had done
            self._seconds.append(seconds)

    def look(self) -> bool:
        """Count the samples of the layer at work; returns whether there are more than before."""
        if not self.left or self._files is None:
            return False
        before, self._seen = self._seen, self._files.samples_done(self.done)
        return self._seen > before

    @property
    def part(self) -> float:
        """How much of the layer at work is done, from 0 to 1, when it was looked at last."""
        return min(self._seen / self._files.shape[0], 1.0) if self._files and self.left else 0.0

    def seconds_left(self, now: float) -> float | None:
        """How long the rest may take, by the layers that were done, or else by the samples of the first; None without either."""
        if not self.left:
            return 0.0
        if self._seconds:
            each = sum(self._seconds) / len(self._seconds)
        elif self.part:
            each = (now - self._begun) / self.part
        else:
            return None
        return max(self.left - self.part, 0.0) * each
