"""Packed modules that are fused, mixed with others, biased, or outside the layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import BadInput, convert, plan
from tests.support import checkpoints
from tests.support import quantized_checkpoints as source
from tests.support.directories import contents
from tests.support.quantized_checkpoints import LLAMA, Arrays, Format
from tests.support.rank_files import read
from tests.support.rank_matrices import BLOCK, BY_ALGORITHM, FORMATS, by_row, cut, matrix, of, quantization, signal_to_noise

PHI = {**LLAMA, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}


INTERNLM = {**LLAMA, "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": False}


INTERNLM_NAMES = {
    "model.embed_tokens.": "model.tok_embeddings.",
    "lm_head.": "output.",
    ".self_attn.o_proj.": ".attention.wo.",
    ".mlp.gate_proj.": ".feed_forward.w1.",
    ".mlp.up_proj.": ".feed_forward.w3.",
    ".mlp.down_proj.": ".feed_forward.w2.",
    ".input_layernorm.": ".attention_norm.",
    ".post_attention_layernorm.": ".ffn_norm.",
}


OUT = {"qweight": 1, "qzeros": 1, "scales": 1}  # where packed parameters have the out-features, when it is not the first axis


def fused(stored: Arrays, layers: int, names: dict[str, tuple[str, ...]], groups: int = 1) -> Arrays:
    """Parts `names[fused]` as one tensor each, their rows one after the other, in `groups` repetitions; the rest as it is."""
    result = dict(stored)
    for layer in range(layers):
        for whole, parts in names.items():
            prefix = f"model.layers.{layer}."
            parameters = [name.rpartition(".")[2] for name in stored if name.startswith(f"{prefix}{parts[0]}.")]
            for parameter in parameters:
                values = [result.pop(f"{prefix}{part}.{parameter}") for part in parts]
                if parameter in ("g_idx", "weight_shape"):
                    rows = sum(int(value[0]) for value in values)
                    result[f"{prefix}{whole}.{parameter}"] = values[0] if parameter == "g_idx" else np.array([rows, values[0][1]])
                    continue
                axis = OUT.get(parameter, 0)
                shares = [np.split(value, groups, axis=axis) for value in values]
                joined = np.concatenate([share[n] for n in range(groups) for share in shares], axis=axis)
                result[f"{prefix}{whole}.{parameter}"] = joined
    return result


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


FUSED_PHI = {"self_attn.qkv_proj": QKV, "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}


FUSED = {
    "gptq": source.gptq(sym=False),
    "gptq without g_idx": source.gptq(sym=False, index="none"),
    "gptq 8 bits": source.gptq(bits=8, index="none"),
    "gptq zero biases": source.gptq(bias=True, index="none"),
    "awq": source.awq(),
    "compressed w4a16": source.compressed(sym=False),
    "compressed fp8 dynamic": source.compressed_float8(dynamic=True),
    "modelopt awq": source.modelopt_awq(),
    "mxfp4": source.mxfp4(),
}


@pytest.mark.parametrize("more", [{"tp_size": 1}, {"tp_size": 2}, {"tp_size": 2, "dequantize": True}], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_phi3_is_llama_with_fused_tensors(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    kind = FUSED[name]
    stored, _ = source.quantized(source.values(LLAMA), kind, 2)
    checkpoints.save(tmp_path / "llama", source.described(LLAMA, kind), stored)
    checkpoints.save(tmp_path / "phi", source.described(PHI, kind), fused(stored, 2, FUSED_PHI))
    for model in ("llama", "phi"):
        convert(model_dir=tmp_path / model, output_dir=tmp_path / f"out-{model}", scheduler="threads", **more)
    assert quantization(tmp_path / "out-phi") == quantization(tmp_path / "out-llama")
    for rank in range(more["tp_size"]):
        ours, theirs = (read(tmp_path / f"out-{model}/rank{rank}.safetensors") for model in ("phi", "llama"))
        # The factor comes above the activated half: one tensor of both, whose codes are as many bytes after one another.
        for name_ in [name for name in theirs if ".mlp.gate." in name]:
            up, gate = theirs.pop(name_), theirs.pop(name_.replace(".gate.", ".fc."))
            key = name_.replace(".gate.", ".fc.")
            if key.endswith(".weight"):
                assert ours.pop(key).tobytes() == up.tobytes() + gate.tobytes()
            elif key.endswith("prequant_scaling_factor"):
                assert ours.pop(key).tobytes() == up.tobytes() == gate.tobytes()
            else:
                axis = 0 if name == "modelopt awq" else -1
                np.testing.assert_array_equal(ours.pop(key), np.concatenate([up, gate], axis=axis))
        assert ours.keys() == theirs.keys()
        assert all(ours[key].tobytes() == theirs[key].tobytes() for key in theirs)


@pytest.mark.parametrize("more", [{"tp_size": 1}, {"tp_size": 4}, {"tp_size": 2, "dequantize": True}], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_internlm2_is_llama_with_rows_by_kv_head(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    kind = FUSED[name]
    stored, _ = source.quantized(source.values(LLAMA), kind, 2)
    checkpoints.save(tmp_path / "llama", source.described(LLAMA, kind), stored)
    renamed = fused(stored, 2, {"attention.wqkv": QKV}, groups=LLAMA["num_key_value_heads"])
    for theirs, ours in INTERNLM_NAMES.items():
        renamed = {key.replace(theirs, ours): values for key, values in renamed.items()}
    checkpoints.save(tmp_path / "intern", source.described(INTERNLM, kind), renamed)
    for model in ("llama", "intern"):
        convert(model_dir=tmp_path / model, output_dir=tmp_path / f"out-{model}", scheduler="threads", **more)
    for path in (tmp_path / "out-llama").glob("*.safetensors"):
        assert (tmp_path / "out-intern" / path.name).read_bytes() == path.read_bytes()
    ours = json.loads((tmp_path / "out-intern/config.json").read_text())["quantization"]
    theirs = quantization(tmp_path / "out-llama")
    assert ours == {key: value for key, value in theirs.items() if key == "quant_algo" or value != BLOCK[key]}


def test_groups_by_act_order_of_a_fused_tensor_are_dequantized(tmp_path: Path) -> None:
    kind = source.gptq(index="order", sym=False)
    stored, stands_for = source.quantized(source.values(LLAMA), kind, 2)
    # Fused, q, k and v are quantized in one order.
    for layer in range(2):
        for parts in FUSED_PHI.values():
            names = [f"model.layers.{layer}.{part}" for part in parts]
            together = source.values(LLAMA)
            weights = np.concatenate([together[f"{name}.weight"] for name in names]).astype(np.float32)
            packed = kind.quantizer(names[0], weights)
            sizes = np.cumsum([len(together[f"{name}.weight"]) for name in names])[:-1]
            for name, part in zip(names, np.split(packed.weight, sizes), strict=True):
                stands_for[f"{name}.weight"] = part
            whole = f"model.layers.{layer}.{next(key for key, value in FUSED_PHI.items() if value == parts)}"
            stored = {key: values for key, values in stored.items() if key.rpartition(".")[0] not in names}
            stored |= {f"{whole}.{key}": np.ascontiguousarray(values) for key, values in packed.parameters.items()}
    checkpoints.save(tmp_path / "phi", source.described(PHI, kind), stored)
    plain = fused(stands_for, 2, FUSED_PHI)
    source.write_float(tmp_path / "float", PHI, plain)
    convert(model_dir=tmp_path / "phi", output_dir=tmp_path / "ours", scheduler="threads", tp_size=2, dequantize=True)
    convert(model_dir=tmp_path / "float", output_dir=tmp_path / "theirs", scheduler="threads", tp_size=2)
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")


@pytest.mark.parametrize("name", ["nvfp4", "compressed nvfp4", "fp8 block", "bitsandbytes nf4"])
@pytest.mark.parametrize("more", [{"tp_size": 1}, {"tp_size": 2, "dequantize": True}], ids=str)
def test_small_floats_of_fused_tensors(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    kind, plain = FORMATS[name], fused(source.values(LLAMA), 2, FUSED_PHI)
    stored, stands_for = source.quantized(plain, kind, 2)
    checkpoints.save(tmp_path / "model", source.described(PHI, kind), stored)
    for file, content in kind.files.items():
        (tmp_path / "model" / file).write_text(json.dumps(content))
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "ours", scheduler="threads", **more)
    source.write_float(tmp_path / "float", PHI, stands_for)
    size = more["tp_size"]
    convert(model_dir=tmp_path / "float", output_dir=tmp_path / "theirs", scheduler="threads", dtype="float32", tp_size=size)
    algorithm = quantization(tmp_path / "ours")["quant_algo"]
    assert algorithm == (None if more.get("dequantize") else kind.algorithm or None)
    for rank in range(more["tp_size"]):
        ours, theirs = (read(tmp_path / side / f"rank{rank}.safetensors") for side in ("ours", "theirs"))
        for module in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj"):
            wanted = theirs[f"transformer.layers.1.{module}.weight"]
            found = matrix(ours, f"transformer.layers.1.{module}")
            np.testing.assert_array_equal(found, wanted if algorithm else wanted.astype(np.float16))


def test_scales_of_scales_of_a_fused_tensor_are_refused(tmp_path: Path) -> None:
    kind = FORMATS["bitsandbytes nf4 nested"]
    stored, _ = source.quantized(fused(source.values(LLAMA), 2, FUSED_PHI), kind, 2)
    checkpoints.save(tmp_path / "model", source.described(PHI, kind), stored)
    with pytest.raises(BadInput) as error:
        plan(model_dir=tmp_path / "model", output_dir=tmp_path / "out")
    assert {problem.subject.rpartition(".")[2] for problem in error.value.problems} == {"nested_absmax"}


def test_parts_that_share_a_tile_are_refused(tmp_path: Path) -> None:
    """A kv head of 64 rows is half a tile of 128: no scale is its own."""
    plain = fused(source.values(LLAMA), 2, {"attention.wqkv": QKV}, groups=LLAMA["num_key_value_heads"])
    for theirs, ours in INTERNLM_NAMES.items():
        plain = {key.replace(theirs, ours): values for key, values in plain.items()}
    stored: Arrays = {}
    for name, values in plain.items():
        packed = FORMATS["fp8 block"].quantizer(name, values.astype(np.float32)).parameters if "wqkv" in name else {}
        stored |= {f"{name.removesuffix('.weight')}.{key}": value for key, value in packed.items()} or {name: values}
    checkpoints.save(tmp_path / "model", source.described(INTERNLM, FORMATS["fp8 block"]), stored)
    with pytest.raises(BadInput) as error:
        plan(model_dir=tmp_path / "model", output_dir=tmp_path / "out")
    assert {problem.subject.rpartition(".")[2] for problem in error.value.problems} == {"weight_scale_inv"}
    assert "bounds of its 3 parts" in error.value.problems[0].expected


@pytest.mark.parametrize("size", [96, 160, 224])
def test_parts_that_share_a_tile_whose_scales_come_out_even_are_refused(size: int, tmp_path: Path) -> None:
    """Of 2 * 96 rows there are two scales, rounded up: the second half's first 32 rows are of the first tile."""
    config = {**LLAMA, "intermediate_size": size}
    plain = fused(source.values(config), 2, FUSED_PHI)
    stored: Arrays = {}
    for name, values in plain.items():
        packed = FORMATS["fp8 block"].quantizer(name, values.astype(np.float32)).parameters if "gate_up" in name else {}
        stored |= {f"{name.removesuffix('.weight')}.{key}": value for key, value in packed.items()} or {name: values}
    checkpoints.save(tmp_path / "model", source.described({**PHI, "intermediate_size": size}, FORMATS["fp8 block"]), stored)
    with pytest.raises(BadInput) as error:
        plan(model_dir=tmp_path / "model", output_dir=tmp_path / "out")
    assert {problem.subject.rpartition("layers.")[2][2:] for problem in error.value.problems} == {
        "mlp.gate_up_proj.weight_scale_inv"
    }
    assert "bounds of its 2 parts" in error.value.problems[0].expected


