"""The rows of a family's table: renamed modules, parameters that are left out, models that are known, and what is said of some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RenameRow:
    """The new name or names of a source module.

    `to`: several names for a fused source module, whose rows are those of each in turn. `groups`: the ModelConfig size that says in
    how many repetitions the source interleaves those rows; "" for one. `operation`: the operation of `pipeline.model.operations`
    that the values go through, "" for none; `period`: the ModelConfig size that is its period in rows.
    """

    to: tuple[str, ...]
    operation: str = ""
    period: str = ""
    groups: str = ""


@dataclass(frozen=True)
class Omission:
    """A parameter of some modules that NVIDIA's converter leaves out, and so headrace does where the job asks for it.

    `modules`: patterns of renamed modules. `flag`: the field of ModelConfig that says whether the model has such parameters, and
    the option of the job that says whether they are kept. `reason`: what the plan reports of a tensor that is left out.
    """

    modules: tuple[str, ...]
    parameter: str
    flag: str
    reason: str


@dataclass(frozen=True)
class KnownModel:
    """A published model whose configuration does not say everything.

    `when`: the keys and values of its configuration that tell it. `name`: the model's; "" where they do not tell which it is.
    `max_position_embeddings` and `rope_scaling_factor` (0.0: no factor is known) are what the configuration leaves out.
    """

    when: Mapping[str, Any]
    max_position_embeddings: int
    rope_scaling_factor: float = 0.0
    name: str = ""


@dataclass(frozen=True)
class Remark:
    """A remark of a plan on models whose configuration has some values.

    `when`: the keys and values. `has`: keys any of which says something. `unlike`: a key whose list has values that differ. `note`:
    what is said of a model that is converted. `refused`: why it is not, in the place of what was expected; "" where it is.
    `remedy`: what would do.
    """

    when: Mapping[str, Any] = field(default_factory=dict)
    has: tuple[str, ...] = ()
    unlike: str = ""
    note: str = ""
    refused: str = ""
    remedy: str = ""
