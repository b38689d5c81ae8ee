"""shard: gather(shard(x)) == x; placements of a rank tensor tile it exactly, with no gap and no overlap.

Pure arithmetic on shapes. Each axis of a source is cut for a rank into one interval and where it goes; a placement is the product
of its axes' cuts. Facts: docs/format/checkpoint.md, section 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

from pipeline.errors import Problem
from pipeline.model.model_config import ModelConfig
from pipeline.model.parallelism import Parallelism, Rank
from pipeline.model.tables import FusedPart, Layout, Module, Slot
from pipeline.tensor.names import TensorName
from pipeline.tensor.placement import Interval, Placement, Placements, RankTensor, Region, moved
from pipeline.tensor.tensors import Parameter, plain

ONE = Fraction(1)


@dataclass(frozen=True)
class Embedding:
    """TensorRT-LLM's --use_parallel_embedding and --embedding_sharding_dim (0: vocabulary, 1: hidden)."""

    parallel: bool = False
    dim: int = 0


@dataclass(frozen=True, slots=True)
class Cut:
    """One axis of one rank: source interval -> target interval (None: nothing of it), and the axis's length on the rank."""

    source: Interval
    target: Interval
    length: int


@dataclass(frozen=True)
class Sharding:
    """How a model is cut for one target: the sizes that the arithmetic needs, in one place."""

    layout: Layout
    model: ModelConfig
    parallelism: Parallelism
    embedding: Embedding

    def shape(self, slot: Slot, parameter: Parameter) -> tuple[int, ...]:
        """The shape that the source of `slot` must have, by the model's configuration: [out, in] for a weight, [out] for a bias."""
        key = _kind(slot, parameter)
        if key not in self._shapes:
            sizes = {"out": slot.out, "in": slot.module.in_, "group": slot.module.in_, "expert": "num_experts", "one": "1"}
            self._shapes[key] = tuple(int(self.model.dimension(sizes[axis]) * unit) for axis, unit in axes(slot, parameter))
        return self._shapes[key]

    def ranks(self, slot: Slot) -> Iterator[tuple[Rank, str]]:
        """The ranks that hold a slot's module, and its name there: layers count from 0 on every pipeline stage."""
        module, sizes = slot.module, self.parallelism
        if slot.layer is None:
            for rank in self._ranks:
                if module.ranks == "all" or rank.pp == (0 if module.ranks == "first" else sizes.pp_size - 1):
                    yield rank, module.name
            return
        stage, layer = self._stages[slot.layer]
        name = module.name.replace("{layer}", str(layer))
        for rank in self._ranks[stage * sizes.tp_size : (stage + 1) * sizes.tp_size]:
            yield rank, name

    @cached_property
    def _ranks(self) -> tuple[Rank, ...]:
        return self.parallelism.ranks()

    @cached_property
    def _stages(self) -> Mapping[int, tuple[int, int]]:
        """The pipeline stage of each layer, and the layer's number there."""
        layers = [self.parallelism.layers(stage, self.model.num_hidden_layers) for stage in range(self.parallelism.pp_size)]
        return {layer: (stage, layer - own.start) for stage, own in enumerate(layers) for layer in own}

    @cached_property
    def _shapes(self) -> dict[Any, tuple[int, ...]]:
        return {}

    @cached_property
    def _fronts(self) -> dict[int, tuple[tuple[int, Region], ...]]:
        return {}

    def held(self, slot: Slot) -> Iterator[tuple[Rank, str, Region]]:
        """The ranks that hold a slot's source, its module's name there, and, in front, an expert's place in its stack.

        Which ranks of a stage hold an expert is the same in every layer and module of experts, and worked out once.
        """
        if slot.expert is None or slot.layer is None:
            yield from ((rank, name, ()) for rank, name in self.ranks(slot))
            return
        stage, layer = self._stages[slot.layer]
        name, first = slot.module.name.replace("{layer}", str(layer)), stage * self.parallelism.tp_size
        if slot.expert not in self._fronts:
            cuts = [(n, self.cut("expert", slot, rank)) for n, rank in enumerate(self._ranks[: self.parallelism.tp_size])]
            self._fronts[slot.expert] = tuple((n, (cut.target,)) for n, cut in cuts if cut is not None)
        yield from ((self._ranks[first + n], name, front) for n, front in self._fronts[slot.expert])

    @cached_property
    def _places(self) -> dict[Any, tuple[tuple[Region | None, Region], ...]]:
        return {}

    @cached_property
    def moved(self) -> dict[Any, int]:
        """The elements that the placements of a kind of parameter move, once they were counted."""
        return {}

    def places(self, slot: Slot, parameter: Parameter, rank: Rank) -> tuple[tuple[Region | None, Region], ...]:
        """Where a parameter's regions go in its tensor on a rank, without an expert's own axis: (source, target), None for padding.

        It is the same in every layer, for every expert and on every pipeline stage, and computed once for all.
        """
        key = (*_kind(slot, parameter), rank.tp)
        if key not in self._places:
            self._places[key] = tuple(_places(slot, parameter, rank, self))
        return self._places[key]

    def cut(self, axis: str, slot: Slot, rank: Rank, unit: Fraction = ONE) -> Cut | None:
        """The cut of one axis of a source for one rank, `unit` elements a feature; None where the rank has nothing of it.

        Raises ValueError where an element would have to be cut.
        """
        cut = self._cut(axis, slot, rank)
        if cut is None or unit == 1:
            return cut
        scaled = [Fraction(n) * unit for n in (*cut.source, *cut.target, cut.length)]
        if any(n.denominator > 1 for n in scaled):
            raise ValueError(f"{slot.module.name}: {cut.source} of {axis} for rank {rank.index} is no whole number of units {unit}")
        start, stop, first, last, length = map(int, scaled)
        return Cut((start, stop), (first, last), length)

    def _cut(self, axis: str, slot: Slot, rank: Rank) -> Cut | None:
        module = slot.module
        if axis == "expert":
            return self._cut_experts(slot, rank)
        if axis == "one":
            return Cut((0, 1), (0, 1), 1)
        axis = "in" if axis == "group" else axis
        name = slot.out if axis == "out" else module.in_
        size = self.model.dimension(name)
        split, pad = self.split_axis(module)
        if split != axis:
            return Cut((0, size), (0, size), size)
        count, index = self._group(module, rank)
        part = slot.part
        if part and part.heads:
            return self._cut_heads(part, size, count, index)
        length = -(-size // count) if pad else size // count
        start, stop = min(index * length, size), min((index + 1) * length, size)
        return Cut((start, stop), (0, stop - start), length)

    def split_axis(self, module: Module) -> tuple[str, bool]:
        """The axis that a module is split by ("" for none), and whether its last rank is padded."""
        if module.split == "embedding":
            if not self.embedding.parallel:
                return "", False
            return ("out", True) if self.embedding.dim == 0 else ("in", False)
        return {"column": "out", "row": "in", "replicate": ""}[module.split], module.pad

    def _group(self, module: Module, rank: Rank) -> tuple[int, int]:
        sizes = self.parallelism
        return (sizes.moe_tp_size, rank.moe_tp) if module.experts else (sizes.tp_size, rank.tp)

    def _cut_heads(self, part: FusedPart, size: int, count: int, index: int) -> Cut:
        """Whole heads: an equal share, or one head held by `count / heads` ranks where there are fewer heads than ranks."""
        heads = self.model.dimension(part.heads)
        length = size // heads * max(heads // count, 1)
        start = (index * heads // count) * (size // heads)
        return Cut((start, start + length), (0, length), length)

    def _cut_experts(self, slot: Slot, rank: Rank) -> Cut | None:
        length = self.model.num_experts // self.parallelism.moe_ep_size
        first = rank.moe_ep * length
        if slot.expert is None:
            return Cut((first, first + length), (0, length), length)
        position = slot.expert - first
        return Cut((0, 1), (position, position + 1), length) if 0 <= position < length else None


def axes(slot: Slot, parameter: Parameter) -> tuple[tuple[str, Fraction], ...]:
    """The axes of a slot's source: a stack of experts has one more, in front."""
    return (("expert", Fraction(1)), *parameter.axes) if slot.stacked else parameter.axes


def dense(slot: Slot, parameter: str) -> Parameter:
    """A parameter of a module that is not quantized."""
    return plain(parameter, matrix=bool(slot.module.in_))


def shard(name: TensorName, slot: Slot, parameter: Parameter, sharding: Sharding) -> tuple[Placement, ...]:
    """The placements of one renamed tensor, the `parameter` of its slot, on all ranks of a target, in the order of the ranks."""
    return tuple(ShardPlacements(name, slot, parameter, sharding))


@dataclass(frozen=True, slots=True)
class ShardPlacements(Placements):
    """The placements of one renamed tensor, the `parameter` of its slot, on all ranks of a target, in the order of the ranks."""

    name: TensorName
    slot: Slot
    parameter: Parameter
    sharding: Sharding

    def __iter__(self) -> Iterator[Placement]:
        for rank, target, front in self.sharding.held(self.slot):
            tensor = f"{target}.{self.name.parameter}"
            for source, to in self.sharding.places(self.slot, self.parameter, rank):
                yield Placement(rank.index, tensor, source, (*front, *to))

    @property
    def elements(self) -> int:
        """Those of the same parameter in any other layer or expert, so that they are counted once for all."""
        key = _kind(self.slot, self.parameter)
        if key not in self.sharding.moved:
            self.sharding.moved[key] = moved(self)
        return self.sharding.moved[key]


def _kind(slot: Slot, parameter: Parameter) -> tuple[Any, ...]:
    """All that a parameter has in common with that of other layers and experts."""
    return slot.module.name, slot.part.name if slot.part else "", slot.stacked, parameter


def _places(slot: Slot, parameter: Parameter, rank: Rank, sharding: Sharding) -> Iterator[tuple[Region | None, Region]]:
    names = axes(slot, parameter)
    cuts = _whole(sharding.cut(axis, slot, rank, unit) for axis, unit in names)
    offset = int(_part_offset(slot, rank, sharding) * dict(names).get("out", Fraction(1)))
    out = next((n for n, (axis, _) in enumerate(names) if axis == "out"), None)
    target = tuple((cut.target[0] + by, cut.target[1] + by) for n, cut in enumerate(cuts) for by in [offset if n == out else 0])
    if all(start < stop for start, stop in target):
        yield tuple(cut.source for cut in cuts), target
    if out is not None and cuts[out].target[1] < cuts[out].length:
        padding = (cuts[out].target[1] + offset, cuts[out].length + offset)
        yield None, (*target[:out], padding, *target[out + 1 :])


def rank_tensors(name: TensorName, slot: Slot, parameter: Parameter, sharding: Sharding, dtype: str) -> Iterator[RankTensor]:
    """A parameter of a slot's whole module, all its parts and experts, on every rank. `dtype`: that of the array."""
    for rank, target in sharding.ranks(slot):
        front = (("expert", Fraction(1)),) if slot.module.experts else ()
        stored = _rank_shape(slot, rank, (*front, *parameter.axes), sharding)
        shape = _rank_shape(slot, rank, (*front, *parameter.header), sharding) if parameter.header else stored
        tensor = f"{target}.{name.parameter}"
        yield RankTensor(rank.index, tensor, shape, parameter.dtype or dtype, (stored, dtype))


def _rank_shape(slot: Slot, rank: Rank, names: Sequence[tuple[str, Fraction]], sharding: Sharding) -> tuple[int, ...]:
    lengths = []
    for axis, unit in names:
        parts = slot.module.parts if axis == "out" and slot.module.parts else (slot.part,)
        # Of a stack every rank has its share, whichever experts these are.
        cuts = _whole(sharding.cut(axis, Slot(slot.module, part, slot.layer, None), rank) for part in parts)
        lengths.append(int(sum(cut.length for cut in cuts) * unit))
    return tuple(lengths)


def _part_offset(slot: Slot, rank: Rank, sharding: Sharding) -> int:
    """Where a part's rows begin in the fused tensor of a rank: behind the parts before it."""
    offset = 0
    if slot.part is None:
        return offset
    for part in slot.module.parts:
        if part == slot.part:
            break
        cut = sharding.cut("out", Slot(slot.module, part, slot.layer, slot.expert), rank)
        offset += cut.length if cut else 0
    return offset


def _whole(cuts: Iterator[Cut | None] | Sequence[Cut | None]) -> list[Cut]:
    return [cut for cut in cuts if cut is not None]


def divisibility(sharding: Sharding) -> list[Problem]:
    """Refuse parallel sizes that do not divide the model, naming sizes that do (docs/format/checkpoint.md, section 12)."""
    model, sizes = sharding.model, sharding.parallelism
    problems = []

    def refuse(option: str, value: int, what: str, works: Sequence[int]) -> None:
        choice = ", ".join(map(str, works)) or "none"
        problems.append(Problem(f"--{option} {value}", what, f"one of: {choice}"))

    if sizes.moe_tp_size * sizes.moe_ep_size != sizes.tp_size:
        product = f"--moe_tp_size {sizes.moe_tp_size} x --moe_ep_size {sizes.moe_ep_size}"
        problems.append(Problem(product, str(sizes.moe_tp_size * sizes.moe_ep_size), f"--tp_size {sizes.tp_size}"))
    fitting = tp_sizes(model, sharding)
    if tp_obstacle(model, sharding, sizes.tp_size):
        refuse("tp_size", sizes.tp_size, tp_obstacle(model, sharding, sizes.tp_size), fitting)
    if sizes.pp_size > model.num_hidden_layers:
        layers = f"{model.num_hidden_layers} layers"
        problems.append(Problem(f"--pp_size {sizes.pp_size}", layers, f"at most {model.num_hidden_layers}"))
    if model.num_experts and sizes.cp_size > 1:
        expected = "1: TensorRT-LLM has no context parallelism for experts (its loader asserts it)"
        problems.append(Problem(f"--cp_size {sizes.cp_size}", f"{model.num_experts} experts", expected, "Give --tp_size instead"))
    if model.num_experts:
        pairs = expert_sizes(model, sizes.tp_size)
        experts = [ep for _, ep in pairs]
        if model.num_experts % sizes.moe_ep_size:
            refuse("moe_ep_size", sizes.moe_ep_size, f"{model.num_experts} experts", experts)
        if model.expert_intermediate_size % sizes.moe_tp_size:
            works = [tp for tp, _ in pairs]
            name = "moe_intermediate_size" if model.moe_intermediate_size else "intermediate_size"
            refuse("moe_tp_size", sizes.moe_tp_size, f"{name} {model.expert_intermediate_size}", works)
    elif sizes.moe_ep_size > 1:
        problems.append(Problem(f"--moe_ep_size {sizes.moe_ep_size}", "a model without experts", "1"))
    return problems


def embedding_options(sharding: Sharding) -> list[Problem]:
    """Options of the embedding that a model class does not have: one that always splits it, splits its vocabulary."""
    module = next((module for module in sharding.layout.modules.values() if module.ranks == "first"), None)
    if module is None or module.split == "embedding" or not sharding.embedding.dim:
        return []
    expected = "0: TensorRT-LLM's class splits the vocabulary of this model over tp_size"
    return [Problem(f"--embedding_sharding_dim {sharding.embedding.dim}", "the hidden axis", expected)]


def tp_sizes(model: ModelConfig, sharding: Sharding) -> tuple[int, ...]:
    """The tensor-parallel sizes that a model can be cut to, its experts as the other options say."""
    ep = sharding.parallelism.moe_ep_size
    ep = ep if not model.num_experts % ep else 1
    fits = (n for n in range(1, model.num_attention_heads + 1) if not tp_obstacle(model, sharding, n))
    return tuple(n for n in fits if not model.num_experts or (n % ep == 0 and (n // ep, ep) in expert_sizes(model, n)))


def expert_sizes(model: ModelConfig, tp_size: int) -> list[tuple[int, int]]:
    """The (moe_tp_size, moe_ep_size) that a mixture of experts can be cut to at `tp_size`."""
    pairs = ((tp, tp_size // tp) for tp in range(1, tp_size + 1) if tp_size % tp == 0)
    return [(tp, ep) for tp, ep in pairs if not model.expert_intermediate_size % tp and not model.num_experts % ep]


def tp_obstacle(model: ModelConfig, sharding: Sharding, tp_size: int) -> str:
    """The first dimension of the model that `tp_size` does not divide, with its size; "" where it divides all that is split."""
    kv_heads = model.num_key_value_heads
    if model.num_attention_heads % tp_size:
        return f"num_attention_heads {model.num_attention_heads}"
    if (kv_heads % tp_size) if kv_heads >= tp_size else (tp_size % kv_heads):
        return f"num_key_value_heads {kv_heads}"
    for module in sharding.layout.modules.values():
        axis, pad = sharding.split_axis(module)
        if not axis or pad or module.experts or (module.parts and module.parts[0].heads):
            continue
        name = module.in_ if axis == "in" else module.parts[0].out if module.parts else module.out
        if model.dimension(name) % tp_size:
            return f"{name} {model.dimension(name)}"
    return ""
