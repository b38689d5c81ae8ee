"""The values of config.json in which headrace differs from NVIDIA's converter, on purpose: one table for all golden tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tests.support.places import DATA

ABSENT: Any = object()


@dataclass(frozen=True)
class Difference:
    """One key that differs in some cases.

    Parameters
    ----------
    cases
        A pattern of "folder/case", as in tests/data.
    key
        The key; `a.b` is the key `b` of the object `a`.
    theirs, ours
        NVIDIA's value and headrace's, ABSENT where there is no such key; or a function of NVIDIA's value, for ours.
    why
        The reason.
    after
        The key that a new one follows.
    """

    cases: str
    key: str
    theirs: Any
    ours: Any
    why: str
    after: str = ""


def whole_mapping(sizes: dict[str, int]) -> dict[str, int]:
    """The seven keys that every version of the loader accepts (docs/format/checkpoint.md, section 12)."""
    result = {"world_size": sizes["world_size"], "gpus_per_node": 8, "cp_size": 1, "tp_size": sizes["tp_size"]}
    return {**result, "pp_size": sizes["pp_size"], "moe_tp_size": sizes["tp_size"], "moe_ep_size": 1}


def windows(*sizes: int) -> dict[str, list[int]]:
    """config.json's `runtime_defaults` for layers that see a window (docs/format/runtime-1.2.md, section g)."""
    return {"max_attention_window": list(sizes)}


NO_WINDOWS = "no class of 1.2 sets a window: the executor is told in runtime_defaults, and NVIDIA's converter drops them"

DIFFERENCES = (
    Difference("dense/mistral_*", "runtime_defaults", None, windows(32), NO_WINDOWS),
    Difference("families/gemma2_*", "runtime_defaults", None, windows(128, 256), NO_WINDOWS),
    Difference("families/gemma3_*", "runtime_defaults", None, windows(64), NO_WINDOWS),
    Difference("families/phi3_longrope*", "runtime_defaults", None, windows(2047), NO_WINDOWS),
    Difference("dense/bias_gqa_tp4", "mlp_bias", False, True, "the class has the biases, the converter never reads the key"),
    Difference(
        "families/internlm2*", "mapping", ["world_size", "tp_size", "pp_size"], whole_mapping, "its script writes the sizes alone"
    ),
    Difference("families/phi*", "rotary_pct", ABSENT, 1.0, "1.2.1 asks for it, the reference's version did not", "rotary_scaling"),
    Difference(
        "families/qwen3_moe*", "moe.normalization_mode", 0, 1, "the source says norm_topk_prob, the reference does not look"
    ),
    Difference("quantized/*", "moe.topk_method", 0, ABSENT, "a key of that version's, which others refuse"),
    Difference("smoothquant/*", "moe.topk_method", 0, ABSENT, "a key of that version's, which others refuse"),
    Difference("quantized/*", "share_embedding_table", False, ABSENT, "the older name of an option"),
)


def cases(folder: str) -> list[str]:
    """The cases of a folder whose outputs are there, as "folder/case"."""
    return [f"{folder}/{path.name}" for path in sorted((DATA / folder / "expected").iterdir())]


def expected_config(case: str) -> dict[str, Any]:
    """NVIDIA's config.json of "folder/case" with the differences of DIFFERENCES, keys in the order that ours must have."""
    folder, _, name = case.partition("/")
    config: dict[str, Any] = json.loads((DATA / folder / "expected" / name / "config.json").read_text())
    for each in DIFFERENCES:
        if fnmatchcase(case, each.cases):
            _apply(config, each)
    return config


def as_1_2_reads(config: dict[str, Any], case: str) -> dict[str, Any]:
    """NVIDIA's config.json with what no class of 1.2 does without: the windows that its converter drops, Phi's rotary_pct, and no
    dynamic rope.

    Dynamic rope changes nothing up to the trained length.
    """
    told: dict[str, Any] = {"runtime_defaults": expected_config(case).get("runtime_defaults")} if "gemma3" in case else {}
    told |= {"rotary_pct": 1.0} if "/phi" in case else {}
    return {**config, **told, **({"rotary_scaling": None} if "internlm2" in case else {})}


def check_config(case: str, output: Path) -> None:
    """Hold an output's config.json against NVIDIA's: the same keys in the same order, in nested objects too, the same values."""
    ours = json.loads((output / "config.json").read_text(), parse_int=float)  # 1000000 and 1000000.0 are the same number
    theirs = json.loads(json.dumps(expected_config(case)), parse_int=float)
    assert json.dumps(ours, indent=1) == json.dumps(theirs, indent=1)


def _apply(config: dict[str, Any], each: Difference) -> None:
    *outer, key = each.key.split(".")
    for name in outer:
        config = config[name]
    found = config.get(key, ABSENT)
    theirs = list(found) if isinstance(found, dict) else found
    assert theirs == each.theirs, f"{each.key}: NVIDIA's value is another than the table says"
    if each.ours is ABSENT:
        del config[key]
        return
    function: Callable[[Any], Any] | None = each.ours if callable(each.ours) else None
    value = function(found) if function else each.ours
    if not each.after:
        config[key] = value
        return
    # A new key has a place: the dictionary is made again around it.
    items = list(config.items())
    place = [name for name, _ in items].index(each.after) + 1
    config.clear()
    config.update([*items[:place], (key, value), *items[place:]])
