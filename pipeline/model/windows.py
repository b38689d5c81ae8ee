"""The attention windows of a model's layers: how many tokens each layer sees, its own included.

TensorRT-LLM's classes set none; the executor takes those of config.json's `runtime_defaults`.

Fact: docs/format/runtime-1.2.md, section g.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import Problem
from pipeline.model.model_config import ModelConfig
from pipeline.model.runtime import runtime

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
            return bool((layer + 1) % settings["sliding_window_pattern"])
        case _:
            return True


def _repeats(windows: tuple[int, ...], period: int) -> bool:
    return all(window == windows[layer % period] for layer, window in enumerate(windows))


def check_windows(model: ModelConfig, file: str) -> list[Problem]:
    """Check the settings that windows are told from; `file`: the configuration's name in messages."""
    settings, problems = model.settings, []

    def wrong(key: str, expected: str) -> None:
        problems.append(Problem(f"{file}: {key}", repr(settings[key]), expected))

    for key, least in (("sliding_window", 0), ("max_window_layers", 0), ("sliding_window_pattern", 1)):
        value = settings.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            wrong(key, f"a whole number of {least} or more, or null")
    if not isinstance(settings.get("use_sliding_window", False), bool | None):
        wrong("use_sliding_window", "true or false")
    types, pattern = settings.get("layer_types"), settings.get("sliding_window_pattern")
    if types is None or problems:
        return problems
    layers = range(model.num_hidden_layers)
    if not isinstance(types, list) or len(types) != len(layers) or any(each not in LAYER_TYPES for each in types):
        problems.append(Problem(f"{file}: layer_types", "another list", f"{len(layers)} of {' and '.join(LAYER_TYPES)}"))
    elif pattern and [LAYER_TYPES[(layer + 1) % pattern == 0] for layer in layers] != types:
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