def test_float8_of_fused_tensors_with_one_scale(tmp_path: Path) -> None:
    kind = source.modelopt_float8(cache=False)
    plain = fused(source.values(LLAMA), 2, FUSED_PHI)
    stored: Arrays = {}
    for name, values in plain.items():
        module = name.removesuffix(".weight")
        packed = "proj" in module and kind.quantizer(module, values.astype(np.float32)).parameters
        stored |= {f"{module}.{key}": value for key, value in packed.items()} if packed else {name: values}
    checkpoints.save(tmp_path / "model", PHI, stored)
    for name, content in kind.files.items():
        (tmp_path / "model" / name).write_text(json.dumps(content))
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler="threads", tp_size=2)
    assert quantization(tmp_path / "out")["quant_algo"] == "FP8"
    for rank in range(2):
        ours = read(tmp_path / f"out/rank{rank}.safetensors")
        for layer in range(2):
            theirs, layer_ = f"model.layers.{layer}.", f"transformer.layers.{layer}."
            qkv, both = (stored[f"{theirs}{whole}.weight"].view(np.uint8) for whole in FUSED_PHI)
            q, k, v = (np.split(part, 2)[rank] for part in np.split(qkv, [256, 384]))
            gate, up = (np.split(part, 2)[rank] for part in np.split(both, 2))
            wanted = {"attention.qkv": [q, k, v], "mlp.fc": [up, gate]}
            for (module, parts), whole in zip(wanted.items(), FUSED_PHI, strict=True):
                np.testing.assert_array_equal(ours[f"{layer_}{module}.weight"].view(np.uint8), np.concatenate(parts))
                assert ours[f"{layer_}{module}.weights_scaling_factor"] == [stored[f"{theirs}{whole}.weight_scale"]]
                assert ours[f"{layer_}{module}.activation_scaling_factor"] == [stored[f"{theirs}{whole}.input_scale"]]


