"""Packed weights are, as numbers, what their writers say that they stand for, whichever rows are asked for."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import BadInput
from stages.read import open_source
from stages.verify.roundtrip.original import Original, packed
from stages.verify.roundtrip.original import grouped as grouped_formats
from stages.verify.roundtrip.original.codes import LastBlock
from stages.verify.roundtrip.original.grouped import of_module
from stages.verify.roundtrip.original.numbers import Numbers
from stages.verify.values import to_float32
from tests.stages.verify.roundtrip.test_original import Counted
from tests.support import checkpoints, quantized_checkpoints
from tests.support.lazy import Held, held
from tests.support.places import DATA
from tests.support.quantized_checkpoints import LLAMA, MIXTRAL, formats, gptq, grouped, numbers, packed32

FORMATS = {
    **formats(),
    "gptq in the activations' order": gptq(index="order"),
    "gptq 8 bits v2 zeros in v1": gptq(bits=8, second=True, said=False),
}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
RANDOM = np.random.default_rng(3)


def check(directory: Path, expected: Mapping[str, np.ndarray]) -> Original:
    original = Original(open_source(directory))
    assert sorted(original.names()) == sorted(expected)
    for name, array in expected.items():
        values = original.rows(name, 0, len(array))
        assert original.shape(name) == array.shape == tuple(values.shape), name
        assert original.dtype(name) == values.dtype, name
        assert np.array_equal(to_float32(values), array.astype(np.float32)), name
        assert original.exact(name) == (array.dtype != np.float32), name  # the model's own type is float16
    assert not all(original.exact(name) for name in expected)
    return original


@pytest.mark.parametrize("name", FORMATS)
def test_quantized_weights_are_what_they_stand_for(name: str, tmp_path: Path) -> None:
    config = {**LLAMA, "num_hidden_layers": 3}  # fbgemm leaves the first and the last alone
    original = check(tmp_path, quantized_checkpoints.write(tmp_path, config, FORMATS[name], shards=2))
    assert "quantization_config" not in original.config
    assert original.config["hidden_size"] == LLAMA["hidden_size"]


@pytest.mark.parametrize("name", ["gptq", "awq", "compressed w4a16", "compressed fp8 dynamic"])
def test_quantized_experts(name: str, tmp_path: Path) -> None:
    check(tmp_path, quantized_checkpoints.write(tmp_path, MIXTRAL, FORMATS[name]))


def test_biases_stay_where_they_are_the_models(tmp_path: Path) -> None:
    """GPTQ gives every linear a bias of zeros; Qwen2's queries, keys and values have one, and what is not zero is no decoration."""
    tensors = quantized_checkpoints.values(QWEN2)
    expected = quantized_checkpoints.write(tmp_path / "a", QWEN2, FORMATS["gptq zero biases"], tensors=tensors)
    added = set(Original(open_source(tmp_path / "a")).names()) - expected.keys()
    assert added == {f"model.layers.{n}.self_attn.{part}_proj.bias" for n in range(2) for part in "qkv"}
    config = {**LLAMA, "attention_bias": True}
    tensors = quantized_checkpoints.values(config)
    check(tmp_path / "b", quantized_checkpoints.write(tmp_path / "b", config, FORMATS["awq"], tensors=tensors))
    check(tmp_path / "c", quantized_checkpoints.write(tmp_path / "c", LLAMA, FORMATS["awq"], tensors=tensors))


GOLDENS = DATA / "quantized" / "models"


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("awq_q_fp16", 0.12),
        ("gptq_q_bf16", 0.12),
        ("gptqasym_q_fp16", 0.12),
        ("gptq8_q_fp16", 0.01),
        ("fp8fbgemm_q_bf16", 0.03),
        ("fp8modelopt_q_bf16", 0.03),
    ],
)
def test_what_others_wrote_is_near_the_model_that_they_quantized(name: str, bound: float) -> None:
    """Wrong in order, width or zero point, it would be off by its own size."""
    original, base = Original(open_source(GOLDENS / name)), Original(open_source(GOLDENS / f"q_{name[-4:]}"))
    assert sorted(original.names()) == sorted(base.names())
    for weight in base.names():
        ours, theirs = (to_float32(each.rows(weight, 0, base.shape(weight)[0])) for each in (original, base))
        assert np.linalg.norm(ours - theirs) <= bound * np.linalg.norm(theirs), weight


