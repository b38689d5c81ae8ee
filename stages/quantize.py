"""quantize: dequantize(quantize(x)) is x within the format's error; commutes with the split into ranks, as it is computed by rank.

Makes of each linear module's canonical parameters those of the target: codes are kept where the target's algorithm is the source's,
otherwise weights are numbers, or made numbers, and quantized. Facts: docs/format/quantized-layouts.md, sections 4, 8 and 10.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import Problem
from pipeline.model.dtypes import BY_TARGET
from pipeline.model.quantization import AWQ, FP8, FP8_ROWWISE, GROUPWISE, NVFP4, SMOOTHQUANT, WEIGHT_ONLY, Quantization
from pipeline.model.runtime import runtime
from pipeline.model.tables import Module, Slot
from pipeline.tensor.arrays import BlockArray
from pipeline.tensor.derived import derive
from pipeline.tensor.names import TensorName, by_module
from pipeline.tensor.tensors import AWQ_SCALE, CODES, Parameter, TensorMap, plain
from stages.quantization import numbers
from stages.quantization.constants import constants
from stages.quantization.entries import Entry as Entry
from stages.quantization.entries import entries_of
from stages.quantization.joined import joined
from stages.quantization.kernels.layout import kernel_layout
from stages.quantization.modules import is_quantized
from stages.quantization.shared_factors import one_for_all
from stages.quantization.smoothing import Smoothing
from stages.quantization.targets import awq_numbers, fp8, fp8_numbers, groupwise, kept_rows, nvfp4, weight_only

if TYPE_CHECKING:
    from stages.shard import Sharding

BLOCK_ROWS = 8192  # out-features of a block of packed work
PACK_TOGETHER = {FP8: fp8.pack_tensor, NVFP4: nvfp4.pack}  # the parts of a fused module have a scale in common
Packed = dict[str, tuple[BlockArray, Parameter]]  # a module's own parameters in the target


@dataclass(frozen=True)
class _Target:
    """The properties of a target that packing depends on."""

    sharding: Sharding
    quantization: Quantization
    dtype: str
    origin: Callable[[TensorName], object]

    def source(self, module: str) -> str:
        """The source's name of a module's weight, for what is wrong with its values."""
        return str(self.origin(TensorName(module, "weight")))

    @property
    def numpy(self) -> np.dtype:
        return BY_TARGET[self.dtype].numpy

    def numbers(self, parameters: Mapping[str, BlockArray]) -> BlockArray:
        """A module's weight in the target's type."""
        return _cast(_weight(parameters), self.numpy)

    def segments(self, module: Module) -> int:
        """Into how many parts the ranks split a module's in-features."""
        if module.split != "row":
            return 1
        sizes = self.sharding.parallelism
        return sizes.moe_tp_size if module.experts else sizes.tp_size


def quantize(
    tensors: TensorMap,
    sharding: Sharding,
    quantization: Quantization,
    dtype: str,
    origin: Callable[[TensorName], object] = str,
) -> dict[TensorName, Entry]:
    """Every array of a target by name: renamed module and the target's own parameter.

    `dtype`: of what is not quantized. `origin` gives a tensor's name in the source, for what is wrong with its values.
    """
    target = _Target(sharding, quantization, dtype, origin)
    modules = by_module(tensors)
    entries: dict[TensorName, Entry] = {}
    fused: dict[str, dict[str, tuple[Slot, Mapping[str, BlockArray]]]] = defaultdict(dict)
    layers = sharding.model.num_hidden_layers
    for name, parameters in modules.items():
        if parameters.keys() == {"kv_scale"}:
            continue  # of an attention module, which has no other parameters
        slot = sharding.layout.find(name)
        if slot is None:
            raise KeyError(name)
        if not is_quantized(slot, quantization, layers):
            entries |= entries_of(name, slot, _dense(slot, parameters, target))
        elif quantization.algorithm in SMOOTHQUANT:
            continue  # layer by layer, as modules share what their weights are multiplied by
        elif quantization.algorithm in PACK_TOGETHER:
            # The parts of a fused module have one scale, so that they are packed together.
            whole = name.removesuffix(f".{slot.part.name}") if slot.part else name
            fused[whole][name] = (slot, parameters)
        else:
            entries |= entries_of(name, slot, _packed(name, slot, parameters, target))
    for whole, parts in fused.items():
        entries |= _fused(whole, parts, target)
    if quantization.algorithm == AWQ:
        entries |= one_for_all(entries, origin)
    if quantization.algorithm in GROUPWISE:
        entries = joined(entries, sharding)
    if quantization.algorithm in SMOOTHQUANT:
        smoothing = Smoothing(sharding, quantization, target.numbers, target.source)
        entries |= {name: entry for layer in range(layers) for name, entry in smoothing.entries(modules, layer).items()}
    return entries | _stacks(fused.values(), target) | constants(modules, quantization, layers, sharding.model.qk_norm)


