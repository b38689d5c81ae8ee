"""tensorrt_llm.commands.build: the parser of trtllm-build 1.2.1, what it does for a rank, and for all."""

from __future__ import annotations

import argparse
import copy
import os
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any

import torch

from tensorrt_llm.builder import FIELDS, BuildConfig, Engine, build
from tensorrt_llm.logger import logger, severity_map
from tensorrt_llm.models import MODEL_MAP, PretrainedConfig
from tensorrt_llm.plugin import PluginConfig, add_plugin_argument

__all__ = ["BuildConfig", "Engine", "PluginConfig", "PretrainedConfig", "build"]


class KVCacheType(StrEnum):
    CONTINUOUS, PAGED, DISABLED = "continuous", "paged", "disabled"


class QuantAlgo(StrEnum):
    FP8, MIXED_PRECISION = "FP8", "MIXED_PRECISION"


class SpeculativeDecodingMode(Enum):
    NONE = 1

    @staticmethod
    def from_arguments(args: argparse.Namespace) -> int:
        assert args.speculative_decoding_mode is None
        return SpeculativeDecodingMode.NONE.value


def parse_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name in ("checkpoint_dir", "model_config", "build_config", "model_cls_file", "model_cls_name"):
        parser.add_argument(f"--{name}", type=str, default=None, help=f"The {name.replace('_', ' ')}.")
    parser.add_argument("--output_dir", type=str, default="engine_outputs", help="The directory path to save the engine files.")
    for name in ("max_batch_size", "max_input_len"):
        parser.add_argument(f"--{name}", type=int, default=FIELDS[name], help="Maximum number.")
    parser.add_argument(
        "--max_seq_len", "--max_decoder_seq_len", dest="max_seq_len", type=int, default=None, help="Maximum length."
    )
    for name in ("max_beam_width", "max_num_tokens", "opt_num_tokens", "max_encoder_input_len"):
        text = "Maximum number; you may disable it by specifying ``--remove_input_padding disable``."
        parser.add_argument(f"--{name}", type=int, default=FIELDS[name], help=text)
    parser.add_argument("--max_prompt_embedding_table_size", "--max_multimodal_len", type=int, default=0, help="Maximum size.")
    parser.add_argument("--kv_cache_type", default=argparse.SUPPRESS, type=KVCacheType, help="Set KV cache type.")
    parser.add_argument("--paged_kv_cache", type=str, default=argparse.SUPPRESS, help="Deprecated.")
    parser.add_argument("--input_timing_cache", type=str, default=None, help="The file path to read the timing cache.")
    parser.add_argument("--output_timing_cache", type=str, default="model.cache", help="The file path to write the timing cache.")
    verbosities = ["layer_names_only", "detailed", "none"]
    parser.add_argument("--profiling_verbosity", type=str, default=verbosities[0], choices=verbosities, help="Verbosity.")
    for name in ("strip_plan", "weight_sparsity", "weight_streaming", "fast_build"):
        parser.add_argument(f"--{name}", default=False, action="store_true", help="Enable it.")
    parser.add_argument("--workers", type=int, default=1, help="The number of workers for building in parallel.")
    parser.add_argument("--log_level", type=str, default="info", choices=severity_map.keys(), help="The logging level.")
    parser.add_argument("--visualize_network", type=str, default=None, help="The directory path to export the network.")
    for name in ("enable_debug_output", "dry_run", "monitor_memory"):
        parser.add_argument(f"--{name}", default=False, action="store_true", help="Enable it.")
    logits = parser.add_argument_group("Logits arguments")
    logits.add_argument("--logits_dtype", type=str, default=None, choices=["float16", "float32"], help="The data type of logits.")
    for name in ("gather_context_logits", "gather_generation_logits", "gather_all_token_logits"):
        logits.add_argument(f"--{name}", action="store_true", default=False, help="Enable it.")
    lora = parser.add_argument_group("LoRA arguments")
    lora.add_argument("--lora_dir", type=str, default=None, nargs="+", help="The directory of LoRA weights.")
    lora.add_argument("--lora_ckpt_source", type=str, default="hf", choices=["hf", "nemo"], help="The source type.")
    lora.add_argument("--lora_target_modules", nargs="+", default=None, choices=["attn_qkv", "attn_q", "mlp_gate"], help="Modules.")
    lora.add_argument("--max_lora_rank", type=int, default=64, help="Maximum LoRA rank.")
    spec = parser.add_argument_group("Speculative decoding arguments")
    spec.add_argument("--speculative_decoding_mode", default=None, choices=["lookahead_decoding", "medusa", "eagle"], help="Mode.")
    spec.add_argument("--max_draft_len", type=int, default=0, help="Maximum lengths of draft tokens.")
    add_plugin_argument(parser.add_argument_group("Plugin config arguments"))
    return parser


