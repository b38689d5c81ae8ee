"""rename: a bijection on names (less `ignore`, plus ties; a fused module has a name for each of its parts).

Arrays are the same objects but for a fused module's rows, each of which goes to one part, and a row's named operation, which has
an inverse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import Problem
from pipeline.model_config import ModelConfig
from pipeline.operations import OPERATIONS
from pipeline.placement import Interval
from pipeline.tables import Family, Layout, RenameRow, Slot
from pipeline.tensors import Applied, Block, LazyTensor, TensorMap, map_blocks, tensor_bytes

if TYPE_CHECKING:
    import dask.array as da


@dataclass(frozen=True)
class Renamed:
    """Where a tensor comes from: its source tensor and the table's row that this follows.

    `rows`: which of the source's rows (on `axis`) are its own, in order, where it is one part of a fused source of `total` rows.
    """

    source: str
    row: RenameRow
    rows: tuple[Interval, ...] = ()
    axis: int = 0
    total: int = 1

    @property
    def share(self) -> Fraction:
        """The part of the source's bytes that is this tensor's."""
        return Fraction(sum(stop - start for start, stop in self.rows) or self.total, self.total)


@dataclass(frozen=True)
class Matches:
    """Which row of a family's table each source tensor follows.

    `names`: new name -> where it comes from. `ties`: new name -> the source tensor whose values it shares.
    `left_out`: source tensor -> why it is not converted. `copies`: source tensor left out as a tie's second copy -> the first.
    """

    names: Mapping[str, Renamed]
    ties: Mapping[str, str]
    left_out: Mapping[str, str]
    copies: Mapping[str, str]
    problems: tuple[Problem, ...]

    @cached_property
    def origins(self) -> Mapping[str, str]:
        """New name -> the source tensor that it comes from, ties included."""
        return {**{name: renamed.source for name, renamed in self.names.items()}, **self.ties}

    def origin(self, name: str) -> str:
        """The source tensor that a tensor comes from; for an unpacked one, a packed parameter of its module."""
        if name in self.origins:
            return self.origins[name]
        module = name.rpartition(".")[0]
        return next((source for new, source in self.origins.items() if new.rpartition(".")[0] == module), name)

    def source_bytes(self, name: str, sources: Mapping[str, LazyTensor]) -> int:
        """The bytes that a tensor is made of in the source; 0 for a computed one."""
        tensor, renamed = sources.get(self.origin(name)), self.find(name)
        return int(tensor_bytes(tensor) * (renamed.share if renamed else 1)) if tensor else 0

    def find(self, name: str) -> Renamed | None:
        """Where a tensor comes from; for an unpacked one, where the packed parameters of its module do. None for a tie."""
        return self.names.get(name) or self._modules.get(name.rpartition(".")[0])

    @cached_property
    def _modules(self) -> Mapping[str, Renamed]:
        return {name.rpartition(".")[0]: renamed for name, renamed in self.names.items()}


def match(sources: Mapping[str, object], family: Family, layout: Layout, model: ModelConfig, keep: frozenset[str]) -> Matches:
    """Find every tensor's row. A tensor that no row consumes, or two of one name, is a problem.

    `keep` holds the flags (such as "mlp_bias") whose omitted parameters are wanted all the same.
    """
    rows, ignored = family.rows(), family.ignored()
    names: dict[str, Renamed] = {}
    left_out: dict[str, str] = {}
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
        targets = [to.format(**numbers) for to in row.to]
        slots = [slot for slot in map(layout.find, targets) if slot]
        if not slots or (slots[0].layer is not None and slots[0].layer >= model.num_hidden_layers):
            problems.append(_unconsumed(source, f"{model.num_hidden_layers} layers in the model's configuration"))
            continue
        reason = _omitted(family, slots[0].module.name, parameter, model, keep)
        if reason:
            left_out[source] = reason
            continue
        for target, renamed in zip(targets, _parts(source, row, slots, model), strict=True):
            name = f"{target}.{parameter}"
            if name in names:
                problems.append(Problem(source, f"the same target as {names[name].source}: {name}", "one source for it"))
            names[name] = renamed
    ties, copies = _ties(family, names, model)
    left_out |= dict.fromkeys(copies, "the embeddings are tied, so that this is a copy")
    return Matches(names, ties, left_out, copies, tuple(problems))


def rename(tensors: TensorMap, matches: Matches, model: ModelConfig) -> TensorMap:
    """The tensors under their new names, those with an operation mapped through it, ties as second names of one array."""
    result = {}
    for name, renamed in matches.names.items():
        array, row = tensors[renamed.source], renamed.row
        if renamed.rows:
            array = _rows(array, renamed)
        if row.operation:
            period = model.dimension(row.period) if row.period else 1
            dtype = OPERATIONS[row.operation].dtype(array.dtype)
            array = map_blocks(array, operate, dtype=dtype, operation=row.operation, period=period)
        result[name] = array
    sources = {renamed.source: name for name, renamed in matches.names.items()}
    for name, source in matches.ties.items():
        result[name] = result[sources[source]]
    return result


def _parts(source: str, row: RenameRow, slots: Sequence[Slot], model: ModelConfig) -> list[Renamed]:
    """What each name of a row has of the source: all of it, or, of several names, each its own rows."""
    if len(slots) == 1:
        return [Renamed(source, row)]
    groups = model.dimension(row.groups) if row.groups else 1
    sizes = [model.dimension(slot.out) // groups for slot in slots]
    starts, group = [0, *accumulate(sizes)], sum(sizes)
    parts = []
    for start, size in zip(starts, sizes, strict=False):
        rows = tuple((n * group + start, n * group + start + size) for n in range(groups))
        parts.append(Renamed(source, row, rows, int(slots[0].stacked), groups * group))
    return parts


def _rows(array: da.Array, renamed: Renamed) -> da.Array:
    """The rows of an array that are a part's own: slices of its blocks, one after the other."""
    before = (slice(None),) * renamed.axis
    parts = [array[(*before, slice(*rows))] for rows in renamed.rows]
    return parts[0] if len(parts) == 1 else _joined(parts, renamed.axis)


