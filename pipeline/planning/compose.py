"""The second stage of planning: the stages composed. Nothing is read meanwhile; arrays stay lazy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import Problem
from pipeline.model.dtypes import auto_dtype, of_numpy
from pipeline.model.quantization import Quantization
from pipeline.planning.choose_algorithm import Packing, choose
from pipeline.planning.cuts import Cuts
from pipeline.planning.job import Shape, TargetOptions
from pipeline.planning.opening import OpenedSource
from pipeline.tensor.arrays import BlockArray
from pipeline.tensor.blocks import read_block
from pipeline.tensor.names import TensorName, by_module
from pipeline.tensor.placement import NOWHERE, FixedPlacements, Placements, RankTensor
from pipeline.tensor.tensors import LazyTensor, TensorMap
from stages import rope
from stages.cast import cast
from stages.quantization import numbers
from stages.quantize import CODES, Entry, quantize, signal_to_noise
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
    stages: dict[str, Callable[[TensorMap], TensorMap]] = {
        "read": lambda _: read(opened.source.named, chunk_bytes, row_multiple),
        "rename": lambda tensors: rename(tensors, opened.matches, opened.model),
        "unpack": lambda tensors: unpack(tensors, opened.packing.settings),
    }
    tensors: TensorMap = {}
    for stage, apply in stages.items():
        tensors = apply(tensors)
        mark(made, stage, tensors.values())
        tensors = cuts.cut(stage, tensors)
        mark(made, "scratch", tensors.values())
    return tensors


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
    dtype = auto_dtype(opened.source.dtype) if options.dtype == "auto" else options.dtype
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


def requantization_notes(opened: OpenedSource, chosen: Sequence[Quantization], block_bytes: int) -> tuple[str, ...]:
    """The error that quantizing again adds, measured on the first rows of one tensor, which it reads of the source itself."""
    sizes = {each.group_size for each in chosen if each.algorithm == "W4A16_GPTQ" and each.from_numbers}
    if not opened.job.requantize or not sizes:
        return ()
    # Scratch is still empty: what planning looks at comes from the source itself.
    tensors = unpack(rename(read(opened.source.named, block_bytes, 1), opened.matches, opened.model), opened.packing.settings)
    packed = ((module, parameters) for module, parameters in by_module(tensors).items() if not parameters.keys().isdisjoint(CODES))
    module, parameters = next(packed, ("", {}))
    if not parameters:
        return ()
    weight = numbers.dequantize(parameters)
    again = numbers.dequantize(numbers.requantize(weight, min(sizes)))
    rows = ((0, min(64, weight.shape[0])), (0, weight.shape[1]))
    before, after = (read_block(array, (0, 0)).read(rows) for array in (weight, again))
    error = signal_to_noise(after, before)
    return (f"quantized again: {error:.1f} dB of signal to noise against the source's own weights, in the first rows of {module}",)
