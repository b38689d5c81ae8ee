"""SmoothQuant of two matrices that share their activations, against the reference's formulas written anew in torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import BadInput
from stages.quantization.targets import smoothquant
from tests.support.lazy import values
from tests.support.packed_tensors import opened

FEATURES, ROWS = 48, (40, 24)
KINDS = [(channel, token) for channel in (False, True) for token in (False, True)]
each_kind = pytest.mark.parametrize(("per_channel", "per_token"), KINDS)


def given(seed: int = 0) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Two matrices in float16, and the ranges of what they take and of what the first gives."""
    random = np.random.default_rng(seed)
    weights = [
        (random.normal(0, 0.1, (rows, FEATURES)) * np.exp(random.normal(0, 1, FEATURES))).astype(np.float16) for rows in ROWS
    ]
    inputs = np.exp(random.normal(0, 2, FEATURES)).astype(np.float32)
    return weights, inputs, np.exp(random.normal(0, 1, ROWS[0])).astype(np.float32)


def lazily(arrays: dict[str, np.ndarray], chunk: int = 1 << 20) -> Any:
    return opened(arrays, chunk)


def reference(weights: list[np.ndarray], inputs: np.ndarray, outputs: np.ndarray, alpha: float) -> dict[str, Any]:
    """The first of the matrices, by each kind of scale, in torch's own arithmetic."""
    tensors, x = [torch.from_numpy(weight.copy()) for weight in weights], torch.from_numpy(inputs.copy())
    columns = torch.stack([weight.abs().max(dim=0)[0] for weight in tensors]).max(dim=0)[0].clamp(min=1e-5)
    smooth = (x.to(torch.float64).pow(alpha) / columns.to(torch.float64).pow(1 - alpha)).clamp(min=1e-5)
    for weight in tensors:
        weight.mul_(smooth)
    weight, steps = tensors[0], [127.0 / (x / smooth).max(), 127.0 / torch.from_numpy(outputs).max()]
    rows = weight.abs().max(dim=1)[0]
    by_row, of_all = 127.0 / rows, 127.0 / rows.max()
    wide = [by_row.float(), of_all.float()]
    codes = [(weight * wide[0][:, None]).round().clip(-127, 127), (weight * wide[1]).round().clip(-127, 127)]
    return {
        "smooth": smooth.numpy(),
        "codes": {True: codes[0].to(torch.int8).numpy(), False: codes[1].to(torch.int8).numpy()},
        "scale": {
            (True, False): (steps[1] / (steps[0] * wide[0])).float().numpy().reshape(1, -1),
            (False, False): (steps[1] / (steps[0] * wide[1])).float().numpy().reshape(1, 1),
            (True, True): (1.0 / by_row).float().numpy().reshape(1, -1),
            (False, True): (1.0 / of_all).float().numpy().reshape(1, 1),
        },
        "steps": [float(step) for step in steps],
    }


def ours(
    weights: list[np.ndarray], inputs: np.ndarray, outputs: np.ndarray, alpha: float, kind: tuple[bool, bool], chunk: int = 1 << 20
) -> dict[str, np.ndarray]:
    """The same by the stage's functions; `chunk`: the most bytes of a block of a matrix."""
    lazy = lazily({"a": weights[0], "b": weights[1]}, chunk) | lazily({"x": inputs, "y": outputs})
    smooth = smoothquant.factors([("a", lazy["a"]), ("b", lazy["b"])], lazy["x"], alpha)
    steps = smoothquant.steps(smooth, lazy["x"], [lazy["y"]])
    if kind[0]:
        packed = smoothquant.by_channel("a", lazy["a"], smooth, steps, kind[1])
    else:
        (packed,) = smoothquant.by_tensor([("a", lazy["a"])], smooth, steps, kind[1], "half", False)
    found = {name: values(array) for name, (array, _) in packed.items()}
    return found | {"smooth": values(smooth), "steps": values(steps), "smoother": values(smoothquant.smoother(smooth)[0])}


