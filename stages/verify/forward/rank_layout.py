"""How config.json's `mapping` spreads a model over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RankLayout:
    """The sizes of the parallel axes. `config`: the whole of config.json."""

    config: Mapping[str, Any]

    def _mapping(self, key: str, default: int) -> int:
        """A size of `mapping`; `default` where it is missing or -1."""
        value = int(self.config["mapping"].get(key, default))
        return value if value > 0 else default

    @property
    def tp(self) -> int:
        """The number of ranks of a pipeline stage."""
        return self._mapping("tp_size", 1)

    @property
    def pp(self) -> int:
        """The number of pipeline stages."""
        return self._mapping("pp_size", 1)

    @property
    def ep(self) -> int:
        """The number of blocks that the experts are split into over a stage's ranks."""
        return self._mapping("moe_ep_size", 1)

    @property
    def moe_tp(self) -> int:
        """The number of parts that each expert is split into."""
        return self._mapping("moe_tp_size", self.tp // self.ep)

    def layers_of(self, stage: int) -> range:
        """The layers of a pipeline stage, by their number in the model: the first stages have one more where they are uneven."""
        each, more = divmod(int(self.config["num_hidden_layers"]), self.pp)
        first = stage * each + min(stage, more)
        return range(first, first + each + (stage < more))
