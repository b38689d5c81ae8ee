"""config.json's `quantization`, and the tensors that a linear has under each algorithm.

Facts: docs/format/checkpoint.md, section 5; docs/format/quantized-layouts.md, sections 1, 4 to 8. Weights of GPTQ are in the
kernel's order and pass for the model's type; AWQ's are in ModelOpt's form, the one that every loader takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from stages.verify.contract.expected import ExpectedTensor, TensorForm, single_form
from stages.verify.contract.reader import ConfigReader, is_number

# The keys that `QuantConfig(**dict)` takes in some version from 0.13 to 1.2.1.
KEYS = (
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
AWQ, FP8, FP8_ROWWISE, NVFP4 = "W4A16_AWQ", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4"
# SmoothQuant: whether each row of a weight has a scale, and whether each token of the activations has.
SMOOTHQUANT = {
    "W8A8_SQ_PER_TENSOR_PLUGIN": (False, False),
    "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN": (True, False),
    "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN": (False, True),
    "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN": (True, True),
}
ALGORITHMS = (*WEIGHT_ONLY, *GPTQ, AWQ, FP8, FP8_ROWWISE, NVFP4, *SMOOTHQUANT)
NVFP4_GROUP = 16  # in-features of a scale, which the class does not ask config.json for
ITEM_BITS = 16  # of the types that models are quantized for
TILE = 64  # in-features and out-features that the kernels need whole


@dataclass(frozen=True)
class QuantizationBlock:
    """config.json's `quantization`, as far as tensors depend on it.

    `algorithm`: "" for none. `cache`: whether keys and values are quantized. `group`: in-features of a group. `zero`: whether
    groups have zero points. `prequant`: whether activations are scaled before a matrix. `clamp`: whether activations are clamped.
    `meta_recipe`: whether Meta's FP8 recipe decides which layers are quantized. `exclude`: patterns of modules that are not
    quantized.
    """

    algorithm: str = ""
    cache: bool = False
    group: int = 128
    zero: bool = False
    prequant: bool = False
    clamp: bool = False
    meta_recipe: bool = False
    exclude: tuple[str, ...] = ()

    def excluded(self, module: str) -> bool:
        """Whether a pattern names a module, or the module around it, so that it is not quantized."""
        parent = module.rpartition(".")[0]
        return any(fnmatchcase(name, pattern) for pattern in self.exclude for name in (module, parent))

    @property
    def unit(self) -> int:
        """The number that a rank's in-features and out-features must be multiples of; otherwise the loader pads them."""
        if self.algorithm in GPTQ or self.algorithm == AWQ:
            return max(TILE, self.group)
        return TILE if self.algorithm in WEIGHT_ONLY else 1


@dataclass(frozen=True)
class Linear:
    """A matrix [out_features, in_features] as a rank holds it: [out, inside].

    `split`: the axis that ranks share, "out" or "in". `experts`: how many matrices are stacked, 0 for no stack.
    """

    name: str
    out: int
    inside: int
    split: str
    bias: bool = False
    experts: int = 0