def mixed(directory: Path, kind: Format, module: str, other: Format | None) -> Arrays:
    """A checkpoint one module of which is not quantized, or in another format; returns what it stands for."""
    tensors = source.values(LLAMA)
    stored, stands_for = source.quantized(tensors, kind, 2)
    stored = {name: values for name, values in stored.items() if not name.startswith(f"{module}.")}
    packed = other.quantizer(module, tensors[f"{module}.weight"].astype(np.float32)) if other else None
    own = packed.parameters if packed else {"weight": tensors[f"{module}.weight"]}
    stored |= {f"{module}.{key}": np.ascontiguousarray(values) for key, values in own.items()}
    stands_for[f"{module}.weight"] = packed.weight if packed else tensors[f"{module}.weight"]
    checkpoints.save(directory, source.described(LLAMA, kind), stored)
    return stands_for


@pytest.mark.parametrize("module", ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"])
@pytest.mark.parametrize(
    ("name", "other", "algorithm"),
    [
        ("awq", source.gptq(), "W4A16_GPTQ"),
        ("gptq", source.awq(), "W4A16_GPTQ"),
        ("compressed fp8 dynamic", source.modelopt_float8(cache=False), "FP8_PER_CHANNEL_PER_TOKEN"),
    ],
    ids=["gptq among awq", "awq among gptq", "one scale among rows"],
)
def test_formats_of_one_algorithm_go_together(name: str, other: Format, algorithm: str, module: str, tmp_path: Path) -> None:
    weights = mixed(tmp_path / "model", FORMATS[name], module, other)
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler="threads", tp_size=2)
    assert quantization(tmp_path / "out")["quant_algo"] == algorithm
    for rank in range(2):
        ours = read(tmp_path / f"out/rank{rank}.safetensors")
        for target, wanted in cut(weights, LLAMA, rank, 2).items():
            assert np.allclose(matrix(ours, target), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "flags", [{"dequantize": True}, {"requantize": True}, {"dequantize": True, "use_fp8_rowwise": True}], ids=str
)
def test_a_module_that_is_not_quantized_joins_the_others(flags: dict[str, Any], tmp_path: Path) -> None:
    weights = mixed(tmp_path / "model", FORMATS["gptq asymmetric"], "model.layers.0.self_attn.k_proj", None)
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler="threads", tp_size=2, **flags)
    for rank in range(2):
        ours = read(tmp_path / f"out/rank{rank}.safetensors")
        for target, wanted in cut(weights, LLAMA, rank, 2).items():
            assert signal_to_noise(matrix(ours, target), wanted.astype(np.float32)) > 17


