"""The options of one target: how its ranks are cut, what they are quantized to, and where they go."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from pipeline.model.parallelism import Parallelism
from pipeline.planning.job_file import absolute_path, output_place
from pipeline.planning.keywords import QuantizationName
from pipeline.planning.quantizations import completed, contradictions


def _number(value: Any) -> Any:
    """Make a number of text that is one, as the command line has it beside names; return any other value unchanged."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


AbsolutePath = Annotated[Path, BeforeValidator(absolute_path)]
OutputPlace = Annotated[Path, BeforeValidator(output_place)]
Size = Annotated[int, Field(ge=1)]
ExpertSize = Annotated[int, Field(ge=-1)]
Alpha = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
ShardingDim = Annotated[Literal[0, 1], BeforeValidator(_number)]
Generations = Annotated[Literal[75, 80, 86, 87, 89, 90, 100, 103, 120, 121, "any"], BeforeValidator(_number)]


class Shape(BaseModel):
    """The options that decide how a target is written. The defaults are those of NVIDIA's converter."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), defer_build=True)

    dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        "auto", description="Type of the weights; auto: the source's, that of its tensors where it names none (float32: float16)."
    )
    tp_size: Size = Field(1, description="Tensor-parallel ranks.")
    pp_size: Size = Field(1, description="Pipeline stages.")
    cp_size: Size = Field(1, description="Context-parallel ranks (recorded; they share files).")
    moe_tp_size: ExpertSize = Field(-1, description="Tensor-parallel size inside experts; -1: all that moe_ep_size leaves.")
    moe_ep_size: ExpertSize = Field(-1, description="Expert-parallel size; -1: 1.")
    use_parallel_embedding: bool = Field(False, description="Split the embedding over the tensor-parallel ranks.")
    embedding_sharding_dim: ShardingDim = Field(0, description="Axis of that split: 0 vocabulary, 1 hidden.")
    write_rope_buffers: bool = Field(False, description="Write the rotary position buffers, which the loader computes itself.")
    # Not part of what a job is written down as: the flags are, and the name follows from them.
    quantization: QuantizationName = Field(
        "none", exclude=True, description="Quantization in one word, for NVIDIA's flags below; none: as the source is."
    )
    use_weight_only: bool = Field(False, description="Quantize weights, or take a source's codes, as weight_only_precision says.")
    weight_only_precision: Literal["int8", "int4", "int4_gptq", "int8_gptq", "int4_awq"] = Field(
        "int8",
        description="int8 and int4 quantize, int4_awq with measured activations; the others are for sources that are quantized so.",
    )
    use_fp8: bool = Field(False, description="FP8 with a scale a matrix: takes a source's codes, or quantizes with --act_range.")
    use_fp8_rowwise: bool = Field(False, description="FP8 with a scale a row: quantizes, or takes a source's codes.")
    use_nvfp4: bool = Field(False, description="NVFP4, for sources that are quantized so.")
    use_meta_fp8_rowwise_recipe: bool = Field(False, description="Leave attention, the first and the last layer out of FP8.")
    smoothquant: Alpha | None = Field(
        None, description="SmoothQuant, int8 weights and activations, with this alpha (0.5 as a rule); takes --act_range."
    )
    per_channel: bool = Field(False, description="SmoothQuant with a scale for each row of a weight.")
    per_token: bool = Field(False, description="SmoothQuant with a scale for each token, taken where the engine runs.")
    int8_kv_cache: bool = Field(False, description="INT8 for the key-value cache, with scales of --act_range.")
    fp8_kv_cache: bool = Field(
        False, description="FP8 for the key-value cache, with the source's scales, those of --act_range, or 1."
    )
    group_size: Size | None = Field(
        None, description="In-features that share a scale, of targets in groups; default: the source's, or 128."
    )
    sm: Generations = Field(
        80, description="GPU generation that integer weights are arranged for; any: int8 and int4 as numbers, quantized at build."
    )
    dequantize: bool = Field(False, description="Turn a quantized source into numbers before anything else.")
    requantize: bool = Field(
        False, description="Dequantize, and quantize again by round-to-nearest, as for groups in another order."
    )
    disable_weight_only_quant_plugin: bool = Field(False, description="Recorded in config.json, as NVIDIA's flag.")
    remove_duplicated_kv_heads: bool = Field(False, description="Recorded in config.json, as NVIDIA's flag.")

    @model_validator(mode="before")
    @classmethod
    def _one_quantization(cls, values: Any) -> Any:
        """Have `quantization` and NVIDIA's flags say the same, whichever was given."""
        if not isinstance(values, Mapping):
            return values
        for problem in contradictions(values):
            raise ValueError(str(problem))
        return completed(values)

    @property
    def parallelism(self) -> Parallelism:
        """The parallel sizes, with the experts' sizes filled in."""
        return Parallelism.resolve(self.tp_size, self.pp_size, self.cp_size, self.moe_tp_size, self.moe_ep_size)


class TargetOptions(Shape):
    """One output directory, its options and those of its engine: a `[[target]]` of a job file."""

    output_dir: OutputPlace
    engine: dict[str, Any] | None = None

    def identity(self) -> dict[str, Any]:
        """Return the fields that decide which bytes are written, as plain values."""
        return self.model_dump(mode="json", exclude={"output_dir", "engine"})