def _dense(slot: Slot, parameters: Mapping[str, BlockArray], target: _Target) -> Packed:
    """A module as it is; a quantized one as numbers, of the type that the module has in a target."""
    kept = {
        name: (array, plain(name, matrix=bool(slot.module.in_))) for name, array in parameters.items() if name in ("weight", "bias")
    }
    if any(name in parameters for name in CODES):
        weight = _cast(numbers.dequantize(parameters), BY_TARGET[slot.module.stored_dtype(target.dtype)].numpy)
        kept["weight"] = (weight, replace(plain("weight"), working_bytes=12))
    return kept


def _packed(name: str, slot: Slot, parameters: Mapping[str, BlockArray], target: _Target) -> Packed:
    quantization, module = target.quantization, slot.module
    bias = {"bias": (parameters["bias"], plain("bias"))} if "bias" in parameters else {}
    if quantization.algorithm == AWQ and quantization.from_numbers:
        weight, scale = _weight(parameters), parameters[AWQ_SCALE]
        return awq_numbers.pack(target.source(name), weight, scale, quantization.group_size, target.numpy, BLOCK_ROWS) | bias
    if quantization.algorithm == AWQ:
        return groupwise.pack_awq(parameters, target.numpy, target.source(name)) | bias
    if quantization.algorithm == FP8_ROWWISE and "fp8" in parameters and not quantization.from_numbers:
        return fp8.pack_channels(target.source(name), parameters) | bias
    source, segments = target.source(name), target.segments(module)
    if quantization.algorithm == FP8_ROWWISE:
        return fp8.quantize_channels(source, _cast(_weight(parameters), target.numpy), segments, quantization.clamp) | bias
    assert isinstance(quantization.sm, int), "refused, or left to the loader"
    layout = kernel_layout(quantization.bits, quantization.sm, module.experts)
    if quantization.algorithm in WEIGHT_ONLY and not quantization.from_numbers:
        return kept_rows.pack_rows(source, parameters, layout, target.numpy, target.dtype, BLOCK_ROWS) | bias
    if quantization.algorithm in GROUPWISE:
        if quantization.from_numbers:
            parameters = numbers.requantize(_weight(parameters), quantization.group_size, source, quantization.bits)
            return (
                groupwise.pack_gptq(parameters, layout, target.numpy, target.dtype, BLOCK_ROWS, working_bytes=24, source=source)
                | bias
            )
        zeros = quantization.zero_points
        return (
            groupwise.pack_gptq(parameters, layout, target.numpy, target.dtype, BLOCK_ROWS, zero_points=zeros, source=source) | bias
        )
    weight = _cast(_weight(parameters), target.numpy)
    return weight_only.pack(source, weight, layout, segments, target.dtype, BLOCK_ROWS) | bias


def _fused(whole: str, parts: Mapping[str, tuple[Slot, Mapping[str, BlockArray]]], target: _Target) -> dict[TensorName, Entry]:
    """FP8 or NVFP4 with one scale for all parts of a module, in the order of its rows."""
    slot = next(iter(parts.values()))[0]
    order = [part.name for part in slot.module.parts] or [""]
    named = sorted(parts, key=lambda name: order.index(name.removeprefix(f"{whole}.")) if slot.part else 0)
    given, sources = [parts[name][1] for name in named], list(map(target.source, named))
    if target.quantization.from_numbers:
        weights, common = fp8_numbers.pack(sources, list(map(target.numbers, given)), given)
    else:
        weights, common = PACK_TOGETHER[str(target.quantization.algorithm)](sources, given)
    if slot.expert is not None:
        del common["activation_scaling_factor"]  # one for all of the stack
    entries: dict[TensorName, Entry] = {}
    for name, packed in zip(named, weights, strict=True):
        own, parameters = parts[name]
        entries |= entries_of(name, own, packed)
        if "bias" in parameters:
            entries[TensorName(name, "bias")] = Entry(parameters["bias"], own, plain("bias"))
    return entries | entries_of(whole, Slot(slot.module, None, slot.layer, slot.expert), common)


def _stacks(fused: Iterable[Mapping[str, tuple[Slot, Mapping[str, BlockArray]]]], target: _Target) -> dict[TensorName, Entry]:
    """The scales of activations of stacks of experts in FP8: one on each rank, for all experts that it has."""
    stacks: dict[tuple[str, int], dict[int, list[fp8.Named]]] = defaultdict(dict)
    for parts in fused:
        for module, (slot, parameters) in parts.items():
            if slot.expert is not None and slot.layer is not None:
                measured = target.quantization.from_numbers
                scale = fp8_numbers.activation_scale([parameters]) if measured else parameters["input_scale"]
                stacks[slot.module.name, slot.layer].setdefault(slot.expert, []).append((target.source(module), scale))
    entries = {}
    for (owner, layer), by_expert in stacks.items():
        array, size = fp8.pack_stack([by_expert[expert] for expert in sorted(by_expert)], target.sharding.parallelism.moe_ep_size)
        name = TensorName(owner.replace("{layer}", str(layer)), "activation_scaling_factor")
        entries[name] = Entry(array, Slot(Module(owner, "replicate"), None, layer, None), size)
    return entries


