"""Build the engine of one rank through TensorRT-LLM's Python API: a script that takes trtllm-build's options and `--rank N`.

It does for one rank what `trtllm-build` 1.2.1 does for each: its own parser, plugin and build configuration, `build_model`, and
`Engine.save`, which writes rank{N}.engine and, on rank 0, config.json. It runs as a process of its own, as the API keeps the
network under construction in globals, and a thread cannot be stopped. It imports no module of headrace, so that it runs anywhere.
Facts: tensorrt_llm/commands/build.py, builder.py and plugin/plugin.py of 1.2.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

# The fields of BuildConfig that are options of the same name.
FIELDS = (
    "max_input_len",
    "max_seq_len",
    "max_batch_size",
    "max_beam_width",
    "max_num_tokens",
    "opt_num_tokens",
    "max_prompt_embedding_table_size",
    "gather_context_logits",
    "gather_generation_logits",
    "weight_sparsity",
    "profiling_verbosity",
    "enable_debug_output",
    "max_draft_len",
    "input_timing_cache",
    "output_timing_cache",
    "dry_run",
    "visualize_network",
    "max_encoder_input_len",
    "weight_streaming",
    "monitor_memory",
)
# The arguments of build_model beside the build configuration.
EXTRAS = ("logits_dtype", "use_fused_mlp", "lora_dir", "lora_ckpt_source", "max_lora_rank", "lora_target_modules", "strip_plan")


def main(words: list[str]) -> None:
    """Build and save the engine of the rank that `--rank` names; without `--rank`, only parse the options, as for --help."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--rank", type=int)
    mine, rest = own.parse_known_args(words)
    commands = importlib.import_module("tensorrt_llm.commands.build")
    arguments = commands.parse_arguments().parse_args(rest)
    if mine.rank is None:
        return
    importlib.import_module("tensorrt_llm.logger").logger.set_level(arguments.log_level)
    _take_gpu(mine.rank)
    engine = build_rank(commands, arguments, mine.rank)
    if engine is None:
        raise SystemExit(f"the builder returned no engine for rank {mine.rank}")
    engine.save(arguments.output_dir)


def build_rank(commands: Any, arguments: Any, rank: int) -> Any:
    """Build a rank's tensorrt_llm.builder.Engine. `commands`: tensorrt_llm.commands.build. `arguments`: as its parser returns."""
    if arguments.gather_all_token_logits:
        arguments.gather_context_logits = arguments.gather_generation_logits = True
    if arguments.gather_context_logits and arguments.max_draft_len > 0:
        raise SystemExit("--gather_context_logits and --max_draft_len exclude one another")
    if arguments.multiple_profiles == "enable" and arguments.opt_num_tokens is not None:
        raise SystemExit("--multiple_profiles enable and --opt_num_tokens exclude one another")
    plugins = commands.PluginConfig.from_arguments(arguments)
    plugins.validate()
    if arguments.fast_build:
        plugins.manage_weights = True
    config = commands.PretrainedConfig.from_json_file(str(Path(arguments.checkpoint_dir, "config.json")))
    extras = {name: getattr(arguments, name) for name in EXTRAS}
    algorithm = config.quantization.quant_algo
    if algorithm and algorithm not in (commands.QuantAlgo.FP8, commands.QuantAlgo.MIXED_PRECISION):
        extras["use_fused_mlp"] = False  # as trtllm-build does: other algorithms have no fused kernel
    return commands.build_model(
        _build_config(commands, arguments, plugins, config),
        rank,
        arguments.checkpoint_dir,
        config,
        model_cls=_model_class(arguments),
        refit=False,
        **extras,
    )


def _build_config(commands: Any, arguments: Any, plugins: Any, config: Any) -> Any:
    """The BuildConfig of the options, as trtllm-build makes it."""
    if arguments.build_config is not None:
        build_config = commands.BuildConfig.from_json_file(arguments.build_config)
        build_config.plugin_config = plugins
        return build_config
    return commands.BuildConfig(
        **{name: getattr(arguments, name) for name in FIELDS},
        kv_cache_type=getattr(arguments, "kv_cache_type", None),
        strongly_typed=True,
        force_num_profiles=os.environ.get("BUILDER_FORCE_NUM_PROFILES"),
        speculative_decoding_mode=commands.SpeculativeDecodingMode.from_arguments(arguments),
        use_mrope=getattr(config, "qwen_type", None) == "qwen2_vl",
        plugin_config=plugins,
    )


def _model_class(arguments: Any) -> Any:
    """The class of a model that the user defines; None for TensorRT-LLM's own."""
    if arguments.model_cls_file is None:
        return None
    spec = importlib.util.spec_from_file_location("models", arguments.model_cls_file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"--model_cls_file {arguments.model_cls_file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, arguments.model_cls_name)


def _take_gpu(rank: int) -> None:
    """Take a rank's GPU: ranks take the visible GPUs in turn, as trtllm-build's own workers do."""
    cuda = importlib.import_module("torch").cuda
    if cuda.device_count():
        cuda.set_device(rank % cuda.device_count())


if __name__ == "__main__":
    main(sys.argv[1:])