@pytest.mark.parametrize("chunk", [1 << 20, 5 * 2 * FEATURES], ids=["whole", "blocks"])
@pytest.mark.parametrize("alpha", [0.5, 0.8, 1.0])
@each_kind
def test_codes_and_scales_are_those_of_torch(per_channel: bool, per_token: bool, alpha: float, chunk: int) -> None:
    found = ours(*given(), alpha, (per_channel, per_token), chunk)
    expected = reference(*given(), alpha)
    # Powers of two libraries may differ by their last bit: at 0.5 both take square roots.
    assert np.allclose(found["smooth"], expected["smooth"], rtol=1e-15 if alpha == 0.5 else 1e-14, atol=0)
    assert np.allclose(found["steps"], expected["steps"], rtol=1e-14, atol=0)
    assert np.array_equal(found["weight"], expected["codes"][per_channel])
    assert found["per_channel_scale"].reshape(1, -1).tobytes() == expected["scale"][per_channel, per_token].tobytes()
    assert found["smoother"].tobytes() == expected["smooth"].astype(np.float32).reshape(1, -1).tobytes()


@each_kind
def test_what_the_codes_stand_for_is_the_product(per_channel: bool, per_token: bool) -> None:
    """Dequantized and divided by the factors again, weights are those of the source within half a step."""
    weights, inputs, outputs = given()
    found = ours(weights, inputs, outputs, 0.5, (per_channel, per_token))
    scale = found["per_channel_scale"].reshape(-1, 1) * (1 if per_token else np.divide(*found["steps"]))
    again = found["weight"] * scale / found["smooth"]
    bound = scale / found["smooth"] * (0.5 + 127 * 2**-9)  # roundings of the scale and of the product to float16
    assert np.all(np.abs(again - weights[0]) <= bound + np.abs(weights[0]) * 2**-10)


@each_kind
def test_rows_of_zeros_and_of_small_weights(per_channel: bool, per_token: bool) -> None:
    """127 by what is below 0.0019 is too large for float16, of which the reference makes rows of zeros."""
    weights, inputs, outputs = given()
    inputs = np.ones_like(inputs)
    weights = [np.clip(weight, -0.5, 0.5) for weight in weights]
    weights[0][3], weights[0][5] = 0, np.float16(0.001) * np.sign(weights[0][5])
    found = ours(weights, inputs, outputs, 1.0, (per_channel, per_token))
    scale = found["per_channel_scale"].reshape(-1, 1) * (1 if per_token else np.divide(*found["steps"]))
    again = found["weight"] * np.broadcast_to(scale, (len(weights[0]), 1)) / found["smooth"]
    assert not found["weight"][3].any()
    assert np.isfinite(scale).all()
    if per_channel:
        assert np.allclose(again[5], weights[0][5], rtol=1e-2, atol=0)


def test_a_matrix_of_small_weights_keeps_them() -> None:
    weights, inputs, outputs = given()
    weights = [(np.sign(weight) * 0.0005).astype(np.float16) for weight in weights]
    found = ours(weights, np.ones_like(inputs), outputs, 1.0, (False, True))
    assert np.allclose(found["weight"] * found["per_channel_scale"], weights[0], rtol=1e-2, atol=0)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
@each_kind
def test_values_that_are_no_numbers_are_refused_by_name(per_channel: bool, per_token: bool, bad: float) -> None:
    weights, inputs, outputs = given()
    weights[1][2, 2] = bad
    with pytest.raises(BadInput, match="b: found a value that is not finite"):
        ours(weights, inputs, outputs, 0.5, (per_channel, per_token))


def test_a_norm_that_its_factors_make_too_large_is_refused_by_name() -> None:
    lazy = lazily({"gain": np.array([1, 1], np.float16), "w": np.ones((1, 2), np.float16), "x": np.array([0, 1], np.float32)})
    smooth = smoothquant.factors([("w", lazy["w"])], lazy["x"], 0.5)
    with pytest.raises(BadInput, match="norm, divided by the factors"):
        values(smoothquant.divided("norm", lazy["gain"], smooth))


def test_the_scale_of_an_int8_cache() -> None:
    lazy = lazily({"q": np.array([1, 3], np.float32), "k": np.array([2], np.float32)})
    assert values(smoothquant.cache_scale([lazy["q"], lazy["k"]])) == np.float32(3) / np.float32(127)
