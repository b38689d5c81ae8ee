"""rename: a bijection on names (less `ignore`, plus ties; a fused module has a name for each of its parts).

Arrays are the same objects but for a fused module's rows, each of which goes to one part, and a row's named operation, which has
an inverse.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from types import MappingProxyType

import numpy as np

from pipeline.errors import Problem
from pipeline.model.family_rows import RenameRow
from pipeline.model.model_config import ModelConfig
from pipeline.model.operations import OPERATIONS
from pipeline.model.patterns import PatternTable
from pipeline.model.tables import Family, Layout, Slot, slot_names
from pipeline.tensor.arrays import BlockArray
from pipeline.tensor.names import TensorName
from pipeline.tensor.placement import Interval
from pipeline.tensor.rows import take_rows
from pipeline.tensor.tensors import CODES, Applied, Block, LazyTensor, TensorMap, map_blocks, tensor_bytes

LOST = (
    "A tensor that nothing consumes would be lost: mend the configuration, or, if it is not the model's, convert a copy without it"
)
UNPACKED = "Convert the model that it was quantized from"


@dataclass(frozen=True, slots=True)
class Renamed:
    """Where a tensor comes from: its source tensor and the table's row that this follows.

    `rows`: which of the source's rows (on `axis`) are its own, in order, where it is one part of a fused source of `total` rows.
    """

    source: TensorName
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

    names: Mapping[TensorName, Renamed]
    ties: Mapping[TensorName, TensorName]
    left_out: Mapping[TensorName, str]
    copies: Mapping[TensorName, TensorName]
    problems: tuple[Problem, ...]

    @cached_property
    def origins(self) -> Mapping[TensorName, TensorName]:
        """New name -> the source tensor that it comes from, ties included."""
        return {**{name: renamed.source for name, renamed in self.names.items()}, **self.ties}

    def origin(self, name: TensorName) -> TensorName:
        """The source tensor that a tensor comes from; for an unpacked one, a packed parameter of its module."""
        if name in self.ties:
            return self.ties[name]
        renamed = self.find(name)
        return renamed.source if renamed else name

    def source_bytes(self, name: TensorName, sources: Mapping[TensorName, LazyTensor]) -> int:
        """The bytes that a tensor is made of in the source: of an unpacked weight, all of its module's; 0 for a computed one."""
        if name in self.ties:
            return tensor_bytes(sources[self.ties[name]])
        exact = [self.names[name]] if name in self.names else []
        packed = [renamed for renamed in self._modules.get(name.module, ()) if renamed.source.parameter != "bias"]
        origins = packed if name.parameter in ("weight", *CODES) else exact
        return sum(_share(tensor_bytes(sources[renamed.source]), renamed) for renamed in origins)

    def find(self, name: TensorName) -> Renamed | None:
        """Where a tensor comes from; for an unpacked one, where the packed parameters of its module do. None for a tie."""
        return self.names.get(name) or next(iter(self._modules.get(name.module, ())), None)

    @cached_property
    def _modules(self) -> Mapping[str, tuple[Renamed, ...]]:
        modules: dict[str, tuple[Renamed, ...]] = {}
        for name, renamed in self.names.items():
            modules[name.module] = (*modules.get(name.module, ()), renamed)
        return modules


def match(
    sources: Iterable[TensorName],
    family: Family,
    layout: Layout,
    model: ModelConfig,
    keep: frozenset[str],
    zeros: Collection[TensorName] = (),
    packed: Mapping[str, Mapping[str, Sequence[str]]] = MappingProxyType({}),
) -> Matches:
    """Find every tensor's row. A tensor that no row consumes, or two of one name, is a problem.

    `keep` holds the flags (such as "mlp_bias") whose omitted parameters are kept all the same. `zeros` are biases of nothing but
    zeros, which go where the model has no such bias. `packed`: the axes of packed modules' parameters, by module and local
    name; any other parameter has `out` first.
    """
    rows, ignored, around = family.rows(), family.ignored(), _attention(family, layout)
    names: dict[TensorName, Renamed] = {}
    left_out: dict[TensorName, str] = {}
    problems = []
    set_aside = tuple(family.left_out.items())
    for source in sources:
        module, parameter = source
        if ignored.find(module) or ignored.find(str(source)):
            continue
        if set_aside and (reason := next((why for front, why in set_aside if str(source).startswith(front)), "")):
            left_out[source] = reason
            continue
        row_match = rows.find(module)
        owner = around.find(module) if parameter in packed.get(module, {}) else None
        if row_match is None and owner and owner[1].get("layer", 0) < model.num_hidden_layers:
            names[TensorName(owner[0].format(**owner[1]), parameter)] = Renamed(source, RenameRow((owner[0],)))
            continue
        if row_match is None:
            problems.append(_unconsumed(source, f"no row for it in the table of family {family.name}"))
            continue
        row, numbers = row_match
        if row.operation and module in packed and family.container == "huggingface":
            expected = f"numbers: its rows become others ({row.operation}), and packed ones cannot be told apart"
            problems.append(Problem(str(source), "a module whose weights are packed", expected, UNPACKED))
            continue
        targets = [to.format(**numbers) for to in row.to]
        slots = [slot for slot in map(layout.find, targets) if slot]
        if not slots or (slots[0].layer is not None and slots[0].layer >= model.num_hidden_layers):
            problems.append(_unconsumed(source, f"{model.num_hidden_layers} layers in the model's configuration"))
            continue
        reason = _omitted(family, slots[0].module.name, parameter, model, keep)
        flag = slots[0].module.bias
        if parameter == "bias" and source in zeros and not (flag and getattr(model, flag)):
            reason = "a bias of zeros, which the quantizer added"
        if reason:
            left_out[source] = reason
            continue
        axes = packed.get(module, {}).get(parameter, ("out",))
        whole = len(slots) == 1 or "out" not in axes
        axis = 0 if whole else axes.index("out") + slots[0].stacked
        parts = [Renamed(source, row)] * len(slots) if whole else _parts(source, row, slots, axis, model)
        for target, renamed in zip(targets, parts, strict=True):
            name = TensorName(target, parameter)
            if name in names:
                problems.append(Problem(str(source), f"the same target as {names[name].source}: {name}", "one source for it"))
            names[name] = renamed
    ties, copies = _ties(family, names, model)
    left_out |= dict.fromkeys(copies, "the embeddings are tied, so that this is a copy")
    return Matches(names, ties, left_out, copies, tuple(problems))


