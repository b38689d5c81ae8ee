"""AutoRound's settings: which format they name, and what they say of one module."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stages.quantization.auto_round import activation_bits, is_auto_round, module_settings, stores_the_zero
from stages.quantization.numbers import dequantize
from stages.quantization.sources.gptq import FORMAT
from tests.support.lazy import values
from tests.support.packed_tensors import gptq, naive_weight, opened, random_codes, random_scales


def said(packing: str, key: str = "packing_format", method: str = "auto-round") -> dict[str, Any]:
    return {"quant_method": method, key: packing}


@pytest.mark.parametrize(
    ("packing", "itself"),
    [
        ("auto_round", True),
        ("auto_round:exllamav2", True),
        ("auto_round:gptqmodel", True),
        ("autoround:exllamav2", True),
        ("auto-round", True),
        ("auto_round:auto_gptq", False),
        ("auto_round:gptq", False),
        ("auto_round:gptq:exllamav2", False),
        ("auto_round:auto_gptq:exllamav2", False),
        ("auto", False),
    ],
)
@pytest.mark.parametrize(("key", "method"), [("packing_format", "auto-round"), ("backend", "intel/auto-round")])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_zero_points_of_a_packing_format(packing: str, itself: bool, key: str, method: str, bits: int) -> None:
    settings = said(packing, key, method)
    assert stores_the_zero(settings) is itself
    codes, scales = random_codes((32, 16), bits, 3), random_scales((2, 32), 3)
    zeros = random_codes((2, 32), bits, 4) % ((1 << bits) - 1) + 1
    stored = zeros if itself else zeros - 1
    arrays = opened(gptq(codes, stored, scales, bits))
    assert np.array_equal(values(dequantize(FORMAT.unpack(arrays, settings))), naive_weight(codes, zeros, scales))


def test_what_is_not_auto_round_s() -> None:
    assert not stores_the_zero({"quant_method": "gptq"})
    assert not stores_the_zero({"quant_method": "gptq", "packing_format": "auto_round"})
    assert stores_the_zero({"checkpoint_format": "gptq_v2"})
    assert not stores_the_zero({"quant_method": "auto-round"}), "AutoGPTQ's is its default"
    assert all(is_auto_round({"quant_method": name}) for name in ("auto-round", "intel/auto-round", "auto_round", "AutoRound"))
    assert not is_auto_round({"quant_method": "awq", "provider": "auto-round"}), "it is the other's format then"


def test_the_settings_of_a_module() -> None:
    extra = {"a.b": {"bits": 8}, r"c\..*d$": {"sym": True}, "e": {"bits": 16}, "f(": {"bits": 2}, "g": None}
    settings = {**said("auto_round"), "bits": 4, "sym": False, "extra_config": extra}
    assert module_settings("a.b", settings) == {**settings, "bits": 8}
    assert module_settings("c.x.d", settings) == {**settings, "sym": True}
    for module in ("a.c", "e.f", "g"):
        assert module_settings(module, settings) is settings
    other = {**settings, "quant_method": "gptq"}
    assert module_settings("a.b", other) is other


def test_quantized_activations_are_spoken_of() -> None:
    (note,) = FORMAT.notes({**said("auto_round"), "act_bits": 8}, "W4A16_GPTQ")
    assert "8 bits" in note
    assert "W4A16_GPTQ" in note
    assert FORMAT.notes({**said("auto_round"), "act_bits": 16}, "W4A16_GPTQ") == []
    assert activation_bits({"quant_method": "gptq", "act_bits": 8}) == 16