def test_numbers_that_no_recipe_keeps_are_spoken_of(tmp_path: Path) -> None:
    mixed(tmp_path / "model", FORMATS["compressed fp8 dynamic"], "model.layers.1.mlp.down_proj", None)
    options = {"model_dir": tmp_path / "model", "scheduler": "threads"}
    convert(output_dir=tmp_path / "out", **options)
    (note,) = json.loads((tmp_path / "out/headrace.json").read_text())["notes"]
    assert "1 matrices (0 of attention, 1 of the MLP), the first transformer.layers.1.mlp.proj" in note
    assert "--use_meta_fp8_rowwise_recipe keeps them" in note, "layer 1 is the last"
    config = {**LLAMA, "num_hidden_layers": 3}
    stored, _ = source.quantized(source.values(config), FORMATS["compressed fp8 dynamic"], 3)
    stored = {name: values for name, values in stored.items() if not name.startswith("model.layers.1.mlp.down_proj.")}
    stored["model.layers.1.mlp.down_proj.weight"] = source.values(config)["model.layers.1.mlp.down_proj.weight"]
    checkpoints.save(tmp_path / "deep", source.described(config, FORMATS["compressed fp8 dynamic"]), stored)
    convert(model_dir=tmp_path / "deep", output_dir=tmp_path / "other", scheduler="threads")
    (note,) = json.loads((tmp_path / "other/headrace.json").read_text())["notes"]
    assert "no option keeps them" in note