def read_quantization(config: Mapping[str, Any]) -> tuple[QuantizationBlock, ConfigReader]:
    """Read config.json's `quantization`; the reader holds what is wrong with it. Without one nothing is quantized."""
    values = config.get("quantization")
    if values is None:
        return QuantizationBlock(), ConfigReader({})
    if not isinstance(values, Mapping):
        reader = ConfigReader(config)
        reader.wrong("quantization", "an object", fatal=True)
        return QuantizationBlock(), reader
    reader = ConfigReader(values, "quantization.")
    reader.check_keys(KEYS)
    if "quant_algo" not in values:
        reader.wrong("quant_algo", "an algorithm, or null", fatal=True)
    algorithm = reader.text("quant_algo", ALGORITHMS, default="")
    cache = reader.text("kv_cache_quant_algo", ("FP8", "INT8"), default="")
    clamp, exclude = values.get("clamp_val"), values.get("exclude_modules")
    if clamp is not None and not (isinstance(clamp, list) and len(clamp) == 2 and all(is_number(bound) for bound in clamp)):
        reader.wrong("clamp_val", "two numbers, or null", fatal=True)
    if exclude is not None and not (isinstance(exclude, list) and all(isinstance(name, str) for name in exclude)):
        reader.wrong("exclude_modules", "a list of names, or null", fatal=True)
        exclude = None
    if algorithm not in ("", FP8_ROWWISE) and exclude and not any(fnmatchcase("lm_head", pattern) for pattern in exclude):
        reader.wrong("exclude_modules", "lm_head among them, or null: the loader quantizes what a list does not name")
    result = QuantizationBlock(
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


def linear_tensors(
    linear: Linear, prefix: str, quantization: QuantizationBlock, dtype: str, plain: bool
) -> Iterator[tuple[str, ExpectedTensor]]:
    """The tensors of a linear module, with their names; `prefix` stands before the module's.

    `dtype`: the model's. `plain`: the module is not quantized, whatever the algorithm.
    """
    name, front = f"{prefix}{linear.name}", (linear.experts,) if linear.experts else ()
    if linear.bias:
        yield f"{name}.bias", single_form((*front, linear.out), dtype)
    if plain or not quantization.algorithm or quantization.excluded(name):
        yield f"{name}.weight", single_form((*front, linear.out, linear.inside), dtype)
        return
    for parameter, expected in _parameters(linear, front, name, quantization, dtype):
        yield f"{name}.{parameter}", expected


def _parameters(
    linear: Linear, front: tuple[int, ...], name: str, quantization: QuantizationBlock, dtype: str
) -> Iterator[tuple[str, ExpectedTensor]]:
    out, inside, algorithm = linear.out, linear.inside, quantization.algorithm
    if algorithm in WEIGHT_ONLY:
        codes = TensorForm((*front, inside, out * WEIGHT_ONLY[algorithm] // 8), "int8")
        scale = "per_channel_scale"
        # The builder itself quantizes a weight that is not int8.
        yield "weight", ExpectedTensor((codes,), bare=TensorForm((*front, out, inside), dtype), partners=(f"{name}.{scale}",))
        yield scale, single_form((*front, out), dtype)
    elif algorithm in (FP8, FP8_ROWWISE):
        yield "weight", single_form((*front, out, inside), "float8_e4m3fn")
        if algorithm == FP8_ROWWISE:
            yield "per_channel_scale", single_form((*front, out), "float32")
        else:
            yield "weights_scaling_factor", single_form((*front, 1), "float32")
            yield "activation_scaling_factor", single_form((1,), "float32")
    elif algorithm in SMOOTHQUANT:
        yield from _smoothed(linear, *SMOOTHQUANT[algorithm])
    elif algorithm == NVFP4:
        # The loader reads the shape of the scales as that of a matrix, interleaves them, and renames all (runtime-1.2.md, h2).
        yield "weight", single_form((*front, out, inside // 2), "uint8")
        yield "weights_scaling_factor", single_form((*front, out, inside // NVFP4_GROUP), "float8_e4m3fn")
        yield "weights_scaling_factor_2", single_form((1,), "float32")
        yield "activation_scaling_factor", single_form((1,), "float32")
    else:
        yield from _grouped(linear, front, quantization, dtype)


def _smoothed(linear: Linear, by_row: bool, by_token: bool) -> Iterator[tuple[str, ExpectedTensor]]:
    """SmoothQuant's: attention's three parts have a scale each, which is that of each of their rows.

    Facts: docs/format/quantized-layouts.md, section 4d.
    """
    yield "weight", single_form((linear.out, linear.inside), "int8")
    rows = linear.out if by_row or linear.name == "attention.qkv" else 1
    yield "per_channel_scale", single_form((1, rows), "float32")
    if not by_token:
        yield "act_scale", single_form((1, 1), "float32")
    if linear.split == "in":
        yield "smoother", single_form((1, linear.inside), "float32")


def activation_scales(prefix: str, quantization: QuantizationBlock) -> Iterator[tuple[str, ExpectedTensor]]:
    """The scales of SmoothQuant's activations, with their names; `prefix` stands before those of a layer's modules."""
    if quantization.algorithm not in SMOOTHQUANT:
        return
    names = ["input_layernorm.scale_to_int", "post_layernorm.scale_to_int"]
    if not SMOOTHQUANT[quantization.algorithm][1]:
        names += ["attention.quantization_scaling_factor", "mlp.quantization_scaling_factor"]
    yield from ((f"{prefix}{name}", single_form((1,), "float32")) for name in names)


def _grouped(
    linear: Linear, front: tuple[int, ...], quantization: QuantizationBlock, dtype: str
) -> Iterator[tuple[str, ExpectedTensor]]:
    out, inside = linear.out, linear.inside
    groups = inside // quantization.group
    if quantization.algorithm == AWQ:
        yield "weight", single_form((*front, out // 2, inside), "int8")
        yield "weights_scaling_factor", single_form((*front, out, groups), "float32")
    else:
        yield "weight", single_form((*front, inside, out * GPTQ[quantization.algorithm] // ITEM_BITS), dtype)
        yield "weights_scaling_factor", single_form((*front, groups, out), dtype)
    if quantization.zero:
        yield "zero", single_form((*front, groups, out), dtype)
    if quantization.prequant:
        shapes: tuple[tuple[int, ...], ...] = ((1, inside),)
        if quantization.algorithm == AWQ:
            # The loader makes [1, inside] of each of them; of a stack it takes the first.
            shapes = ((*front, inside), (inside,)) if front else ((inside,), (1, inside))
        yield "prequant_scaling_factor", ExpectedTensor(tuple(TensorForm(shape, dtype) for shape in shapes))