# A module by itself: what checkpoints rarely hold


def module(parameters: Mapping[str, np.ndarray], said: Mapping[str, Any] | None = None) -> Numbers:
    found = packed.unpack("m", held(parameters), said or {}, LastBlock())
    assert found.keys() == {"weight"}
    return found["weight"]


def equal(weight: Numbers, expected: np.ndarray) -> None:
    assert weight.shape == expected.shape
    assert np.array_equal(weight.rows(0, len(expected)), expected.astype(np.float32))


WEIGHT = RANDOM.standard_normal((48, 64), dtype=np.float32)
CODES, ZEROS, SCALES = grouped(WEIGHT, 4, 16, False, np.dtype(np.float16))


def compressed(codes: np.ndarray = CODES, **changed: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "weight_packed": packed32(codes, 4, 1),
        "weight_scale": SCALES,
        "weight_shape": np.array(CODES.shape),
        "weight_zero_point": packed32(ZEROS, 4, 0),
        **changed,
    }


def test_compressed_groups_in_the_activations_order() -> None:
    index = RANDOM.permutation(np.arange(64) // 16)
    equal(module(compressed(weight_g_idx=index.astype(np.int32))), numbers(CODES, ZEROS, SCALES, index))
    equal(module(compressed(weight_g_idx=np.full(64, -1, np.int32))), numbers(CODES, ZEROS, SCALES))


def test_compressed_widths_by_the_settings_alone() -> None:
    parameters = compressed()
    del parameters["weight_shape"]
    said = {"config_groups": {"group_0": {"weights": {"num_bits": 4}}}}
    equal(module(parameters, said), numbers(CODES, ZEROS, SCALES))
    with pytest.raises(BadInput, match=r"m\.weight_packed"):
        module(parameters)


def test_compressed_rows_that_end_inside_a_word() -> None:
    codes, zeros, scales = CODES[:, :60], ZEROS[:, :1], SCALES[:, :1]
    padded = np.pad(codes, ((0, 0), (0, 4)))
    parameters = {
        **compressed(padded, weight_shape=np.array([48, 60])),
        "weight_scale": scales,
        "weight_zero_point": packed32(zeros, 4, 0),
    }
    equal(module(parameters), numbers(codes, zeros, scales))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (48,), (48, 1), (48, 4)])
@pytest.mark.parametrize("kind", [ml_dtypes.float8_e4m3fn, np.int8])
def test_scales_of_any_shape(shape: tuple[int, ...], kind: Any) -> None:
    codes = (WEIGHT * 20).astype(kind)
    scale = RANDOM.uniform(0.5, 2, shape).astype(np.float32)
    spread = np.repeat(scale, 16, axis=1) if shape == (48, 4) else scale.reshape(-1, 1)
    equal(module({"weight": codes, "weight_scale": scale}), codes.astype(np.float32) * spread)


def test_factors_of_activations_are_folded_in() -> None:
    codes, before = (WEIGHT * 20).astype(ml_dtypes.float8_e4m3fn), RANDOM.uniform(0.5, 2, 64).astype(np.float16)
    parameters = {"weight": codes, "weight_scale": np.float32([0.5]), "pre_quant_scale": before, "input_scale": np.float32(1)}
    equal(module(parameters), codes.astype(np.float32) * np.float32(0.5) * before.astype(np.float32))