@pytest.mark.parametrize("module", ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"])
def test_one_scale_is_one_of_each_row_among_others_that_have_these(module: str, tmp_path: Path) -> None:
    weights = mixed(tmp_path / "model", FORMATS["compressed fp8"], module, source.compressed_float8(dynamic=True))
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler="threads", tp_size=2)
    assert quantization(tmp_path / "out")["quant_algo"] == "FP8_PER_CHANNEL_PER_TOKEN"
    for rank in range(2):
        ours = read(tmp_path / f"out/rank{rank}.safetensors")
        for target, wanted in cut(weights, LLAMA, rank, 2).items():
            np.testing.assert_array_equal(matrix(ours, target), wanted)


def test_without_metas_recipe_all_of_its_checkpoint_is_float8(tmp_path: Path) -> None:
    config, kind = of("fbgemm"), FORMATS["fbgemm"]
    weights = source.write(tmp_path / "model", config, kind)
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler="threads", tp_size=2)
    assert quantization(tmp_path / "out") == {**BLOCK, "quant_algo": kind.algorithm, **BY_ALGORITHM[kind.algorithm]}
    # Attention of three layers (q, k, v and o), and the MLP of the first and the last.
    (note,) = json.loads((tmp_path / "out/headrace.json").read_text())["notes"]
    assert "18 matrices (12 of attention, 6 of the MLP)" in note
    assert "modules_to_not_convert" in note
    assert note.endswith("--use_meta_fp8_rowwise_recipe keeps them in 16 bits")
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "kept", scheduler="threads", **kind.flags)
    assert json.loads((tmp_path / "kept/headrace.json").read_text())["notes"] == []
    for rank in range(2):
        ours = read(tmp_path / f"out/rank{rank}.safetensors")
        for layer in range(3):
            assert all(f"transformer.layers.{layer}.{norm}.clamp_val" in ours for norm in ("input_layernorm", "post_layernorm"))
        for target, wanted in cut(weights, config, rank, 2).items():
            if wanted.dtype == np.float32:
                np.testing.assert_array_equal(matrix(ours, target), wanted)
                continue
            codes, scales = by_row(wanted)
            np.testing.assert_array_equal(ours[f"{target}.weight"].astype(np.float32), codes)
            np.testing.assert_array_equal(ours[f"{target}.per_channel_scale"], scales)


def test_qwen2_keeps_its_biases_and_drops_those_of_zeros(tmp_path: Path) -> None:
    config = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    kind = source.gptq(bias=True, sym=False)
    weights = source.write(tmp_path / "model", config, kind)
    stored, _ = source.quantized(source.values(LLAMA), source.gptq(bias=True, sym=False), 2)
    random = np.random.default_rng(8)
    biases = {name: random.standard_normal(len(values)).astype(np.float16) for name, values in stored.items() if
              name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))}  # fmt: skip
    checkpoints.save(tmp_path / "model", source.described(config, kind), {**stored, **biases})
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler="threads", tp_size=4)
    for rank in range(4):
        ours = read(tmp_path / f"out/rank{rank}.safetensors")
        assert {name.removeprefix("transformer.layers.0.") for name in ours if name.endswith("bias") and ".0." in name} == {
            "attention.qkv.bias"
        }
        for layer in range(2):
            q, k, v = (biases[f"model.layers.{layer}.self_attn.{part}_proj.bias"] for part in "qkv")
            wanted = np.concatenate([np.split(q, 4)[rank], np.split(k, 2)[rank // 2], np.split(v, 2)[rank // 2]])
            np.testing.assert_array_equal(ours[f"transformer.layers.{layer}.attention.qkv.bias"], wanted)
        for module, wanted in cut(weights, config, rank, 4).items():
            assert signal_to_noise(matrix(ours, module), wanted.astype(np.float32)) > 50
    left = json.loads((tmp_path / "out/headrace.json").read_text())["left_out"]
    assert sum(name.endswith(".bias") for name in left) == 2 * 4


def test_biases_of_zeros_change_nothing(tmp_path: Path) -> None:
    for name in ("with", "without"):
        source.write(tmp_path / name, LLAMA, source.gptq(bias=name == "with"))
        convert(model_dir=tmp_path / name, output_dir=tmp_path / f"out-{name}", scheduler="threads", tp_size=2)
    assert contents(tmp_path / "out-with") == contents(tmp_path / "out-without")
