"""Hold a config.json against what TensorRT-LLM's classes compute: where an engine would be another model, or could not be built.

A plan asks this of the config.json that it is about to write, and a verification of the one that it finds: both judge by one table
(`pipeline.model.runtime`). Facts: docs/format/runtime-1.2.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from pipeline.model.rotary import scaling_kind, two_kinds, yarn_factor
from pipeline.model.runtime import AttentionVariant, ModelClass, runtime

# Features of the runtime table; the first two are told from config.json's values.
LONG_ROPE, EXPERTS, LOCAL_ROPE, HEAD_NORMS = "long rope", "experts", "local rope", "q and k norms"
SCALED_SCORES, CAPPED_SCORES, NORMS_AROUND = "scaled scores", "capped scores", "norms around the MLP"

WITHOUT_OR_KEPT = (
    "Give --rope_scaling none where the model may be run without it (the plan says up to which length that is exact), "
    "or keep for a release that computes it"
)

OWN_AXES = "Give the model's own rope_scaling, with its mrope_section"

OTHER_GROUPS = (
    "Give --requantize --group_size 128, which dequantizes and quantizes again by round-to-nearest, so that it adds error, or "
    "--dequantize"
)


@dataclass(frozen=True)
class Conflict:
    """A key of config.json whose value TensorRT-LLM's class would compute otherwise than the model does.

    `key`: with the tables around it, such as "mapping.pp_size". `section`: the fact's, in docs/format/runtime-1.2.md.
    """

    key: str
    found: str
    expected: str
    remedy: str
    section: str


def model_class(config: Mapping[str, Any]) -> ModelClass | None:
    """Return TensorRT-LLM's class of a model by its config.json; None where the table has none."""
    architecture = config.get("architecture")
    return runtime().classes.get(architecture) if isinstance(architecture, str) else None