def test_zeros_that_are_said_to_be_asymmetric_are_taken_as_they_are() -> None:
    """Eights throughout are the zeros of format v2, but where the settings say that they need not be the middle."""
    codes, zeros, scales = grouped(WEIGHT, 4, 16, True, np.dtype(np.float16))
    parameters = {"qweight": packed32(codes.T, 4, 0), "qzeros": packed32(zeros.T, 4, 1), "scales": scales.T}
    equal(module(parameters), numbers(codes, zeros, scales))
    equal(module(parameters, {"sym": False}), numbers(codes, zeros + 1, scales))


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"weight": np.zeros((8, 64), np.uint8), "absmax": np.zeros(4, np.float32)}, r"m\.weight: found values of type uint8"),
        ({"weight": np.zeros((8, 64), ml_dtypes.float8_e5m2), "weight_scale": np.zeros(1, np.float32)}, r"m\.weight: .*e5m2"),
        ({"weight": np.zeros((256, 256), np.int8), "weight_scale": np.zeros((2, 2), np.float32)}, r"m\.weight_scale: .*\[2, 2\]"),
        ({"weight": np.zeros((8, 64), np.int8), "weight_scale": np.zeros((8, 3), np.float32)}, r"m\.weight_scale: .*\[8, 3\]"),
        (
            {
                "qweight": np.zeros((18, 64), np.int32),
                "qzeros": np.zeros((1, 18), np.int32),
                "scales": np.zeros((1, 64), np.float16),
            },
            r"m\.qweight: .*qzeros \[1, 18\]",
        ),
        (compressed(weight_scale=np.zeros((48, 7), np.float16)), r"m\.weight_packed: .*\[48, 7\]"),
    ],
    ids=["nf4", "e5m2", "blocks", "uneven groups", "9 bits", "uneven words"],
)
def test_what_no_format_explains_is_refused(parameters: dict[str, np.ndarray], named: str) -> None:
    with pytest.raises(BadInput, match=named):
        module(parameters)


def test_every_module_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    tensors = quantized_checkpoints.values(LLAMA)
    wrong = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(2)]
    checkpoints.save(tmp_path, LLAMA, {**tensors, **dict.fromkeys(wrong, np.zeros((256, 64), np.uint8))})
    with pytest.raises(BadInput) as caught:
        Original(open_source(tmp_path))
    assert [problem.subject for problem in caught.value.problems] == wrong


# Rows, and what is read for them

MODULES: dict[str, dict[str, np.ndarray]] = {
    "gptq": {"qweight": packed32(CODES.T, 4, 0), "qzeros": packed32((ZEROS - 1).T, 4, 1), "scales": SCALES.T},
    "awq": {
        "qweight": packed32(CODES.T, 4, 1, (0, 2, 4, 6, 1, 3, 5, 7)),
        "qzeros": packed32(ZEROS.T, 4, 1, (0, 2, 4, 6, 1, 3, 5, 7)),
        "scales": SCALES.T,
    },
    "compressed": compressed(),
    "pairs": {"weight": RANDOM.integers(0, 256, (24, 64), dtype=np.uint8), "weight_scale": SCALES.astype(np.float32)},
    "float8": {"weight": WEIGHT.astype(ml_dtypes.float8_e4m3fn), "weight_scale": SCALES[:, :1].astype(np.float32)},
    "gguf": {"gguf_Q8_0": RANDOM.integers(0, 120, (48, 2 * 34), dtype=np.uint8)},
}


@given(name=st.sampled_from(sorted(MODULES)), data=st.data())
def test_any_rows_are_those_of_the_whole(name: str, data: st.DataObject) -> None:
    weight = module(MODULES[name], {"sym": False})
    assert weight.shape == (48, 64)
    ranges = data.draw(st.lists(st.lists(st.integers(0, 48), min_size=2, max_size=2, unique=True), min_size=1, max_size=3))
    everything = weight.rows(0, 48)
    assert np.isfinite(everything).all()
    for start, stop in map(sorted, ranges):
        assert np.array_equal(weight.rows(start, stop), everything[start:stop])


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_columns_are_unpacked_a_block_at_a_time_and_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_formats, "AHEAD_CODES", 1)  # 64 out-features, the least
    codes, zeros, scales = grouped(RANDOM.standard_normal((200, 64), dtype=np.float32), 4, 16, False, np.dtype(np.float16))
    order, axis = ((), 0) if name == "gptq" else ((0, 2, 4, 6, 1, 3, 5, 7), 1)
    stored = {
        "qweight": packed32(codes.T, 4, axis, order),
        "qzeros": packed32((zeros - 1 if name == "gptq" else zeros).T, 4, 1, order),
        "scales": scales.T,
    }
    tensors = {key: Counted(Held(array)) for key, array in stored.items()}
    weight = packed.unpack("m", tensors, {"sym": False}, LastBlock())["weight"]
    whole = tensors["qweight"].shape[0] * tensors["qweight"].shape[1]
    assert not tensors["qweight"].elements
    rows = [weight.rows(start, start + 10) for start in range(0, 60, 10)]
    assert tensors["qweight"].elements == whole * 64 / 200  # 6 times 10 rows of the same block
    assert tensors["scales"].elements == 64 * 4
    assert np.array_equal(np.concatenate(rows), weight.rows(0, 60))
    tensors["qweight"].elements = 0
    assert np.array_equal(weight.rows(60, 200), numbers(codes, zeros, scales)[60:])
    assert tensors["qweight"].elements == whole * (200 - 64) / 200


