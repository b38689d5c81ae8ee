"""What planning checks before anything is written: that source, configuration and target agree, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import Problem
from pipeline.model.dtypes import of_numpy
from pipeline.model.model_config import ModelConfig
from pipeline.model.tables import Family, Module, Slot
from pipeline.tensor.placement import pieces, whole
from pipeline.tensor.tensors import LazyTensor, Parameter, Source, TensorMap, plain
from stages.quantization.sources import format_named, formats

if TYPE_CHECKING:
    import dask.array as da

    from stages.rename import Matches
    from stages.shard import Sharding

WEIGHTS = {"F64", "F32", "F16", "BF16"}
TYPES = {"codes4": {"U8"}, "codes8": {"U8"}, "offsets": {"I16"}, "fp8": {"F8_E4M3"}, "group_index": {"I32", "I64"}}
# What a quantized module has beside its codes, and what it may have.
SCHEMES = {
    "codes4": (("scales", "offsets"), ("group_index", "prequant", "input_scale")),
    "codes8": (("scales", "offsets"), ("group_index", "prequant", "input_scale")),
    "fp8": ((), ("channel_scale", "tensor_scale", "input_scale", "kv_scale")),
}


def parameters(module: Module, model: ModelConfig) -> tuple[str, ...]:
    """The parameters that TensorRT-LLM's loader asks of a module, by config.json alone."""
    if module.when and not getattr(model, module.when):
        return ()
    return ("weight", "bias") if module.bias and getattr(model, module.bias) else ("weight",)


def expected(sharding: Sharding, tensors: Mapping[str, object]) -> Iterator[tuple[str, Slot, str]]:
    """Every tensor that a target needs after unpacking: (name, slot, parameter).

    Experts are asked for one by one, unless their stack is there; a quantized module for its codes and scales.
    """
    model = sharding.model

    def of_module(base: str, slot: Slot, parameter: str) -> Iterator[tuple[str, Slot, str]]:
        codes = next((name for name in SCHEMES if f"{base}.{name}" in tensors), "") if parameter == "weight" else ""
        if not codes:
            yield f"{base}.{parameter}", slot, parameter
            return
        required, optional = SCHEMES[codes]
        for name in (codes, *required, *(name for name in optional if f"{base}.{name}" in tensors)):
            yield f"{base}.{name}", slot, name

    for module in sharding.layout.modules.values():
        for layer in range(model.num_hidden_layers) if module.in_layer else (None,):
            base = module.name.replace("{layer}", str(layer))
            for part in module.parts or (None,):
                suffix = f".{part.name}" if part else ""
                for parameter in parameters(module, model):
                    if not module.experts or f"{base}{suffix}.{parameter}" in tensors:
                        yield from of_module(f"{base}{suffix}", Slot(module, part, layer, None), parameter)
                        continue
                    for expert in range(model.num_experts):
                        yield from of_module(f"{base}.{expert}{suffix}", Slot(module, part, layer, expert), parameter)


def check_tensors(tensors: TensorMap, matches: Matches, sharding: Sharding, family: Family) -> list[Problem]:
    """Missing tensors, contradicting shapes, parameters that the configuration does not speak of, types that are no weights."""
    problems = []
    wanted = {}
    for name, slot, parameter in expected(sharding, tensors):
        wanted[name] = sharding.shape(slot, _measured(slot, parameter, tensors.get(name), sharding))
        if name not in tensors:
            remedy = "Fetch the missing shard, or mend the configuration"
            problems.append(Problem(source_name(name, family), "no such tensor", f"shape {list(wanted[name])}", remedy))
    for name, array in tensors.items():
        source = matches.origin(name)
        if name not in wanted:
            remedy = "A tensor that nothing consumes would be lost: remove it, or mend the configuration"
            problems.append(Problem(source, "a tensor that the configuration does not speak of", "none", remedy))
        elif array.shape != wanted[name]:
            problems.append(Problem(source, f"shape {list(array.shape)}", f"{list(wanted[name])} by the model's configuration"))
        elif of_numpy(array.dtype).safetensors not in TYPES.get(name.rpartition(".")[2], WEIGHTS):
            found, types = of_numpy(array.dtype).safetensors, ", ".join(sorted(TYPES.get(name.rpartition(".")[2], WEIGHTS)))
            problems.append(Problem(source, f"values of type {found}", f"weights of type {types}"))
    return problems


def _measured(slot: Slot, parameter: str, array: da.Array | None, sharding: Sharding) -> Parameter:
    """A parameter with the group size that its array shows, where it has groups."""
    known = plain(parameter, matrix=bool(slot.module.in_))
    units = {"codes4": {"in": Fraction(1, 2)}}.get(parameter, {})
    if parameter in ("scales", "offsets") and array is not None:
        units = {"group": Fraction(array.shape[-2], sharding.model.dimension(slot.module.in_))}
    return Parameter(tuple((axis, units.get(axis, unit)) for axis, unit in known.axes))


def check_quantization(source: Source, packed: Mapping[str, str]) -> list[Problem]:
    """A checkpoint that is quantized in a way that nothing unpacks is refused by name: its codes must not pass for weights."""
    settings = source.config.get("quantization_config")
    if not settings or packed:
        return []
    method = settings.get("quant_method", "unknown") if isinstance(settings, Mapping) else settings
    subject, remedy = f"{source.config_name}: quantization_config", "Convert the model that it was quantized from"
    known = ", ".join(each.title for each in formats()) + ", or none"
    return [Problem(subject, f"quant_method {method}, and no module packed in a known way", known, remedy)]


def check_fused(source: Source, matches: Matches, packed: Mapping[str, str]) -> list[Problem]:
    """A fused source has just the rows of its parts: more would be lost. `packed`: packed module -> its format."""
    rows = {renamed.source: (renamed.axis, renamed.total) for renamed in matches.names.values() if renamed.rows}
    problems = []
    for name, (axis, total) in rows.items():
        shape = source.tensors[name].shape
        module, _, parameter = name.rpartition(".")
        held = format_named(packed[module]).parameters.get(parameter) if module in packed else None
        if parameter in ("weight", "bias") and (len(shape) <= axis or shape[axis] * (held.rows if held else 1) != total):
            problems.append(Problem(name, f"shape {list(shape)}", f"{total} rows by the model's configuration"))
    return problems


def check_ties(source: Source, copies: Mapping[str, str]) -> list[Problem]:
    """Tied embeddings that come with a second copy: it must be one. Read a piece at a time."""
    problems = []
    for copy, original in copies.items():
        a, b = source.tensors[copy], source.tensors[original]
        if a.shape != b.shape or a.dtype != b.dtype or not all(_equal_pieces(a, b)):
            expected_, remedy = f"a copy of {original}", "Set tie_word_embeddings to false, or remove the tensor"
            problems.append(Problem(copy, "other values, though the configuration says tied", expected_, remedy))
    return problems


def _equal_pieces(a: LazyTensor, b: LazyTensor) -> Iterator[bool]:
    for piece in pieces(whole(a.shape), a.dtype.itemsize, 8 << 20):
        yield np.asarray(a.block(piece)).tobytes() == np.asarray(b.block(piece)).tobytes()


def source_name(name: str, family: Family) -> str:
    """What a family's checkpoints call a renamed tensor."""
    module, _, parameter = name.rpartition(".")
    found = family.sources().find(module)
    if found is None:
        return name
    pattern, numbers = found
    return f"{pattern.format(**numbers)}.{parameter}"
