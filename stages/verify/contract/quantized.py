"""config.json's `quantization`, and the tensors that a linear has under each algorithm.

Facts: checkpoint format, section 5; quantized layouts, sections 1, 4 to 8. Weights of GPTQ are in the kernel's order and pass for
the model's type; AWQ's are in ModelOpt's form, the one that every loader takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from stages.verify.contract.expected import Expected, Form, one
from stages.verify.contract.reader import Reader

# What `QuantConfig(**dict)` takes in one version or another from 0.13 to 1.2.1.
KNOWN = (
    "quant_algo",
    "kv_cache_quant_algo",
    "group_size",
    "smoothquant_val",
    "clamp_val",
    "use_meta_recipe",
    "has_zero_point",
    "pre_quant_scale",
    "exclude_modules",
    "mamba_ssm_cache_dtype",
    "mamba_ssm_stochastic_rounding",
    "mamba_ssm_philox_rounds",
)
WEIGHT_ONLY = {"W8A16": 8, "W4A16": 4}  # bits of a code
GPTQ = {"W8A16_GPTQ": 8, "W4A16_GPTQ": 4}
AWQ, FP8, FP8_ROWWISE = "W4A16_AWQ", "FP8", "FP8_PER_CHANNEL_PER_TOKEN"
ALGORITHMS = (*WEIGHT_ONLY, *GPTQ, AWQ, FP8, FP8_ROWWISE)
ITEM_BITS = 16  # of the types that models are quantized for
TILE = 64  # in-features and out-features that the kernels need whole


@dataclass(frozen=True)
class Quantization:
    """`algorithm`: "" for none. `group`: in-features of a group. `clamp`: whether activations have bounds. `exclude`: patterns."""

    algorithm: str = ""
    cache: bool = False
    group: int = 128
    zero: bool = False
    prequant: bool = False
    clamp: bool = False
    meta_recipe: bool = False
    exclude: tuple[str, ...] = ()

    def excluded(self, module: str) -> bool:
        """Whether a module, or the one that it is part of, is left as it is by name."""
        parent = module.rpartition(".")[0]
        return any(fnmatchcase(name, pattern) for pattern in self.exclude for name in (module, parent))

    @property
    def unit(self) -> int:
        """What the in-features and out-features of a rank must be a multiple of; the loader pads them otherwise."""
        if self.algorithm in GPTQ or self.algorithm == AWQ:
            return max(TILE, self.group)
        return TILE if self.algorithm in WEIGHT_ONLY else 1


@dataclass(frozen=True)
class Linear:
    """A matrix [out, inside] as a rank holds it. `split`: the axis of which it is a share. `experts`: how many are stacked."""

    name: str
    out: int
    inside: int
    split: str
    bias: bool = False
    experts: int = 0


def read_quantization(config: Mapping[str, Any]) -> tuple[Quantization, Reader]:
    """The block, and what is wrong with it. Without one nothing is quantized."""
    values = config.get("quantization")
    if values is None:
        return Quantization(), Reader({})
    if not isinstance(values, Mapping):
        reader = Reader(config)
        reader.wrong("quantization", "an object", fatal=True)
        return Quantization(), reader
    reader = Reader(values, "quantization.")
    reader.keys(KNOWN)
    if "quant_algo" not in values:
        reader.wrong("quant_algo", "an algorithm, or null", fatal=True)
    algorithm = reader.text("quant_algo", ALGORITHMS, default="")
    cache = reader.text("kv_cache_quant_algo", ("FP8", "INT8"), default="")
    clamp, exclude = values.get("clamp_val"), values.get("exclude_modules")
    if clamp is not None and not (isinstance(clamp, list) and len(clamp) == 2 and all(_number(bound) for bound in clamp)):
        reader.wrong("clamp_val", "two numbers, or null", fatal=True)
    if exclude is not None and not (isinstance(exclude, list) and all(isinstance(name, str) for name in exclude)):
        reader.wrong("exclude_modules", "a list of names, or null", fatal=True)
        exclude = None
    if algorithm not in ("", FP8_ROWWISE) and exclude and not any(fnmatchcase("lm_head", pattern) for pattern in exclude):
        reader.wrong("exclude_modules", "lm_head among them, or null: the loader quantizes what a list does not name")
    result = Quantization(
        algorithm,
        bool(cache),
        reader.size("group_size", default=128),
        reader.flag("has_zero_point"),
        reader.flag("pre_quant_scale"),
        clamp is not None,
        reader.flag("use_meta_recipe"),
        tuple(exclude or ()),
    )
    return result, reader


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def tensors(linear: Linear, prefix: str, quantization: Quantization, dtype: str, plain: bool) -> Iterator[tuple[str, Expected]]:
    """The tensors of a linear by full name. `plain`: it is not quantized, whatever the algorithm."""
    name, front = f"{prefix}{linear.name}", (linear.experts,) if linear.experts else ()
    if linear.bias:
        yield f"{name}.bias", one((*front, linear.out), dtype)
    if plain or not quantization.algorithm or quantization.excluded(name):
        yield f"{name}.weight", one((*front, linear.out, linear.inside), dtype)
        return
    for parameter, expected in _parameters(linear, front, name, quantization, dtype):
        yield f"{name}.{parameter}", expected


def _parameters(
    linear: Linear, front: tuple[int, ...], name: str, quantization: Quantization, dtype: str
) -> Iterator[tuple[str, Expected]]:
    out, inside, algorithm = linear.out, linear.inside, quantization.algorithm
    if algorithm in WEIGHT_ONLY:
        codes = Form((*front, inside, out * WEIGHT_ONLY[algorithm] // 8), "int8")
        scale = "per_channel_scale"
        # What is not int8 the builder quantizes itself.
        yield "weight", Expected((codes,), bare=Form((*front, out, inside), dtype), partners=(f"{name}.{scale}",))
        yield scale, one((*front, out), dtype)
    elif algorithm in (FP8, FP8_ROWWISE):
        yield "weight", one((*front, out, inside), "float8_e4m3fn")
        if algorithm == FP8_ROWWISE:
            yield "per_channel_scale", one((*front, out), "float32")
        else:
            yield "weights_scaling_factor", one((*front, 1), "float32")
            yield "activation_scaling_factor", one((1,), "float32")
    else:
        yield from _grouped(linear, front, quantization, dtype)


def _grouped(linear: Linear, front: tuple[int, ...], quantization: Quantization, dtype: str) -> Iterator[tuple[str, Expected]]:
    out, inside = linear.out, linear.inside
    groups = inside // quantization.group
    if quantization.algorithm == AWQ:
        yield "weight", one((*front, out // 2, inside), "int8")
        yield "weights_scaling_factor", one((*front, out, groups), "float32")
    else:
        yield "weight", one((*front, inside, out * GPTQ[quantization.algorithm] // ITEM_BITS), dtype)
        yield "weights_scaling_factor", one((*front, groups, out), dtype)
    if quantization.zero:
        yield "zero", one((*front, groups, out), dtype)
    if quantization.prequant:
        shapes: tuple[tuple[int, ...], ...] = ((1, inside),)
        if quantization.algorithm == AWQ:
            # The loader makes [1, inside] of each of them; of a stack it takes the first.
            shapes = ((*front, inside), (inside,)) if front else ((inside,), (1, inside))
        yield "prequant_scaling_factor", Expected(tuple(Form(shape, dtype) for shape in shapes))