def _weight(parameters: Mapping[str, BlockArray]) -> BlockArray:
    return parameters["weight"] if "weight" in parameters else numbers.dequantize(parameters)


def _cast(array: BlockArray, dtype: np.dtype) -> BlockArray:
    if array.dtype == dtype:
        return array
    return derive("cast", groupwise.cast, {"values": array}, shape=array.shape, dtype=dtype, rows=array.chunks[0], to=dtype)


def unfit(
    tensors: TensorMap, sharding: Sharding, quantization: Quantization, origin: Callable[[TensorName], object]
) -> list[Problem]:
    """Modules whose codes are not of the kind that the target keeps, when it keeps the source's."""
    if quantization.from_numbers or quantization.algorithm is None:
        return []
    misfits: dict[str, list[str]] = defaultdict(list)
    for name, parameters in by_module(tensors).items():
        slot = sharding.layout.find(name)
        if slot and is_quantized(slot, quantization, sharding.model.num_hidden_layers):
            misfit = _misfit(slot, parameters, quantization, sharding)
            if misfit:
                misfits[misfit].append(str(origin(TensorName(name, next(iter(parameters))))))
    expected = f"what {quantization.algorithm} keeps in every linear"
    remedy = f"{_again(quantization)}, or --dequantize for numbers"
    more = {misfit: f", in {len(names)} modules" if len(names) > 1 else "" for misfit, names in misfits.items()}
    return [Problem(names[0], f"{misfit}{more[misfit]}", expected, remedy) for misfit, names in misfits.items()]


def _again(quantization: Quantization) -> str:
    """The option by which all modules are quantized anew and alike, whatever each of them is in the source."""
    fits = quantization.algorithm in GROUPWISE and quantization.group_size in runtime().group_sizes
    size = "" if fits else f" --group_size {max(runtime().group_sizes)}"
    return f"Give --requantize{size}, which quantizes all of it again by round-to-nearest and so adds error"


def _misfit(slot: Slot, parameters: Mapping[str, BlockArray], quantization: Quantization, sharding: Sharding) -> str:
    """How a module's weights differ from the kind that the target keeps; "" where they do not."""
    codes = next((name for name in CODES if name in parameters), "")
    if quantization.algorithm in SMOOTHQUANT:
        rows = codes == "codes8" and parameters["scales"].shape[-2] == 1
        return "" if rows else "weights that are no codes of 8 bits with a scale a row"
    if quantization.algorithm == FP8_ROWWISE and not codes:
        return ""  # its numbers can be quantized by row, as no activations need calibration
    if not codes:
        return "weights that are not quantized"
    if quantization.bits:
        if codes != f"codes{quantization.bits}":
            return {"fp8": "float8 weights", "fp4": "NVFP4 weights"}.get(codes, f"codes of {codes[-1]} bits")
        size = sharding.model.dimension(slot.module.in_) // parameters["scales"].shape[-2]
        if quantization.algorithm in WEIGHT_ONLY:
            return "" if parameters["scales"].shape[-2] == 1 else f"groups of {size}, beside others of one a row"
        return "" if size == quantization.group_size else f"groups of {size}, beside others of {quantization.group_size}"
    if codes != ("fp4" if quantization.algorithm == NVFP4 else "fp8"):
        return {"fp8": "float8 weights", "fp4": "NVFP4 weights"}.get(codes, f"codes of {codes[-1]} bits")
    if quantization.algorithm == NVFP4 and ("input_scale" not in parameters or "prequant" in parameters):
        return "NVFP4 weights without a scale of the activations, or with factors of them"
    if quantization.algorithm == FP8 and not {"tensor_scale", "input_scale"} <= parameters.keys():
        return "float8 weights with scales of another kind"
    return ""


def sizes_agree(entries: Mapping[TensorName, Entry], origin: Callable[[TensorName], object]) -> list[Problem]:
    """Fused modules and stacks whose parts are not quantized alike: these share one tensor of one type."""
    kinds: dict[tuple[str, int | None, str], dict[str, TensorName]] = defaultdict(dict)
    written: dict[tuple[int, np.dtype], str] = {}  # once for each parameter that entries share
    for name, entry in entries.items():
        if entry.slot.module.in_layer:
            known, dtype = entry.parameter, entry.array.dtype
            kind = written.get((id(known), dtype))
            if kind is None:
                kind = written[id(known), dtype] = str((known.axes, known.header, known.dtype, dtype))
            kinds[entry.slot.module.name, entry.slot.layer, name.parameter].setdefault(kind, name)
    expected, remedy = "all parts of a fused module alike", "Give --dequantize, or --requantize, which quantizes all of it again"
    return [
        Problem(str(origin(names[1])), f"quantized otherwise than {origin(names[0])}", expected, remedy)
        for by_kind in kinds.values()
        if len(names := list(by_kind.values())) > 1
    ]
