"""The names of a source's weights as Hugging Face has them, whichever container they come from.

Facts: docs/format/checkpoint.md, sections 3 and 10; docs/format/families.md, sections 8 and 9. GGUF's names are in gguf.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from pipeline.errors import BadInput, Problem
from stages.verify.roundtrip.original.family_names import ERNIE, EXAONE, INTERNLM2, META, QWEN, YI, FamilyNames
from stages.verify.roundtrip.original.gguf import gguf_names
from stages.verify.roundtrip.original.numbers import Numbers, SomeRows, StoredNumbers, Ungrouped, UnitRows, Unpermuted
from stages.verify.roundtrip.original.small_floats import TileNumbers

# Rotary buffers, which whoever runs the model computes; a source's own are ignored.
_GGUF_TABLES = r"rope_(freqs|factors_(short|long))\.weight|blk\.\d+\.attn_rot_embd(\.weight)?"
_TABLES = rf"(.+\.)?(rotary_emb|rotary|rope)\.((original_)?inv_freq|freqs|(cos|sin)_cached)|{_GGUF_TABLES}"
COMPUTED = re.compile(rf"{_TABLES}|.+\.(self_attn|attn|attention)\.(masked_)?bias")  # tables of positions, and masks
# Models whose experts are called w1 (the activated projection), w3 and w2; others say gate_proj, up_proj and down_proj.
NUMBERED = ("MixtralForCausalLM", "ArcticForCausalLM", "PhiMoEForCausalLM", "PhimoeForCausalLM")
STACK = re.compile(r"(.+)\.mlp\.experts\.(gate_up_proj|down_proj)(\.weight)?")
ROUTER = re.compile(r"(.+)\.mlp\.(gate|router)\.weight")


# q, k and v one behind the other, in one tensor.
THREE = re.compile(r"(?:transformer\.h|model\.layers)\.(\d+)\.(?:attn\.c_attn|self_attn\.W_pack)\.(weight|bias)")
# Tensors of heads for further tokens, and of encoders of other inputs, which no rank has.
OTHERS = {"MiMoForCausalLM": ("model.mtp_layers.",), "QWenLMHeadModel": ("transformer.visual.", "transformer.audio.")}
GRANITE_EXPERTS = re.compile(
    r"(.+)\.block_sparse_moe\.(?:experts\.)?(input_linear|gate_up_proj|output_linear|down_proj)(?:\.weight)?"
)
GRANITE_ROUTER = re.compile(r"(.+)\.block_sparse_moe\.router(?:\.layer)?\.weight")


def canonical(
    container: str, architecture: str, config: Mapping[str, Any], numbers: Mapping[str, Numbers]
) -> tuple[dict[str, Numbers], dict[str, str]]:
    """Give a source's weights Hugging Face's names, for the model that `config` (from `canonical_config`) describes.

    Tensors whose name no table has keep theirs. Returns the weights, and the name in the source of each. Raises BadInput where two
    tensors become one weight.
    """
    heads = int(config.get("num_attention_heads") or 1)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    size = int(config.get("head_dim") or int(config.get("hidden_size") or 0) // heads)
    kept = {name: tensor_numbers for name, tensor_numbers in numbers.items() if not COMPUTED.fullmatch(name)}
    kept = {name: each for name, each in kept.items() if not name.startswith(OTHERS.get(architecture, ()))}
    result: dict[str, Numbers] = {}
    origins: dict[str, str] = {}
    for origin, tensor_numbers in kept.items():
        if container == "meta":
            renamed = _renamed(origin, tensor_numbers, META, size)
        elif container == "gguf":
            renamed = gguf_names(origin, tensor_numbers, architecture, size)
        elif architecture == "InternLM2ForCausalLM":
            renamed = _wqkv(origin, tensor_numbers, kv_heads, size) or _renamed(origin, tensor_numbers, INTERNLM2, size)
        elif architecture == "ExaoneForCausalLM":
            renamed = _renamed(origin, tensor_numbers, EXAONE, size)
        elif architecture == "QWenLMHeadModel":
            renamed = _three(origin, tensor_numbers) or _renamed(origin, tensor_numbers, QWEN, size)
        elif architecture in ("BaichuanForCausalLM", "BaiChuanForCausalLM"):
            unit = architecture == "BaichuanForCausalLM" and origin == "lm_head.weight"
            renamed = _three(origin, tensor_numbers) or {origin: UnitRows(tensor_numbers) if unit else tensor_numbers}
        elif architecture == "YiForCausalLM":
            renamed = _renamed(origin, tensor_numbers, YI, size)
        elif architecture in ("Ernie4_5ForCausalLM", "HeliumForCausalLM"):
            renamed = _renamed(origin, tensor_numbers, ERNIE, size)
        elif architecture == "GraniteMoeForCausalLM":
            renamed = _granite_experts(origin, tensor_numbers)
        else:
            renamed = _experts(origin, tensor_numbers, architecture in NUMBERED)
        twice = [name for name in renamed if name in result]
        if twice:
            raise BadInput([Problem(origin, f"{twice[0]}, which {origins[twice[0]]} is too", "one tensor for a weight")])
        result |= renamed
        origins |= dict.fromkeys(renamed, origin)
    return result, origins


def _renamed(name: str, numbers: Numbers, names: FamilyNames, head_size: int) -> dict[str, Numbers]:
    layer = names.layer.match(name)
    module, _, parameter = name[layer.end() if layer else 0 :].rpartition(".")
    canonical_module = names.modules.get(module)
    # A layer's module outside a layer, or the other way round, is no module of the table.
    if canonical_module is None or bool(layer) == canonical_module.startswith(("model.", "lm_head")):
        return {name: numbers}
    prefix = f"model.layers.{layer[1]}." if layer else ""
    return {f"{prefix}{canonical_module}.{parameter}": Unpermuted(numbers, head_size) if module in names.turned else numbers}


def _wqkv(name: str, numbers: Numbers, groups: int, head_size: int) -> dict[str, Numbers]:
    match = re.fullmatch(r"model\.layers\.(\d+)\.attention\.wqkv\.(weight|bias)", name)
    if not match:
        return {}
    prefix = f"model.layers.{match[1]}.self_attn."
    return {f"{prefix}{part}_proj.{match[2]}": Ungrouped(numbers, part, groups, head_size) for part in "qkv"}


def _experts(name: str, numbers: Numbers, numbered: bool) -> dict[str, Numbers]:
    """Hugging Face's own names, and those of the single experts for transformers 5's stacks.

    The stacks are [experts, 2 * intermediate, hidden] of gate and up, and [experts, hidden, intermediate] of down.
    """
    stack = STACK.fullmatch(name)
    if stack and isinstance(numbers, StoredNumbers | TileNumbers) and len(numbers.shape) == 3:
        rows = numbers.shape[1]
        block = "block_sparse_moe" if numbered else "mlp"
        prefix = f"{stack[1]}.{block}.experts"
        parts = [("down", 0, rows)] if stack[2] == "down_proj" else [("gate", 0, rows // 2), ("up", rows // 2, rows // 2)]
        return _split(prefix, numbers, parts, _numbered if numbered else lambda part: f"{part}_proj")
    router = ROUTER.fullmatch(name) if numbered else None
    return {f"{router[1]}.block_sparse_moe.gate.weight" if router else name: numbers}


def _three(name: str, numbers: Numbers) -> dict[str, Numbers]:
    """q, k and v of a tensor that has a third of its rows each; nothing for any other tensor."""
    match = THREE.fullmatch(name)
    if not match:
        return {}
    rows = numbers.shape[0] // 3
    names = (f"model.layers.{match[1]}.self_attn.{part}_proj.{match[2]}" for part in "qkv")
    return {each: SomeRows(numbers, n * rows, rows) for n, each in enumerate(names)}


def _granite_experts(name: str, numbers: Numbers) -> dict[str, Numbers]:
    """Single experts under Mixtral's names, of Granite's stacks: [experts, 2 * intermediate, hidden], and back."""
    if router := GRANITE_ROUTER.fullmatch(name):
        return {f"{router[1]}.block_sparse_moe.gate.weight": numbers}
    stack = GRANITE_EXPERTS.fullmatch(name)
    if not stack or not isinstance(numbers, StoredNumbers | TileNumbers):
        return {name: numbers}
    rows = numbers.shape[1]
    down = stack[2] in ("output_linear", "down_proj")
    parts = [("down", 0, rows)] if down else [("gate", 0, rows // 2), ("up", rows // 2, rows // 2)]
    return _split(f"{stack[1]}.block_sparse_moe.experts", numbers, parts, _numbered)


def _split(
    prefix: str, stack: StoredNumbers | TileNumbers, parts: list[tuple[str, int, int]], called: Callable[[str], str]
) -> dict[str, Numbers]:
    """Split the stack [experts, rows, columns] into `parts`, each (projection, first row, rows), of every expert."""
    return {
        f"{prefix}.{expert}.{called(part)}.weight": stack.part(expert, first, count)
        for expert in range(stack.shape[0])
        for part, first, count in parts
    }


def _numbered(part: str) -> str:
    return {"gate": "w1", "down": "w2", "up": "w3"}[part]
