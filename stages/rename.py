"""rename: a bijection on names (less `ignore`, plus ties).

Arrays are the same objects but for a row's named operation, which has an inverse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.errors import Problem
from pipeline.model_config import ModelConfig
from pipeline.operations import OPERATIONS
from pipeline.tables import Family, Layout, RenameRow
from pipeline.tensors import Applied, Block, TensorMap, map_blocks


@dataclass(frozen=True)
class Matches:
    """Which row of a family's table each source tensor follows.

    `names`: source tensor -> (its new name, its row). `ties`: new name -> the source tensor whose values it shares.
    `left_out`: source tensor -> why it is not converted. `copies`: source tensor left out as a tie's second copy -> the first.
    """

    names: Mapping[str, tuple[str, RenameRow]]
    ties: Mapping[str, str]
    left_out: Mapping[str, str]
    copies: Mapping[str, str]
    problems: tuple[Problem, ...]

    @cached_property
    def origins(self) -> Mapping[str, str]:
        """New name -> the source tensor that it comes from, ties included."""
        return {**{name: source for source, (name, _) in self.names.items()}, **self.ties}


def match(sources: Mapping[str, object], family: Family, layout: Layout, model: ModelConfig, keep: frozenset[str]) -> Matches:
    """Find every tensor's row. A tensor that no row consumes, or two of one name, is a problem.

    `keep` holds the flags (such as "mlp_bias") whose omitted parameters are wanted all the same.
    """
    rows, ignored = family.rows(), family.ignored()
    names: dict[str, tuple[str, RenameRow]] = {}
    left_out: dict[str, str] = {}
    origins: dict[str, str] = {}
    problems = []
    for source in sources:
        module, _, parameter = source.rpartition(".")
        if ignored.find(module) or ignored.find(source):
            continue
        found = rows.find(module)
        if found is None:
            problems.append(_unconsumed(source, f"no row for it in the table of family {family.name}"))
            continue
        row, numbers = found
        target = row.to.format(**numbers)
        slot = layout.find(target)
        if slot is None or (slot.layer is not None and slot.layer >= model.num_hidden_layers):
            problems.append(_unconsumed(source, f"{model.num_hidden_layers} layers in the model's configuration"))
            continue
        reason = _omitted(family, slot.module.name, parameter, model, keep)
        if reason:
            left_out[source] = reason
            continue
        name = f"{target}.{parameter}"
        if name in origins:
            problems.append(Problem(source, f"the same target as {origins[name]}: {name}", "one source for it"))
        origins[name] = source
        names[source] = (name, row)
    ties, copies = _ties(family, names, origins, model)
    left_out |= dict.fromkeys(copies, "the embeddings are tied, so that this is a copy")
    return Matches(names, ties, left_out, copies, tuple(problems))


def rename(tensors: TensorMap, matches: Matches, model: ModelConfig) -> TensorMap:
    """The tensors under their new names, those with an operation mapped through it, ties as second names of one array."""
    result = {}
    for source, (name, row) in matches.names.items():
        array = tensors[source]
        if row.operation:
            period = model.dimension(row.period)
            array = map_blocks(array, operate, dtype=array.dtype, operation=row.operation, period=period)
        result[name] = array
    for name, source in matches.ties.items():
        result[name] = result[matches.names[source][0]]
    return result


def operate(block: Block, operation: str, period: int) -> Block:
    """A block with an operation of the closed list applied to its rows, `period` of them at a time."""
    return Applied(block, Operate(operation, period), stage="rename", dtype=block.dtype, period=period)


@dataclass(frozen=True)
class Operate:
    """An operation bound to its period: values [rows, ...] to values of the same shape."""

    operation: str
    period: int

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return OPERATIONS[self.operation].forward(values, self.period)


def _omitted(family: Family, module: str, parameter: str, model: ModelConfig, keep: frozenset[str]) -> str:
    for row in family.omit:
        # Only where the model declares them: a bias that config.json does not speak of is an unconsumed tensor.
        if module in row.modules and parameter == row.parameter and row.flag not in keep and getattr(model, row.flag):
            return row.reason
    return ""


def _ties(
    family: Family, names: dict[str, tuple[str, RenameRow]], origins: Mapping[str, str], model: ModelConfig
) -> tuple[dict[str, str], dict[str, str]]:
    """Ties and copies of `Matches`; a copy is taken out of `names`, as tied values come from the original."""
    ties, copies = {}, {}
    for tied, original in family.ties.items():
        sources = {name.rpartition(".")[2]: source for name, source in origins.items() if name.rpartition(".")[0] == original}
        own = [name for name in origins if name.rpartition(".")[0] == tied]
        if model.tie_word_embeddings and sources:
            for name in own:
                copies[origins[name]] = next(iter(sources.values()))
                del names[origins[name]]
        elif own or model.tie_word_embeddings is False:
            continue
        ties.update({f"{tied}.{parameter}": source for parameter, source in sources.items()})
    return ties, copies


def _unconsumed(name: str, expected: str) -> Problem:
    remedy = "A tensor that nothing consumes would be lost: remove it from the checkpoint, or mend the configuration"
    return Problem(name, "a tensor that belongs nowhere", expected, remedy)