def build_model(
    build_config: BuildConfig,
    rank: int = 0,
    ckpt_dir: str | None = None,
    model_config: PretrainedConfig | None = None,
    model_cls: Any = None,
    dry_run: bool = False,
    **kwargs: Any,
) -> Engine:
    assert isinstance(build_config, BuildConfig)
    assert isinstance(model_config, PretrainedConfig)
    known = {"logits_dtype", "use_fused_mlp", "lora_dir", "lora_ckpt_source", "max_lora_rank", "lora_target_modules", "strip_plan"}
    assert kwargs.keys() == known | {"refit"}, kwargs.keys() ^ known
    assert not dry_run
    config = copy.deepcopy(model_config)
    if kwargs["logits_dtype"] is not None:
        config.values["logits_dtype"] = kwargs["logits_dtype"]
    assert not build_config.plugin_config.streamingllm, "StreamingLLM is no longer supported"
    assert rank < config.mapping.world_size
    config.set_rank(rank)
    model = (model_cls or MODEL_MAP[config.architecture]).from_checkpoint(ckpt_dir, config=config)
    build_config.use_strip_plan = kwargs["strip_plan"]
    return build(model, build_config)


def build_and_save(
    rank: int, gpu_id: int, ckpt_dir: str, build_config: BuildConfig, output_dir: str, log_level: str, **more: Any
) -> None:
    torch.cuda.set_device(gpu_id)
    logger.set_level(log_level)
    build_model(build_config, rank, ckpt_dir, **more).save(output_dir)


def main() -> None:
    args = parse_arguments().parse_args()
    logger.set_level(args.log_level)
    began = time.time()
    os.makedirs(args.output_dir, exist_ok=True)  # noqa: PTH103
    plugins = PluginConfig.from_arguments(args)
    plugins.validate()
    config = PretrainedConfig.from_json_file(str(Path(args.checkpoint_dir, "config.json")))
    values = {name: getattr(args, name) for name in FIELDS if hasattr(args, name)}
    values |= {"plugin_config": plugins, "speculative_decoding_mode": SpeculativeDecodingMode.from_arguments(args)}
    build_config = BuildConfig(**values)
    names = ("logits_dtype", "use_fused_mlp", "lora_dir", "lora_ckpt_source", "max_lora_rank", "lora_target_modules", "strip_plan")
    more = {"model_config": config, "model_cls": None, "refit": False, **{name: getattr(args, name) for name in names}}
    workers = min(torch.cuda.device_count(), args.workers)
    with ThreadPoolExecutor(workers) as pool:
        ranks = range(config.mapping.world_size)
        given = (args.checkpoint_dir, build_config, args.output_dir, args.log_level)
        futures = [pool.submit(build_and_save, rank, rank % workers, *given, **more) for rank in ranks]
        failed = 0
        for future in futures:
            try:
                future.result()
            except Exception:
                traceback.print_exc()
                failed += 1
        assert not failed, "Engine building failed, please check error log."
    logger.info(f"Total time of building all engines: {time.strftime('%H:%M:%S', time.gmtime(time.time() - began))}")