def rename(tensors: TensorMap, matches: Matches, model: ModelConfig) -> TensorMap:
    """The tensors under their new names, those with an operation mapped through it, ties as second names of one array."""
    result: dict[TensorName, BlockArray] = {}
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


def _attention(family: Family, layout: Layout) -> PatternTable[str]:
    """The modules around queries, keys and values, by pattern, and their new names: they may have parameters of their own."""
    split_by_heads = {
        name: module.name for module in layout.modules.values() for name, part in slot_names(module) if part and part.heads
    }
    pairs = ((pattern, split_by_heads[to]) for pattern, row in family.rename.items() for to in row.to if to in split_by_heads)
    return PatternTable((pattern.rpartition(".")[0], name.rpartition(".")[0]) for pattern, name in pairs)


def _parts(source: TensorName, row: RenameRow, slots: Sequence[Slot], axis: int, model: ModelConfig) -> list[Renamed]:
    """Divide the rows of a fused source among the names of a table's row: one Renamed, with its own rows, for each."""
    groups = model.dimension(row.groups) if row.groups else 1
    sizes = [model.dimension(slot.out) // groups for slot in slots]
    starts, group = [0, *accumulate(sizes)], sum(sizes)
    parts = []
    for start, size in zip(starts, sizes, strict=False):
        rows = tuple((n * group + start, n * group + start + size) for n in range(groups))
        parts.append(Renamed(source, row, rows, axis, groups * group))
    return parts


def _rows(array: BlockArray, renamed: Renamed) -> BlockArray:
    """The rows of an array that are a part's own: slices of its blocks, one after the other.

    Packed rows are counted in words, and scales of tiles in tiles. A single scale is every part's.
    """
    packed = units(array.shape, renamed)
    if not packed:
        return array
    return take_rows(array, [(int(start * packed), int(stop * packed)) for start, stop in renamed.rows], renamed.axis)


def _share(nbytes: int, renamed: Renamed) -> int:
    """The part of a source's bytes that is a tensor's, of a source that is mostly one tensor."""
    return int(nbytes * renamed.share) if renamed.rows else nbytes


def units(shape: Sequence[int], renamed: Renamed) -> Fraction | None:
    """How many of an axis's elements stand for one row: 1/8 of words of eight rows each. None where one stands for all rows.

    0 where the bounds of the part are not those of elements, so that the part has no elements of its own.
    """
    if len(shape) <= renamed.axis or shape[renamed.axis] == 1:
        return None
    each = Fraction(shape[renamed.axis], renamed.total)
    apart = all((bound * each).denominator == 1 for rows in renamed.rows for bound in rows)
    return each if apart else Fraction(0)


def operate(block: Block, operation: str, period: int) -> Block:
    """A block with an operation of the closed list applied to its rows, `period` of them at a time."""
    known = OPERATIONS[operation]
    columns = block.shape[-1] if known.rows else None
    return Applied(
        block, Operate(operation, period), stage="rename", dtype=known.dtype(block.dtype), period=period, columns=columns
    )


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
    family: Family, names: dict[TensorName, Renamed], model: ModelConfig
) -> tuple[dict[TensorName, TensorName], dict[TensorName, TensorName]]:
    """Ties and copies of `Matches`; a copy is taken out of `names`, as tied values come from the original."""
    ties: dict[TensorName, TensorName] = {}
    copies: dict[TensorName, TensorName] = {}
    for tied, original in family.ties.items():
        sources = {name.parameter: row.source for name, row in names.items() if name.module == original}
        own = [name for name in names if name.module == tied]
        if model.tie_word_embeddings and sources:
            for name in own:
                copies[names.pop(name).source] = next(iter(sources.values()))
        elif own or model.tie_word_embeddings is False:
            continue
        ties.update({TensorName(tied, parameter): source for parameter, source in sources.items()})
    return ties, copies


def _unconsumed(name: TensorName, expected: str) -> Problem:
    return Problem(str(name), "a tensor that belongs nowhere", expected, LOST)