def features(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what a model computes beyond a plain decoder, by its config.json: features of the runtime table."""
    found = list(runtime().features.get(str(config.get("architecture")), ()))
    found += [LONG_ROPE] if config.get("position_embedding_type") == "long_rope" else []
    found += [EXPERTS] if _table(config, "moe").get("num_experts") else []
    return tuple(found)


def conflicts(config: Mapping[str, Any]) -> tuple[Conflict, ...]:
    """Return everything in config.json that TensorRT-LLM's class computes otherwise, or cannot build.

    Values of a wrong type are left to others. Nothing is returned for an architecture that the table does not have.
    """
    own = model_class(config)
    if own is None:
        return ()
    of_class = (*_stages(config, own), *_head_size(config, own), *_rope(config, own))
    return (*of_class, *_attention(config), *_experts(config), *_groups(config), *_windows(config))


def replaced_attention(config: Mapping[str, Any]) -> AttentionVariant | None:
    """Return the attention that the algorithm puts in the place of the class's own; None where the class's own computes."""
    quantization = _table(config, "quantization")
    variant = runtime().attention.get(str(quantization.get("quant_algo")))
    if variant is None or not _missing(("transformer.layers.{layer}.attention",), config, _patterns(quantization, variant)):
        return None
    return variant


def layer_windows(config: Mapping[str, Any], layers: int) -> tuple[int, ...] | None:
    """Return the attention window of each layer, in tokens, as the executor repeats config.json's list; None where it has none."""
    windows = _table(config, "runtime_defaults").get(runtime().windows)
    if not isinstance(windows, Sequence) or isinstance(windows, str) or not windows:
        return None
    if not all(isinstance(window, int) and window > 0 for window in windows):
        return None
    return tuple(windows[layer % len(windows)] for layer in range(layers))


def _stages(config: Mapping[str, Any], own: ModelClass) -> Iterator[Conflict]:
    stages = _table(config, "mapping").get("pp_size", 1)
    if isinstance(stages, int) and stages > 1 and not own.pipeline_stages:
        found = f"{stages} pipeline stages of {config['architecture']}"
        expected = "1: its class sends nothing from stage to stage, and has embedding and lm_head on every rank"
        yield Conflict("mapping.pp_size", found, expected, "Give --tp_size instead", "a")


def _head_size(config: Mapping[str, Any], own: ModelClass) -> Iterator[Conflict]:
    sizes = [size for key in ("head_size", "num_attention_heads", "hidden_size") if isinstance(size := config.get(key), int)]
    if not own.derived_head_size or len(sizes) < 3:
        return
    size, heads, hidden = sizes
    if size * heads != hidden:
        expected = f"hidden_size / num_attention_heads, {hidden} / {heads}: {config['architecture']}'s class has no others"
        yield Conflict("head_size", f"heads of {size}", expected, "No other class computes this architecture", "f")


def _rope(config: Mapping[str, Any], own: ModelClass) -> Iterator[Conflict]:
    architecture = config["architecture"]
    if config.get("position_embedding_type") == "long_rope" and not own.long_rope:
        yield Conflict("position_embedding_type", "long_rope", f"rope_gpt_neox: {architecture} reads no factors", "", "b3")
    scaling = config.get("rotary_scaling")
    alone = {row.position_embedding_type: name for name, row in runtime().rope.items() if row.position_embedding_type}
    goes_with = alone.get(str(config.get("position_embedding_type")), "")
    if scaling is None:
        if goes_with:
            yield Conflict("rotary_scaling", "null", f"{goes_with}, as position_embedding_type says", OWN_AXES, "m")
        return
    kind = scaling_kind(scaling) if isinstance(scaling, Mapping) and scaling else "default"
    if isinstance(scaling, Mapping) and (both := two_kinds(scaling)):
        yield Conflict("rotary_scaling", both, "one kind: TensorRT-LLM goes by type, the model by rope_type", "Leave one", "b4")
        return
    shown = repr(kind) if isinstance(scaling, Mapping) and scaling else repr(scaling)
    if kind == "default":
        yield Conflict("rotary_scaling", shown, "null: TensorRT-LLM has no such kind", "Give --rope_scaling auto", "b4")
        return
    row = runtime().rope.get(str(kind))
    if row is None or kind not in own.rope or architecture in own.unscaled:
        kinds = () if architecture in own.unscaled else own.rope
        expected = f"{'one of ' + ', '.join(kinds) + ', or ' if kinds else ''}null: {architecture}'s class computes no other"
        yield Conflict("rotary_scaling", shown, expected, WITHOUT_OR_KEPT, "b3" if kind in ("longrope", "su") else "b4")
        return
    if (goes_with or row.position_embedding_type) and goes_with != kind:
        expected = f"{goes_with or 'another scaling'}, as position_embedding_type is {config.get('position_embedding_type')}"
        yield Conflict("rotary_scaling", shown, expected, OWN_AXES if goes_with else WITHOUT_OR_KEPT, "m")
        return
    for key in row.needs:
        if scaling.get(key) is None:
            expected = f"a value: {row.because or 'it says by how much'}"
            yield Conflict(f"rotary_scaling.{key}", f"{kind} without it", expected, row.remedy, row.section)
    for key, value in row.only.items():
        if scaling.get(key, value) != value:
            expected = f"{str(value).lower()}: TensorRT-LLM computes no other"
            yield Conflict(f"rotary_scaling.{key}", str(scaling[key]).lower(), expected, WITHOUT_OR_KEPT, row.section)
    if kind == "yarn":
        yield from _yarn(scaling, row.section)


def _yarn(scaling: Mapping[str, Any], section: str) -> Iterator[Conflict]:
    """A factor of rotated values other than the one that TensorRT-LLM computes of factor, mscale and mscale_all_dim."""
    numbers = [scaling.get(key) for key in ("factor", "mscale", "mscale_all_dim", "attention_factor")]
    if not all(number is None or isinstance(number, int | float) for number in numbers) or numbers[0] is None:
        return
    factor, ours, every, declared = numbers
    assert factor is not None
    try:
        computed = yarn_factor(factor, 1.0 if ours is None else ours) / yarn_factor(factor, every or 0.0)
        # Without a factor of its own a model has the formula's, in which transformers uses both scales or neither.
        formula = yarn_factor(factor, ours) / yarn_factor(factor, every) if ours and every else yarn_factor(factor, 1.0)
        meant = float(formula if declared is None else declared)
    except (ZeroDivisionError, OverflowError):
        computed, meant = math.nan, math.nan
    if not math.isclose(meant, computed, rel_tol=1e-6):
        key = "mscale" if declared is None else "attention_factor"
        expected = f"{computed:g} times what is turned, as TensorRT-LLM has it, not {meant:g}"
        yield Conflict(f"rotary_scaling.{key}", str(scaling.get(key)), expected, WITHOUT_OR_KEPT, section)


def _attention(config: Mapping[str, Any]) -> Iterator[Conflict]:
    """Features that the attention of the algorithm lacks, and that the list of excluded modules does not bring back."""
    quantization = _table(config, "quantization")
    variant = runtime().attention.get(str(quantization.get("quant_algo")))
    if variant is None:
        return
    lacking = [feature for feature in features(config) if feature in variant.lacks]
    refused = [feature for feature in lacking if feature in variant.refused]
    algorithm = quantization["quant_algo"]
    if refused:
        found = f"{algorithm} of {config['architecture']}, which has {_listed(refused)}"
        expected = f"an algorithm that keeps the class's own attention and norms: {variant.name} computes none of these"
        yield Conflict("quantization.quant_algo", found, expected, variant.remedy, variant.section)
    elif lacking:
        needed = [*variant.plain.get("", ()), *(name for feature in lacking for name in variant.plain.get(feature, ()))]
        missing = _missing(needed, config, _patterns(quantization, variant))
        if missing:
            found = f"{config['architecture']}, which has {_listed(lacking)}, without {', '.join(missing)} among them"
            expected = f"{list(variant.exclude)}: {variant.name} computes no {' and no '.join(lacking)}"
            yield Conflict("quantization.exclude_modules", found, expected, variant.remedy, variant.section)


def _experts(config: Mapping[str, Any]) -> Iterator[Conflict]:
    algorithm = str(_table(config, "quantization").get("quant_algo"))
    count = _table(config, "moe").get("num_experts")
    if count and algorithm in runtime().no_experts:
        found, why = f"{count} experts a layer, as {algorithm}", runtime().no_experts[algorithm]
        expected = f"a model without experts, as TensorRT-LLM {runtime().release} cannot load theirs: {why}"
        yield Conflict("quantization.quant_algo", found, expected, runtime().experts_remedy, "c")


def _groups(config: Mapping[str, Any]) -> Iterator[Conflict]:
    """Groups of a size that the kernels do not have."""
    quantization = _table(config, "quantization")
    algorithm, size = quantization.get("quant_algo"), quantization.get("group_size")
    sizes = runtime().group_sizes
    if algorithm in runtime().grouped and isinstance(size, int) and size not in sizes:
        expected = f"groups of {' or '.join(map(str, sizes))}: TensorRT-LLM's kernels have no others"
        yield Conflict("quantization.group_size", f"groups of {size} in-features in {algorithm}", expected, OTHER_GROUPS, "i")


def _windows(config: Mapping[str, Any]) -> Iterator[Conflict]:
    """Local layers that config.json speaks of must have their windows in `runtime_defaults`: no class sets one."""
    keys = ("sliding_window", "_sliding_window_pattern", "num_hidden_layers", "max_position_embeddings")
    sizes = [config[key] for key in keys if isinstance(config.get(key), int) and config[key] > 0]
    if LOCAL_ROPE not in features(config) or len(sizes) < len(keys):
        return
    window, pattern, layers, longest = sizes
    meant = tuple(window if (layer + 1) % pattern else longest for layer in range(layers))
    found = layer_windows(config, layers)
    if window < longest and found != meant:
        key = f"runtime_defaults.{runtime().windows}"
        expected = f"{window} tokens for local layers and {longest} for every {pattern}., as no class sets a window"
        yield Conflict(key, "none" if found is None else str(sorted(set(found))), expected, "Convert it again", "g")


def _patterns(quantization: Mapping[str, Any], variant: AttentionVariant) -> tuple[str, ...]:
    """The patterns of modules that keep the class's own form."""
    listed = quantization.get("exclude_modules")
    patterns = tuple(each for each in listed if isinstance(each, str)) if isinstance(listed, list) and variant.exclude else ()
    return (*patterns, *(variant.recipe if quantization.get("use_meta_recipe") else ()))


def _missing(modules: Sequence[str], config: Mapping[str, Any], patterns: Sequence[str]) -> list[str]:
    """Those of some modules, with `{layer}` for each of a stage's layers, that no pattern excludes in every layer."""
    layers, stages = config.get("num_hidden_layers", 1), _table(config, "mapping").get("pp_size", 1)
    numbers = range(-(-layers // max(stages, 1))) if isinstance(layers, int) and isinstance(stages, int) else range(1)

    def excluded(module: str) -> bool:
        return any(fnmatchcase(module, pattern) for pattern in patterns)

    return [module for module in modules if not all(excluded(module.replace("{layer}", str(number))) for number in numbers)]


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names)


def _table(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    return value if isinstance(value, Mapping) else {}
