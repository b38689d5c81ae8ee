"""How config.json's `mapping` spreads a model over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from stages.verify.contract.class_values import number_of_experts
from stages.verify.contract.parallel import MappingSizes, read_mapping
from stages.verify.contract.reader import ConfigReader


@dataclass(frozen=True)
class RankLayout:
    """The sizes of the parallel axes. `config`: the whole of config.json."""

    config: Mapping[str, Any]

    @cached_property
    def mapping(self) -> tuple[MappingSizes, ConfigReader]:
        """The sizes, and what is wrong with them."""
        return read_mapping(self.config["mapping"], int(self.config["num_hidden_layers"]), self.experts > 0)

    @property
    def experts(self) -> int:
        """The number of experts of a layer; 0 in a dense model."""
        return number_of_experts(self.config)

    @property
    def tp(self) -> int:
        """The number of ranks of a pipeline stage."""
        return self.mapping[0].tp

    @property
    def pp(self) -> int:
        """The number of pipeline stages."""
        return self.mapping[0].pp

    @property
    def ep(self) -> int:
        """The number of blocks that the experts are split into over a stage's ranks."""
        return self.mapping[0].moe_ep

    @property
    def moe_tp(self) -> int:
        """The number of parts that each expert is split into."""
        return self.mapping[0].moe_tp

    def layers_of(self, stage: int) -> range:
        """The layers of a pipeline stage, by their number in the model."""
        return self.mapping[0].stages()[stage]
