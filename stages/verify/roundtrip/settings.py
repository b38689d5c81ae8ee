"""Compare what config.json says of the model with the source's own configuration: all that values do not show, and windows.

The source's is read as transformers reads it, by no code that plans. Facts: docs/format/runtime-1.2.md, section g.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.errors import Problem
from pipeline.model.computes import layer_windows
from stages.verify.roundtrip.model_settings import check_model
from stages.verify.roundtrip.rope_settings import AGAIN, check_rope

# Models whose layers alternate between a window and the whole sequence, with the length of the pattern where no key says it.
PATTERNS = {"Gemma2ForCausalLM": 2, "Gemma3ForCausalLM": 6}
# Models that have a window where their configuration has no such key.
BY_DEFAULT = {*PATTERNS, "MistralForCausalLM"}
# Models whose configuration has a window that is in use only where another key says so.
ON_REQUEST = (
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen2VLForConditionalGeneration",
    "Qwen2ForSequenceClassification",
)
# Models whose layers all see the window alone; a source's own name counts too, as Mistral's own files become LLaMA's.
EVERY_LAYER = ("MistralForCausalLM", "MixtralForCausalLM", "Phi3ForCausalLM", "PhiMoEForCausalLM")
DEFAULT_WINDOW = 4096  # transformers' own, of all these families


def check_settings(config: Mapping[str, Any], source: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[Problem]:
    """Report settings, rope and windows of config.json that are not the source's.

    `source`: the configuration of the source as transformers reads it. `options`: those of the conversion, as far as headrace.json
    knows them; with `rope_scaling` "none" the scaling was left out on request.
    """
    yield from check_model(config, source, options)
    yield from check_rope(config, source, without=options.get("rope_scaling") == "none")
    yield from _windows(config, source)


def _windows(config: Mapping[str, Any], source: Mapping[str, Any]) -> Iterator[Problem]:
    layers, longest = int(config["num_hidden_layers"]), config.get("max_position_embeddings") or 0
    local = _local_layers(source, str(config.get("architecture")), layers)
    window = source.get("sliding_window", DEFAULT_WINDOW)
    used = any(local) and isinstance(window, int) and 0 < window < longest
    meant = tuple(window if each else longest for each in local) if used else None
    found = layer_windows(config, layers)
    if found == meant:
        return
    if used and found is not None:
        differing = next(layer for layer in range(layers) if found[layer] != (window if local[layer] else longest))
        expected = f"{window if local[differing] else longest} in layer {differing}, by the source"
        yield Problem("config.json: runtime_defaults.max_attention_window", str(found[differing]), expected, AGAIN)
    elif used:
        expected = f"the source's sliding window of {window} tokens, which no class sets by itself"
        yield Problem("config.json: runtime_defaults.max_attention_window", "none", expected, AGAIN)
    else:
        found_sizes = sorted(set(found or ()))
        yield Problem(
            "config.json: runtime_defaults.max_attention_window", str(found_sizes), "none, as the source has no window", AGAIN
        )


def _local_layers(source: Mapping[str, Any], architecture: str, layers: int) -> Sequence[bool]:
    """Which layers see the window alone."""
    # No other model has any, such as LLaMA, whatever is left over in its configuration.
    windowed = {architecture, *(source.get("architectures") or ())} & {*EVERY_LAYER, *PATTERNS}
    by_default = architecture in BY_DEFAULT and "sliding_window" not in source
    if architecture in ON_REQUEST:
        if not source.get("use_sliding_window"):
            return [False] * layers
        if (types := source.get("layer_types")) is None:
            first = source.get("max_window_layers", 80 if architecture == "Qwen2VLForConditionalGeneration" else 28)
            if first is None:  # transformers makes no model of it
                return [False] * layers
            if architecture == "Qwen2MoeForCausalLM":
                return [layer % 2 == 0 and layer < first for layer in range(layers)]
            return [layer >= first or architecture == "Qwen3MoeForCausalLM" for layer in range(layers)]
    elif not windowed or (source.get("sliding_window") is None and not by_default):
        return [False] * layers
    else:
        types = source.get("layer_types")
    if types:
        return [each == "sliding_attention" for each in types]
    if architecture in PATTERNS:
        pattern = source.get("sliding_window_pattern") or source.get("_sliding_window_pattern") or PATTERNS[architecture]
        return [(layer + 1) % pattern != 0 for layer in range(layers)]
    return [True] * layers
