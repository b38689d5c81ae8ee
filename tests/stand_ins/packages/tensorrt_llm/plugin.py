"""tensorrt_llm.plugin: the plugin options of trtllm-build, and PluginConfig, which takes nothing else."""

from __future__ import annotations

import argparse
from typing import Any

DTYPES = ["auto", "float16", "float32", "bfloat16", "int32", "disable", "disable"]  # 1.2's help has one twice
PLUGINS = {
    "bert_attention_plugin": DTYPES,
    "gpt_attention_plugin": DTYPES,
    "gemm_plugin": ["auto", "float16", "float32", "bfloat16", "int32", "fp8", "nvfp4", "disable", "disable"],
    "gemm_swiglu_plugin": ["fp8", "disable", "disable"],
    "fp8_rowwise_gemm_plugin": DTYPES,
    "lora_plugin": DTYPES,
    "moe_plugin": DTYPES,
    "mamba_conv1d_plugin": DTYPES,
    "nccl_plugin": DTYPES,
    "low_latency_gemm_plugin": ["fp8", "disable", "disable"],
    "low_latency_gemm_swiglu_plugin": ["fp8", "disable", "disable"],
    "gemm_allreduce_plugin": ["float16", "bfloat16", "disable", "disable"],
}
ON = ("bert_attention_plugin", "gpt_attention_plugin", "moe_plugin", "mamba_conv1d_plugin", "nccl_plugin")
SWITCHES = {
    "dora_plugin": False,
    "context_fmha": True,
    "bert_context_fmha_fp32_acc": False,
    "remove_input_padding": True,
    "use_paged_context_fmha": True,
    "use_fp8_context_fmha": True,
    "fuse_fp4_quant": False,
    "multiple_profiles": False,
    "paged_state": True,
    "streamingllm": False,
    "norm_quant_fusion": False,
    "reduce_fusion": False,
    "user_buffer": False,
    "use_fused_mlp": True,
    "pp_reduce_scatter": False,
}


class PluginConfig:
    """Made of a parsed command line alone, as the real one is; `validate` must be called before a build."""

    def __init__(self, **values: Any) -> None:
        names = (*PLUGINS, *SWITCHES, "tokens_per_block")
        self.values = {name: values[name] for name in names}
        self.manage_weights = False
        self.validated = False
        self.lora_plugin = None if values["lora_plugin"] == "disable" else values["lora_plugin"]
        self.streamingllm = values["streamingllm"] == "enable"
        self.pp_reduce_scatter = values["pp_reduce_scatter"] == "enable"

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> PluginConfig:
        return cls(**vars(args))

    def validate(self) -> None:
        self.validated = True


def add_plugin_argument(parser: Any) -> Any:
    for name, choices in PLUGINS.items():
        default = "auto" if name in ON else None if name == "gemm_plugin" else "disable"
        parser.add_argument(f"--{name}", type=str, default=default, choices=choices, help=f"The {name.replace('_', ' ')}.")
    for name, on in SWITCHES.items():
        text = f"Note: {name} must be used with `--reduce_fusion enable` at times."
        parser.add_argument(f"--{name}", type=str, default="enable" if on else "disable", choices=["enable", "disable"], help=text)
    parser.add_argument("--tokens_per_block", type=int, default=32, help="Tokens in each block of the paged KV cache.")
    return parser
