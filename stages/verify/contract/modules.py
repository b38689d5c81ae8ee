"""The modules of a model on a rank, by its class, and the tensors that the loader asks for in each.

Facts: docs/format/checkpoint.md, section 2; docs/format/families.md; docs/format/quantized-layouts.md, section 7 for what FP8 by
row adds. All tensor-parallel ranks of a stage hold tensors of the same names and shapes.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.errors import Problem
from stages.verify.contract.expected import ExpectedTensor, TensorForm, single_form
from stages.verify.contract.quantized import FP8_ROWWISE, TILE, Linear, activation_scales, linear_tensors
from stages.verify.contract.settings import ContractSettings

GATED = ("swiglu", "geglu")  # activations for which experts have both halves of their first matrix


def linears(settings: ContractSettings) -> Iterator[Linear]:
    """The matrices of a layer that can be quantized, as a rank holds them."""
    hidden, tp, kind = settings.hidden_size, settings.parallel.tp, settings.model_class
    queries = settings.heads // tp * settings.head_size
    # Where there are fewer kv heads than ranks, each rank has one head, which it shares with others.
    keys = max(settings.kv_heads // tp, 1) * settings.head_size
    yield Linear("attention.qkv", queries + 2 * keys, hidden, "out", settings.attention_bias)
    yield Linear("attention.dense", hidden, queries, "in", settings.attention_bias and kind != "qwen")
    if settings.residual_mlp:
        yield Linear("residual_mlp.fc", hidden // tp, hidden, "out")
        yield Linear("residual_mlp.gate", hidden // tp, hidden, "out")
        yield Linear("residual_mlp.proj", hidden, hidden // tp, "in")
    if settings.experts:
        yield from _experts(settings)
        return
    size, bias = settings.intermediate_size // tp, settings.mlp_bias
    if kind == "phi":
        yield Linear("mlp.fc", 2 * size if settings.hidden_act == "swiglu" else size, hidden, "out")
    else:
        yield Linear("mlp.fc", size, hidden, "out", bias)
        yield Linear("mlp.gate", size, hidden, "out", bias)
    yield Linear("mlp.proj", hidden, size, "in", bias)


def _experts(settings: ContractSettings) -> Iterator[Linear]:
    hidden, parallel, bias = settings.hidden_size, settings.parallel, settings.mlp_bias
    size, count = settings.expert_size // parallel.moe_tp, settings.experts // parallel.moe_ep
    yield Linear("mlp.fc", 2 * size if settings.hidden_act in GATED else size, hidden, "out", bias, count)
    yield Linear("mlp.proj", hidden, size, "in", bias, count)
    if settings.shared_size:
        # Split over all of tp_size, also where the others are split by expert.
        shared = settings.shared_size // parallel.tp
        yield Linear("mlp.shared_expert.fc", 2 * shared if settings.hidden_act == "swiglu" else shared, hidden, "out")
        yield Linear("mlp.shared_expert.proj", hidden, shared, "in")


def stage_tensors(settings: ContractSettings, number: int) -> dict[str, ExpectedTensor]:
    """Every tensor that a rank of pipeline stage `number` holds, by name."""
    last = settings.parallel.pp - 1
    result = dict(_buffers(settings))
    if number == 0:
        result["transformer.vocab_embedding.weight"] = _embedding(settings)
    for local, layer in enumerate(settings.parallel.stages()[number]):
        result |= dict(_layer(settings, f"transformer.layers.{local}.", layer))
    if number == last:
        result |= dict(_norm(settings, "transformer.ln_f"))
        rows = settings.head_rows
        result["lm_head.weight"] = single_form((rows, settings.hidden_size), settings.dtype)
        if settings.layer_norms:
            result["lm_head.bias"] = single_form((rows,), settings.dtype)
    return result


def _embedding(settings: ContractSettings) -> ExpectedTensor:
    rows, columns, tp = settings.vocab_size, settings.hidden_size, settings.parallel.tp
    if settings.embedding == "vocabulary":
        rows = -(-rows // tp)
    elif settings.embedding == "hidden":
        columns //= tp
    return single_form((rows, columns), settings.dtype)


def _layer(settings: ContractSettings, prefix: str, number: int) -> Iterator[tuple[str, ExpectedTensor]]:
    """A layer's tensors, with `prefix` before their names. `number`: the layer's, counted over all stages."""
    quantization, dtype = settings.quantization, settings.dtype
    # Meta's recipe quantizes the MLPs alone, and not those of the first and last layers.
    recipe = quantization.meta_recipe and quantization.algorithm == FP8_ROWWISE
    outer = recipe and number in (0, settings.num_layers - 1)
    norms = ["input_layernorm", "post_layernorm"]
    norms += ["residual_layernorm"] if settings.residual_mlp else []
    norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if settings.inter_norms else []
    for name in norms:
        yield from _norm(settings, prefix + name)
    if settings.qk_norms:
        for name in ("q_layernorm", "k_layernorm"):
            yield f"{prefix}attention.{name}.weight", single_form((settings.head_size,), dtype)
    for linear in linears(settings):
        yield from linear_tensors(linear, prefix, quantization, dtype, outer or (recipe and linear.name.startswith("attention.")))
    yield from activation_scales(prefix, quantization)
    if settings.experts:
        yield f"{prefix}mlp.router.weight", single_form((settings.experts, settings.hidden_size), "float32")
    if settings.shared_size:
        yield f"{prefix}mlp.shared_expert_gate.weight", single_form((1, settings.hidden_size), dtype)
    if quantization.cache:
        yield f"{prefix}attention.kv_cache_scaling_factor", single_form((1,), "float32")
        yield f"{prefix}attention.kv_cache_rcp_scaling_factor", single_form((1,), "float32", required=False)
    if quantization.algorithm == FP8_ROWWISE and quantization.clamp and not outer:
        clamped = ["mlp", "post_layernorm", *([] if recipe else ["attention", "input_layernorm"])]
        for name in (name for name in clamped if not quantization.excluded(prefix + name)):
            yield f"{prefix}{name}.clamp_val", single_form((2,), "float32")


def _norm(settings: ContractSettings, name: str) -> Iterator[tuple[str, ExpectedTensor]]:
    for parameter in ("weight", "bias") if settings.layer_norms else ("weight",):
        yield f"{name}.{parameter}", single_form((settings.hidden_size,), settings.dtype)


def _buffers(settings: ContractSettings) -> Iterator[tuple[str, ExpectedTensor]]:
    """The rotary buffers, which every rank may have and none needs: the loader computes them.

    Facts: docs/format/checkpoint.md, section 4.
    """
    size, positions = settings.rotary_size, settings.positions
    names = [("", "")]
    names += [("", "_local")] if settings.architecture == "Gemma3ForCausalLM" else []
    names += [("long_rope_", "")] if settings.model_class == "phi" else []
    for prefix, suffix in names:
        frequencies = (TensorForm((size // 2,), "float32"), TensorForm((1, size // 2), "float32"))
        yield f"{prefix}rotary_inv_freq{suffix}", ExpectedTensor(frequencies, required=False)
        yield f"{prefix}embed_positions{suffix}", single_form((1, positions, size), "float32", required=False)
        whole = single_form((1, positions * size), "float32", required=False)
        yield f"{prefix}embed_positions_for_gpt_attention{suffix}", whole


def unaligned_matrices(settings: ContractSettings) -> Iterator[Problem]:
    """Report matrices that the loader would pad, so that it would ask for other shapes
    (docs/format/quantized-layouts.md, section 8).

    Both axes of the whole matrix, even the one that is not split, must be a multiple of the kernels' unit times tp_size. Experts
    are not padded: their matrix on the rank must consist of whole tiles and groups.
    """
    quantization, tp = settings.quantization, settings.parallel.tp
    if quantization.unit == 1:
        return
    remedy = "Choose another tp_size, or another quantization"
    for linear in linears(settings):
        if quantization.excluded(f"transformer.layers.0.{linear.name}"):
            continue
        units = (quantization.unit * tp, quantization.unit * tp)
        shape = (linear.out * (tp if linear.split == "out" else 1), linear.inside * (tp if linear.split == "in" else 1))
        if linear.experts:
            shape, units = (linear.out, linear.inside), (TILE, quantization.unit)
        if shape[0] % units[0] or shape[1] % units[1]:
            found = f"{linear.name} of {shape[0]} x {shape[1]} at tp_size {tp}, by {quantization.algorithm}"
            expected = f"multiples of {units[0]} and {units[1]}, as TensorRT-LLM pads other matrices"
            yield Problem("config.json: quantization", found, expected, remedy)