def test_a_block_is_kept_until_another_is_asked_for_by_each_thread() -> None:
    made: list[int] = []
    memo = LastBlock()

    def ask() -> None:
        for key in (1, 1, 2, 1):
            memo.get(key, lambda key=key: made.append(key) or np.zeros(1))  # type: ignore[misc]

    ask()
    assert made == [1, 2, 1]
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    ask()
    assert made == [1, 2, 1, 1, 2, 1, 2, 1]


# Settings of strangers, of which a conversion takes no notice either


@pytest.mark.parametrize(
    "dynamic", [["a"], "a", 5, {"+:.*(": {"bits": 8}}, {"+:.*": 8}, {"+:.*": None}, {"-:.*": 8}, {"": []}], ids=str
)
def test_dynamic_settings_that_say_nothing(dynamic: Any) -> None:
    settings = {"sym": False, "dynamic": dynamic}
    assert of_module(("a.b",), settings) is settings


def test_the_first_name_that_a_pattern_fits_counts() -> None:
    settings = {"dynamic": {"-:c": {}, r"a\.": {"bits": 8}, ".*b": {"bits": 2}}}
    assert of_module(("a.b",), settings) == {**settings, "bits": 8}
    assert of_module(("x", "b", "a.b"), settings) == {**settings, "bits": 2}
    assert of_module(("c.d", "a.b"), settings) is settings


@pytest.mark.parametrize(
    "said", ["abc", "1x", "²x2", [1], [0, 128], 5, {"a": 1}, "9" * 5000 + "x1"], ids=lambda said: str(said)[:9]
)
def test_tiles_of_no_size(said: Any) -> None:
    code = RANDOM.standard_normal((4, 4)).astype(ml_dtypes.float8_e4m3fn)
    settings = {"weight_block_size": said, "config_groups": {"a": 5, "b": {"weights": "w"}, "c": {"weights": {}}}}
    whole = {"weight": code, "weight_scale_inv": np.array(2, np.float32)}
    equal(module(whole, settings), code.astype(np.float32) * 2)  # one scale for all needs none
    with pytest.raises(BadInput, match="no size of a tile"):
        module({**whole, "weight_scale_inv": np.ones((2, 2), np.float32)}, settings)


@pytest.mark.parametrize("weights", ["w", [4], {"num_bits": [4]}, {"num_bits": None}], ids=str)
def test_widths_that_are_none(weights: Any) -> None:
    stored = {name: array for name, array in compressed().items() if name != "weight_shape"}
    with pytest.raises(BadInput, match="words of 4 or 8 bits"):
        module(stored, {"config_groups": {"a": {"weights": weights}, "b": None}})


def test_a_state_of_bitsandbytes_that_is_too_long() -> None:
    made = quantized_checkpoints.bitsandbytes(block=32).quantizer("m", WEIGHT).parameters
    state = next(name for name in made if "quant_state" in name)
    long = np.concatenate([made[state], np.full(64 << 10, ord(" "), np.uint8)])
    with pytest.raises(BadInput, match="a state of bitsandbytes"):
        module({**made, state: long})
