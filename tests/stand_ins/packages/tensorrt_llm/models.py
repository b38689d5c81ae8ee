"""Reading a checkpoint: PretrainedConfig, the parameters that each class of model has, and the loader, which wants them exactly.

Facts: docs/format/checkpoint.md, sections 2, 5, 6 and 11; docs/format/quantized-layouts.md. Headers are read, not tensors.
"""

from __future__ import annotations

import copy
import json
import struct
from pathlib import Path
from typing import Any

from tensorrt_llm.logger import logger

MAPPING_KEYS = {
    "world_size",
    "gpus_per_node",
    "cp_size",
    "cp_config",
    "tp_size",
    "pp_size",
    "pp_partition",
    "moe_cluster_size",
    "moe_tp_size",
    "moe_ep_size",
    "attn_tp_size",
    "attn_cp_size",
    "enable_attention_dp",
    "enable_lm_head_tp_in_adp",
}
QUANTIZATION_KEYS = {
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
}
MOE_KEYS = {
    "num_experts",
    "shared_expert_intermediate_size",
    "top_k",
    "normalization_mode",
    "sparse_mixer_epsilon",
    "tp_mode",
    "device_limited_n_group",
    "device_limited_topk_group",
    "device_limited_routed_scaling_factor",
}
DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
BUFFERS = ("rotary_inv_freq", "embed_positions", "embed_positions_for_gpt_attention")
Parameters = dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape by name


class Strict:
    """A block of config.json: unknown keys are an error, as for the keyword arguments of the real class."""

    def __init__(self, kind: str, known: set[str], values: dict[str, Any], defaults: dict[str, Any]) -> None:
        for key in values:
            if key not in known:
                raise TypeError(f"{kind}.__init__() got an unexpected keyword argument '{key}'")
        self.__dict__ |= {**dict.fromkeys(known), **defaults, **values}
        self.values = values


class Mapping(Strict):
    rank = 0

    def __init__(self, values: dict[str, Any]) -> None:
        defaults = {"cp_size": 1, "tp_size": 1, "pp_size": 1, "moe_tp_size": -1, "moe_ep_size": -1}
        super().__init__("Mapping", MAPPING_KEYS, values, {"world_size": 1, **defaults})
        size = self.tp_size * self.pp_size * self.cp_size
        if size != self.world_size:
            raise ValueError(f"world_size must equal to tp_size * pp_size * cp_size, but got {self.world_size} != {size}")
        if self.moe_ep_size < 1:
            self.moe_ep_size = 1
        if self.moe_tp_size < 1:
            self.moe_tp_size = self.tp_size // self.moe_ep_size
        if self.moe_tp_size * self.moe_ep_size != self.tp_size:
            raise ValueError("tp_size must equal to moe_tp_size * moe_ep_size")

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def pp_rank(self) -> int:
        return self.rank // (self.tp_size * self.cp_size)

    @property
    def file(self) -> int:
        """The number of the file that an engine's rank reads: context-parallel ranks share one."""
        return self.tp_rank + self.pp_rank * self.tp_size

    def pp_layers(self, layers: int) -> list[int]:
        assert self.pp_size <= layers
        size, more = divmod(layers, self.pp_size)
        sizes = [size + (n < more) for n in range(self.pp_size)]
        return list(range(sum(sizes[: self.pp_rank]), sum(sizes[: self.pp_rank + 1])))


