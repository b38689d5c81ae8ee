"""The keywords of the Python API as types, so that an editor completes them and a type checker holds calls against them.

JobOptions is what Job takes, by field; BuildOptions is what EngineOptions takes, and trtllm-build's own options. Values are checked
where they are used, by Job and EngineOptions; that both say the same is tested.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

Dtype: TypeAlias = Literal["auto", "float16", "bfloat16", "float32"]
CutName: TypeAlias = Literal["read", "rename", "unpack", "shard", "auto", "none"]
QuantizationName: TypeAlias = Literal[
    "none",
    "int8",
    "int4",
    "int4_gptq",
    "int8_gptq",
    "int4_awq",
    "fp8",
    "fp8_rowwise",
    "nvfp4",
    "w8a8_sq",
    "w8a8_sq_per_channel",
    "w8a8_sq_per_token",
    "w8a8_sq_per_tensor",
]
Switch: TypeAlias = bool | Literal["enable", "disable"]
Plugin: TypeAlias = Literal["auto", "float16", "float32", "bfloat16", "int32", "disable"]


class _Common(TypedDict, total=False):
    """The fields of Shape that the loaders do not name themselves."""

    cp_size: int
    moe_tp_size: int
    moe_ep_size: int
    use_parallel_embedding: bool
    embedding_sharding_dim: Literal[0, 1]
    write_rope_buffers: bool
    quantization: QuantizationName
    use_weight_only: bool
    weight_only_precision: Literal["int8", "int4", "int4_gptq", "int8_gptq", "int4_awq"]
    use_fp8: bool
    use_fp8_rowwise: bool
    use_nvfp4: bool
    use_meta_fp8_rowwise_recipe: bool
    smoothquant: float | None
    per_channel: bool
    per_token: bool
    int8_kv_cache: bool
    fp8_kv_cache: bool
    group_size: int | None
    sm: Literal[75, 80, 86, 87, 89, 90, 100, 103, 120, 121, "any"]
    dequantize: bool
    requantize: bool
    disable_weight_only_quant_plugin: bool
    remove_duplicated_kv_heads: bool


class ShapeOptions(_Common, total=False):
    """The fields of Shape: what a target looks like."""

    dtype: Dtype
    tp_size: int
    pp_size: int


class LoadOptions(_Common, total=False):
    """The keywords that loaders take beside their own arguments."""

    act_range: str | Path | None
    revision: str | None
    max_position_embeddings: int | None
    rope_scaling_factor: float | None
    query_pre_attn_scalar: int | None
    mlp_bias: Literal["omit", "keep", "refuse"]
    rope_scaling: Literal["auto", "none", "keep"]


class BuildOptions(TypedDict, total=False):
    """The options of an engine: headrace's own, then those of trtllm-build 1.2.1 by their names without dashes."""

    output_dir: str | Path | None
    builder: Literal["auto", "command", "python"]
    trtllm_build: str
    container: str | Sequence[str]
    retries: int
    overwrite: bool

    build_config: str | Path
    model_cls_file: str | Path
    model_cls_name: str
    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    max_decoder_seq_len: int
    max_beam_width: int
    max_num_tokens: int
    opt_num_tokens: int
    max_encoder_input_len: int
    max_prompt_embedding_table_size: int
    max_multimodal_len: int
    kv_cache_type: str
    paged_kv_cache: str
    input_timing_cache: str | Path
    output_timing_cache: str | Path
    profiling_verbosity: Literal["layer_names_only", "detailed", "none"]
    strip_plan: bool
    weight_sparsity: bool
    weight_streaming: bool
    fast_build: bool
    workers: int
    log_level: Literal["internal_error", "error", "warning", "info", "verbose", "debug", "trace"]
    enable_debug_output: bool
    visualize_network: str | Path
    monitor_memory: bool
    logits_dtype: Literal["float16", "float32"]
    gather_context_logits: bool
    gather_generation_logits: bool
    gather_all_token_logits: bool
    lora_dir: str | Path | Sequence[str | Path]
    lora_ckpt_source: Literal["hf", "nemo"]
    lora_target_modules: str | Sequence[str]
    max_lora_rank: int
    speculative_decoding_mode: Literal["draft_tokens_external", "lookahead_decoding", "medusa", "explicit_draft_tokens", "eagle"]
    max_draft_len: int
    bert_attention_plugin: Plugin
    gpt_attention_plugin: Plugin
    gemm_plugin: Literal["auto", "float16", "float32", "bfloat16", "int32", "fp8", "nvfp4", "disable"]
    gemm_swiglu_plugin: Literal["fp8", "disable"]
    fp8_rowwise_gemm_plugin: Plugin
    lora_plugin: Plugin
    dora_plugin: Switch
    moe_plugin: Plugin
    mamba_conv1d_plugin: Plugin
    nccl_plugin: Plugin
    low_latency_gemm_plugin: Literal["fp8", "disable"]
    low_latency_gemm_swiglu_plugin: Literal["fp8", "disable"]
    gemm_allreduce_plugin: Literal["float16", "bfloat16", "disable"]
    context_fmha: Switch
    bert_context_fmha_fp32_acc: Switch
    remove_input_padding: Switch
    tokens_per_block: int
    use_paged_context_fmha: Switch
    use_fp8_context_fmha: Switch
    fuse_fp4_quant: Switch
    multiple_profiles: Switch
    paged_state: Switch
    streamingllm: Switch
    norm_quant_fusion: Switch
    reduce_fusion: Switch
    user_buffer: Switch
    use_fused_mlp: Switch
    pp_reduce_scatter: Switch


class TargetTable(ShapeOptions, total=False):
    """One of several targets: a [[target]] table of a job file."""

    output_dir: str | Path
    engine: BuildOptions | None


class JobOptions(ShapeOptions, total=False):
    """The fields of Job."""

    model_dir: str | Path | None
    meta_ckpt_dir: str | Path | None
    quant_ckpt_path: str | Path | None
    act_range: str | Path | None
    calibration_tokens: str | Path | None
    calib_dataset: str | Path | None
    calib_size: int
    calib_max_seq_length: int
    calibration_dtype: Dtype
    calibration_device: str
    revision: str | None
    output_dir: str | Path | None
    target: Sequence[TargetTable]
    engine: BuildOptions | None
    max_position_embeddings: int | None
    rope_scaling_factor: float | None
    query_pre_attn_scalar: int | None
    expect: dict[str, int | float | str]
    mlp_bias: Literal["omit", "keep", "refuse"]
    rope_scaling: Literal["auto", "none", "keep"]
    check_crc: bool
    copy_tokenizer: bool
    workers: int
    memory_limit: int | str
    scheduler: str
    cluster: dict[str, Any] | None
    listen: str | None
    performance_report: str | Path | None
    scratch: str | Path | None
    scratch_after: str | Sequence[CutName]
    keep_scratch: bool
    scratch_outputs: Sequence[str | Path]
    sync: bool
    overwrite: bool
    per_group: bool
    load_by_shard: bool
    load_model_on_cpu: bool


def naming_keywords(options: Any) -> Callable[[Function], Function]:
    """Return a decorator that has a function's signature name the keywords of a TypedDict, in the place of `**options`.

    Type checkers know them from `Unpack`; notebooks and `help` ask the function itself.
    """

    def named(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        keywords = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=..., annotation=getattr(hint, "__forward_arg__", hint))
            for name, hint in options.__annotations__.items()
            if name not in signature.parameters
        ]
        function.__signature__ = signature.replace(parameters=[*own, *keywords])  # type: ignore[attr-defined]
        return function

    return named