def _joined(parts: Sequence[da.Array], axis: int) -> da.Array:
    """da.concatenate with a block's task as `lower` takes it, and without its copies."""
    import dask.array as da
    from dask._task_spec import Alias
    from dask.highlevelgraph import HighLevelGraph

    name = f"join-{parts[0].name}"
    graph, first = {}, 0
    for part in parts:
        for index in np.ndindex(*part.numblocks):
            key = (name, *index[:axis], first + index[axis], *index[axis + 1 :])
            graph[key] = Alias(key, (part.name, *index))
        first += part.numblocks[axis]
    lengths = tuple(length for part in parts for length in part.chunks[axis])
    chunks = (*parts[0].chunks[:axis], lengths, *parts[0].chunks[axis + 1 :])
    layers = HighLevelGraph.from_collections(name, graph, dependencies=parts)
    return da.Array(layers, name, chunks=chunks, meta=np.empty((0,) * len(chunks), dtype=parts[0].dtype))


def operate(block: Block, operation: str, period: int) -> Block:
    """A block with an operation of the closed list applied to its rows, `period` of them at a time."""
    dtype = OPERATIONS[operation].dtype(block.dtype)
    return Applied(block, Operate(operation, period), stage="rename", dtype=dtype, period=period)


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


def _ties(family: Family, names: dict[str, Renamed], model: ModelConfig) -> tuple[dict[str, str], dict[str, str]]:
    """Ties and copies of `Matches`; a copy is taken out of `names`, as tied values come from the original."""
    ties, copies = {}, {}
    for tied, original in family.ties.items():
        sources = {name.rpartition(".")[2]: row.source for name, row in names.items() if name.rpartition(".")[0] == original}
        own = [name for name in names if name.rpartition(".")[0] == tied]
        if model.tie_word_embeddings and sources:
            for name in own:
                copies[names.pop(name).source] = next(iter(sources.values()))
        elif own or model.tie_word_embeddings is False:
            continue
        ties.update({f"{tied}.{parameter}": source for parameter, source in sources.items()})
    return ties, copies


def _unconsumed(name: str, expected: str) -> Problem:
    remedy = "A tensor that nothing consumes would be lost: remove it from the checkpoint, or mend the configuration"
    return Problem(name, "a tensor that belongs nowhere", expected, remedy)
