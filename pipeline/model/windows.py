"""The attention windows of a model's layers: how many tokens each layer sees, its own included.

TensorRT-LLM's classes set none; the executor takes those of config.json's `runtime_defaults`.

Fact: docs/format/runtime-1.2.md, section g.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline.errors import Problem
from pipeline.model.config_values import lookup
from pipeline.model.model_config import ModelConfig
from pipeline.model.runtime import runtime
from pipeline.model.tables import Family

PATTERN = "sliding_window_pattern"
# The setting that each rule of `window_layers` goes by.
RULES = {
    "from_max_window_layers": "max_window_layers",
    "every_other_below_max_window_layers": "max_window_layers",
    "pattern": PATTERN,
}
LAYER_TYPES = ("sliding_attention", "full_attention")  # the words of a configuration's `layer_types`


def attention_windows(model: ModelConfig) -> tuple[int, ...]:
    """Return the windows of a model's layers in tokens, as the shortest list that repeats; () where every layer sees all tokens.

    A layer that sees all tokens has the model's longest sequence. A window as long as that is none.
    """
    settings, longest = model.settings, model.max_position_embeddings
    window = settings.get("sliding_window")
    # A family without such a setting has its windows in use; null is no, as in transformers.
    if not window or window >= longest or not settings.get("use_sliding_window", True):
        return ()
    types = settings.get("layer_types")
    local = [
        types[layer] == "sliding_attention" if types else _sees_window(layer, settings) for layer in range(model.num_hidden_layers)
    ]
    if not any(local):
        return ()
    windows = tuple(int(window) if each else longest for each in local)
    return next(windows[:period] for period in range(1, len(windows) + 1) if _repeats(windows, period))


def runtime_defaults(model: ModelConfig) -> dict[str, Any] | None:
    """Return config.json's `runtime_defaults`; None where the model has no windows."""
    windows = attention_windows(model)
    return {runtime().windows: list(windows)} if windows else None


def _sees_window(layer: int, settings: Mapping[str, Any]) -> bool:
    """Whether a layer sees the window alone, by its number and the rule that the family's `window_layers` names."""
    match settings.get("window_layers"):
        case "from_max_window_layers":
            return bool(layer >= settings["max_window_layers"])
        case "every_other_below_max_window_layers":
            return bool(layer % 2 == 0 and layer < settings["max_window_layers"])
        case "pattern":
            return bool((layer + 1) % settings[PATTERN])
        case _:
            return True


def _repeats(windows: tuple[int, ...], period: int) -> bool:
    return all(window == windows[layer % period] for layer, window in enumerate(windows))


def with_pattern(model: ModelConfig, config: Mapping[str, Any], family: Family) -> ModelConfig:
    """Return a model whose pattern is that of its `layer_types`, where the configuration has a value for these alone.

    transformers goes by the types. Types of no pattern change nothing: they are refused.
    """
    keys, types = family.settings.get(PATTERN, ()), model.settings.get("layer_types")
    said = not keys or any(lookup(config, key) is not None for key in keys)
    if said or not isinstance(types, list) or types == _types(model.settings[PATTERN], len(types)):
        return model
    pattern = types.index(LAYER_TYPES[1]) + 1 if LAYER_TYPES[1] in types else len(types) + 1
    if types != _types(pattern, len(types)):
        return model
    return replace(model, settings={**model.settings, PATTERN: pattern})


def _types(pattern: int | None, layers: int) -> list[str]:
    """The `layer_types` of a pattern: all but each `pattern`-th layer see the window alone; none without a pattern."""
    return [LAYER_TYPES[layer % pattern == 0] for layer in range(1, layers + 1)] if pattern else []


def check_windows(model: ModelConfig, file: str) -> list[Problem]:
    """Check the settings that windows are told from; `file`: the configuration's name in messages."""
    settings, problems = model.settings, []

    def wrong(key: str, expected: str) -> None:
        problems.append(Problem(f"{file}: {key}", repr(settings[key]), expected))

    for key, least in (("sliding_window", 0), ("max_window_layers", 0), (PATTERN, 1)):
        value = settings.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            wrong(key, f"a whole number of {least} or more, or null")
    if not isinstance(settings.get("use_sliding_window", False), bool | None):
        wrong("use_sliding_window", "true or false")
    types, pattern, layers = settings.get("layer_types"), settings.get(PATTERN), model.num_hidden_layers
    rule = RULES.get(settings.get("window_layers", ""))
    used = settings.get("use_sliding_window", True) and settings.get("sliding_window")
    # A pattern is written into config.json, whether there are windows or not.
    if rule and settings.get(rule) is None and (rule == PATTERN or (used and types is None)):
        wrong(rule, "a whole number: it says which layers see the window alone")
    if types is None or problems:
        return problems
    if not isinstance(types, list) or len(types) != layers or any(each not in LAYER_TYPES for each in types):
        problems.append(Problem(f"{file}: layer_types", "another list", f"{layers} of {' and '.join(LAYER_TYPES)}"))
    elif pattern and _types(pattern, layers) != types:
        # TensorRT-LLM is told the pattern only.
        expected = f"every {pattern}. layer full, as sliding_window_pattern says"
        problems.append(Problem(f"{file}: layer_types", "another order of layers", expected))
    return problems


def window_notes(model: ModelConfig) -> tuple[str, ...]:
    """Say what is written of windows, as NVIDIA's converter drops them; () for a model without."""
    windows = attention_windows(model)
    if not windows:
        return ()
    size, count = min(windows), len(windows)
    which = "every layer" if count == 1 else f"{windows.count(size)} of each {count} layers"
    return (f"sliding window: {which} sees {size} tokens, by runtime_defaults in config.json; who runs the engine may set another",)
