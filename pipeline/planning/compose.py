"""The second stage of planning: the stages composed. Nothing is read meanwhile; arrays stay lazy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import Problem
from pipeline.model.dtypes import of_numpy
from pipeline.model.quantization import Quantization
from pipeline.planning.choose_algorithm import Packing, choose
from pipeline.planning.cuts import Cuts
from pipeline.planning.opening import OpenedSource
from pipeline.planning.target_options import Shape, TargetOptions
from pipeline.tensor.arrays import BlockArray
from pipeline.tensor.names import TensorName
from pipeline.tensor.placement import NOWHERE, FixedPlacements, Placements, RankTensor
from pipeline.tensor.tensors import LazyTensor, TensorMap
from stages import rope
from stages.cast import cast
from stages.quantize import Entry, quantize
from stages.read import read
from stages.rename import rename
from stages.shard import Sharding, ShardPlacements, rank_tensors
from stages.unpack import unpack

ROW_MULTIPLE = 64  # rows: chunks of a matrix are cut at multiples of it, and of a head


@dataclass(frozen=True)
class TargetTensors:
    """The outcome of the stages for one target: its arrays, where their regions go, and the ranks' tensors.

    `fixed`: the placements of arrays that are no entries, as rotary buffers are.
    """

    options: TargetOptions
    sharding: Sharding
    quantization: Quantization
    dtype: str
    entries: Mapping[TensorName, Entry]
    arrays: TensorMap
    fixed: Mapping[TensorName, Placements]
    ranks: tuple[RankTensor, ...]

    def placements(self, name: TensorName) -> Placements:
        """Where the regions of an array go: nowhere, where the target has none of that name."""
        entry = self.entries.get(name)
        if entry is None:
            return self.fixed.get(name, NOWHERE)
        return ShardPlacements(name, entry.slot, entry.parameter, self.sharding)


def choose_all(
    targets: Sequence[Shape], packing: Packing, tensors: Mapping[TensorName, LazyTensor]
) -> tuple[tuple[Quantization, ...], tuple[Problem, ...]]:
    """The quantization of each target, and what contradicts itself in the options for it, each problem once."""
    chosen = [choose(options, packing, tensors) for options in targets]
    problems = dict.fromkeys(problem for _, found in chosen for problem in found)
    return tuple(quantization for quantization, _ in chosen), tuple(problems)


def mark(made: Counter[str], stage: str, arrays: Iterable[BlockArray]) -> None:
    """Note which stage made the arrays that no earlier stage has made, and what these are made of. `made` counts them."""
    for array in arrays:
        if not array.stage:
            array.stage = stage
            made[stage] += 1
            mark(made, stage, array.inputs)


def canonical(opened: OpenedSource, cuts: Cuts, chunk_bytes: int, made: Counter[str]) -> TensorMap:
    """read, rename and unpack, with the cuts that the job asks for: canonical parameters under TensorRT-LLM's names.

    `chunk_bytes`: the most that a chunk holds of its tensor. The arrays know their stages then; `made` counts these.
    """
    row_multiple = math.lcm(ROW_MULTIPLE, opened.model.head_size)
    # A cut behind `read` has what is converted: what a checkpoint has beside it has names of its own, of which none is looked at.
    used = set(opened.matches.origins.values())
    own = {name: tensor for name, tensor in opened.source.named.items() if name in used}
    stages: dict[str, Callable[[TensorMap], TensorMap]] = {
        "read": lambda _: read(own, chunk_bytes, row_multiple),
        "rename": lambda tensors: rename(tensors, opened.matches, opened.model),
        "unpack": lambda tensors: unpacked(opened, tensors),
    }
    tensors: TensorMap = {}
    for stage, apply in stages.items():
        tensors = apply(tensors)
        mark(made, stage, tensors.values())
        tensors = cuts.cut(stage, tensors)
        mark(made, "scratch", tensors.values())
    return tensors


def target_dtype(options: Shape, opened: OpenedSource) -> str:
    """TensorRT-LLM's name of the type of what a target does not quantize."""
    return opened.auto_dtype if options.dtype == "auto" else options.dtype


def unpacked(opened: OpenedSource, tensors: TensorMap) -> TensorMap:
    """The stage `unpack`, which the source's settings of single modules are given by their new names."""
    own, names = opened.packing.own, opened.matches.names
    by_name = {name.module: own[row.source.module] for name, row in names.items() if row.source.module in own} if own else {}
    return unpack(tensors, opened.packing.settings, by_name)


def compose_target(
    options: TargetOptions,
    sharding: Sharding,
    quantization: Quantization,
    tensors: TensorMap,
    opened: OpenedSource,
    block_bytes: int,
    made: Counter[str],
) -> TargetTensors:
    """cast, quantize and shard the canonical tensors for one target. `made` counts the arrays that each stage made."""
    dtype = target_dtype(options, opened)
    tensors = cast(tensors, sharding.layout, dtype)
    mark(made, "cast", tensors.values())
    entries = quantize(tensors, sharding, quantization, dtype, opened.matches.origin)
    arrays = {name: entry.array for name, entry in entries.items()}
    mark(made, "quantize", arrays.values())
    fixed: dict[TensorName, Placements] = {}
    ranks = tuple(_rank_tensors(entries, sharding))
    if options.write_rope_buffers:
        buffers = rope.rope_buffers(sharding.model)
        arrays |= read(buffers, block_bytes, 1)
        mark(made, "read", arrays.values())
        places = {name: rope.placements(name, tensor, sharding.parallelism) for name, tensor in buffers.items()}
        fixed |= {name: FixedPlacements(each) for name, each in places.items()}
        ranks += rope.rank_tensors(buffers, sharding.parallelism)
    return TargetTensors(options, sharding, quantization, dtype, entries, arrays, fixed, ranks)


def _rank_tensors(entries: Mapping[TensorName, Entry], sharding: Sharding) -> Iterator[RankTensor]:
    """The ranks' tensors: one of a fused module's parts, or of a stack's experts, stands for the tensor that they share."""
    shared = {(entry.slot.module.name, entry.slot.layer, name.parameter): name for name, entry in entries.items()}
    for name in shared.values():
        entry = entries[name]
        yield from rank_tensors(name, entry.slot, entry.parameter, sharding, of_numpy(entry.array.dtype).target)