class PretrainedConfig:
    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        for key in ("architecture", "dtype", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act"):
            if key not in values:
                raise KeyError(key)
        self.architecture, self.dtype = values["architecture"], values["dtype"]
        self.mapping = Mapping(values.get("mapping", {}))
        self.quantization = Strict("QuantConfig", QUANTIZATION_KEYS, values.get("quantization", {}), {"group_size": 128})
        self.moe = Strict("MoeConfig", MOE_KEYS, values.get("moe") or {}, {"num_experts": 0})
        if (self.moe.num_experts == 0) != (not self.moe.top_k):
            raise ValueError("Both or neither MoeConfig's num_experts and top_k must be set to 0")
        if self.architecture not in MODEL_MAP:
            raise AssertionError(f"Unsupported model architecture: {self.architecture}")

    @classmethod
    def from_json_file(cls, path: str) -> PretrainedConfig:
        return cls(json.loads(Path(path).read_text()))

    def set_rank(self, rank: int) -> None:
        self.mapping = copy.copy(self.mapping)
        self.mapping.rank = rank

    def to_dict(self) -> dict[str, Any]:
        return self.values


class Llama:
    """LLaMAForCausalLM and QWenForCausalLM: the parameters of one rank, and whether a checkpoint has them."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config

    @classmethod
    def from_checkpoint(
        cls, ckpt_dir: str, rank: int | None = None, config: PretrainedConfig | None = None, *, preprocess_weights_hook: Any = None
    ) -> Llama:
        assert preprocess_weights_hook is None
        if config is None:
            config = PretrainedConfig.from_json_file(f"{ckpt_dir}/config.json")
        if rank is not None:
            config.set_rank(rank)
        path = Path(ckpt_dir, f"rank{config.mapping.file}.safetensors")
        assert path.is_file(), f"{path} does not exist"
        model = cls(config)
        model.load(read_header(path))
        return model

    def load(self, provided: Parameters) -> None:
        required = self.parameters()
        if missing := required.keys() - provided.keys():
            raise RuntimeError(f"Required but not provided tensors:{missing}")
        if extra := [name for name in provided.keys() - required.keys() if not name.endswith(BUFFERS)]:
            logger.warning(f"Provided but not required tensors: {extra}")
        for name, (dtype, shape) in required.items():
            if provided[name][1] != shape:
                text = f"The value updated is not the same shape as the original. Updated: {provided[name][1]}, original: {shape}"
                raise RuntimeError(f"Encounter error '{text}' for parameter '{name}'")
            if provided[name][0] != dtype:
                raise RuntimeError(f"Parameter {name} was initialized as {dtype} but set to {provided[name][0]}")

    def parameters(self) -> Parameters:
        values, mapping = self.config.values, self.config.mapping
        hidden, vocab, tp = values["hidden_size"], values["vocab_size"], mapping.tp_size
        dtype = DTYPES[self.config.dtype]
        result: Parameters = {}
        if mapping.pp_rank == 0:
            rows, columns = vocab, hidden
            if values.get("use_parallel_embedding"):
                rows, columns = (rows, hidden // tp) if values.get("embedding_sharding_dim") else (-(-vocab // tp), hidden)
            result["transformer.vocab_embedding.weight"] = (dtype, (rows, columns))
        for local, layer in enumerate(mapping.pp_layers(values["num_hidden_layers"])):
            result |= {f"transformer.layers.{local}.{name}": value for name, value in self.layer(layer).items()}
        if mapping.pp_rank == mapping.pp_size - 1:
            result["transformer.ln_f.weight"] = (dtype, (hidden,))
            result["lm_head.weight"] = (dtype, (-(-vocab // tp), hidden))
        return result

    def layer(self, number: int) -> Parameters:
        values, mapping, dtype = self.config.values, self.config.mapping, DTYPES[self.config.dtype]
        hidden, inner, tp = values["hidden_size"], values["intermediate_size"], mapping.tp_size
        heads = values["num_attention_heads"]
        head = values.get("head_size") or hidden // heads
        kv = values.get("num_key_value_heads") or heads
        assert heads % tp == 0
        assert kv % tp == 0 or tp % kv == 0
        q, rows = heads // tp * head, (heads // tp + 2 * max(kv // tp, 1)) * head
        qwen = self.config.architecture.startswith("Qwen")
        bias = self.config.architecture.startswith("Qwen2") or values.get("attn_bias", False)
        # Meta's recipe leaves attention, the first and the last layer alone.
        recipe = self.config.quantization.use_meta_recipe
        plain = recipe and number in (0, values["num_hidden_layers"] - 1)
        result: Parameters = {f"{norm}.weight": (dtype, (hidden,)) for norm in ("input_layernorm", "post_layernorm")}
        result |= self.linear("attention.qkv", rows, hidden, plain=recipe)
        result |= self.linear("attention.dense", hidden, q, plain=recipe)
        if bias:
            result["attention.qkv.bias"] = (dtype, (rows,))
        if bias and not qwen:
            result["attention.dense.bias"] = (dtype, (hidden,))
        if values.get("qwen_type") in ("qwen3", "qwen3_moe"):
            result |= {f"attention.{norm}_layernorm.weight": (dtype, (head,)) for norm in "qk"}
        result |= self.clamps(recipe, plain)
        if self.config.quantization.kv_cache_quant_algo:
            result["attention.kv_cache_scaling_factor"] = ("F32", (1,))
        if self.config.moe.num_experts:
            return result | self.experts()
        result |= self.linear("mlp.fc", inner // tp, hidden, plain=plain)
        result |= self.linear("mlp.gate", inner // tp, hidden, plain=plain)
        result |= self.linear("mlp.proj", hidden, inner // tp, plain=plain)
        if values.get("mlp_bias"):
            biases = {"fc": inner // tp, "gate": inner // tp, "proj": hidden}
            result |= {f"mlp.{name}.bias": (dtype, (size,)) for name, size in biases.items()}
        return result

    def experts(self) -> Parameters:
        values, mapping, moe = self.config.values, self.config.mapping, self.config.moe
        hidden = values["hidden_size"]
        inner = values.get("moe_intermediate_size") or values["intermediate_size"]
        count, part = moe.num_experts // mapping.moe_ep_size, inner // mapping.moe_tp_size
        result: Parameters = {"mlp.router.weight": ("F32", (moe.num_experts, hidden))}
        result |= self.linear("mlp.fc", 2 * part, hidden, stack=(count,))
        result |= self.linear("mlp.proj", hidden, part, stack=(count,))
        if shared := moe.shared_expert_intermediate_size:
            result |= self.linear("mlp.shared_expert.fc", 2 * shared // mapping.tp_size, hidden)
            result |= self.linear("mlp.shared_expert.proj", hidden, shared // mapping.tp_size)
            result["mlp.shared_expert_gate.weight"] = (DTYPES[self.config.dtype], (1, hidden))
        return result

    def clamps(self, recipe: bool, plain: bool) -> Parameters:
        """FP8 by row clamps what goes into its matrices."""
        if self.config.quantization.quant_algo != "FP8_PER_CHANNEL_PER_TOKEN" or plain:
            return {}
        places = ["mlp", "post_layernorm", *([] if recipe else ["attention", "input_layernorm"])]
        return {f"{place}.clamp_val": ("F32", (2,)) for place in places}

    def linear(self, name: str, rows: int, columns: int, plain: bool = False, stack: tuple[int, ...] = ()) -> Parameters:
        """The parameters of a matrix [rows, columns], or of a stack of them, in the checkpoint's algorithm."""
        dtype, settings = DTYPES[self.config.dtype], self.config.quantization
        algorithm = None if plain else settings.quant_algo
        if algorithm is None:
            return {f"{name}.weight": (dtype, (*stack, rows, columns))}
        assert rows % 64 == 0, name
        assert columns % 64 == 0, name
        if algorithm in ("W8A16", "W4A16"):
            width = rows if algorithm == "W8A16" else rows // 2
            return {
                f"{name}.weight": ("I8", (*stack, columns, width)),
                f"{name}.per_channel_scale": (dtype, (*stack, rows)),
            }
        if algorithm in ("W4A16_GPTQ", "W8A16_GPTQ"):
            assert columns % settings.group_size == 0, name
            groups = (*stack, columns // settings.group_size, rows)
            result = {f"{name}.weight": (dtype, (*stack, columns, rows // (4 if algorithm.startswith("W4") else 2)))}
            result[f"{name}.weights_scaling_factor"] = (dtype, groups)
            return result | ({f"{name}.zero": (dtype, groups)} if settings.has_zero_point else {})
        if algorithm == "FP8" and not stack:
            scales = {f"{name}.{kind}_scaling_factor": ("F32", (1,)) for kind in ("weights", "activation")}
            return {f"{name}.weight": ("F8_E4M3", (rows, columns)), **scales}
        if algorithm == "FP8_PER_CHANNEL_PER_TOKEN" and not stack:
            return {f"{name}.weight": ("F8_E4M3", (rows, columns)), f"{name}.per_channel_scale": ("F32", (rows,))}
        raise NotImplementedError(f"{algorithm} of {name} is not in this stand-in")


MODEL_MAP = dict.fromkeys(
    (
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "MixtralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
    ),
    Llama,
)


def read_header(path: Path) -> Parameters:
    """The tensors of a safetensors file, whose bytes must all be there."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if path.stat().st_size != 8 + length + end:
        raise RuntimeError("Error while deserializing header: incomplete metadata, file not fully covered")
    return {name: (tensor["dtype"], tuple(tensor["shape"])) for name, tensor in header.items()}
