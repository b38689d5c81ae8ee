"""The settings of AWQ's search, and the memory that they take; without torch, as a plan is made with them."""

from __future__ import annotations

from dataclasses import dataclass

RATIOS = 20
BLOCK_ELEMENTS = 1 << 22  # of a weight that are rounded at once
WORKING_BYTES = 6 * 4 * BLOCK_ELEMENTS  # of the search
TOKENS = 2048


@dataclass(frozen=True)
class AwqSettings:
    """The target of a search: `group_size` in-features that have a scale. `tokens`: how many the error is measured on."""

    group_size: int
    tokens: int = TOKENS

    def taken(self, tokens: int) -> int:
        """Of how many tokens one is taken, of as many in all."""
        return max(-(-tokens // self.tokens), 1)

    def held_bytes(self, features: int, tokens: int) -> int:
        """The bytes that are kept of the input of a linear with so many in-features."""
        return 4 * features * min(features, -(-tokens // self.taken(tokens)))
