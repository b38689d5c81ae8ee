"""AWQ's search against outputs that are multiplied out in NumPy; and that it rounds weights as the conversion does."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.model.awq_settings import AwqSettings
from stages.calibrate.awq_inputs import LayerInputs, TakenInput
from stages.calibrate.awq_search import rounded, scale_of, search
from stages.quantization.targets.awq_numbers import pack
from stages.verify.values import signed_pairs
from tests.support.examples import examples
from tests.support.lazy import values
from tests.support.packed_tensors import opened

KINDS = {"float16": (torch.float16, np.dtype(np.float16)), "bfloat16": (torch.bfloat16, np.dtype(ml_dtypes.bfloat16))}
CPU = torch.device("cpu")


def drawn(seed: int, tokens: int, features: int, *rows: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Activations [tokens, features], some channels far larger than others, and weights [rows, features]; float32."""
    random = np.random.default_rng(seed)
    inputs = random.standard_normal((tokens, features)) * np.exp(random.normal(0, 1.5, features))
    return inputs.astype(np.float32), [random.standard_t(5, (count, features)).astype(np.float32) for count in rows]


def by_hand(weight: np.ndarray, scale: np.ndarray, size: int, kind: str) -> np.ndarray:
    """The numbers that a weight's codes stand for, group by group, in NumPy; scales and steps in the target's type."""
    to = KINDS[kind][1]
    inverse = (np.float32(1) / scale).astype(to).astype(np.float32)
    result = np.empty_like(weight)
    for row, numbers in enumerate(weight / inverse):
        for first in range(0, len(numbers), size):
            group = numbers[first : first + size]
            step = np.float32(max(group.max() / np.float32(7), -group.min() / np.float32(8))).astype(to).astype(np.float32)
            codes = np.clip(np.rint(group / step), -8, 7) if step else np.zeros_like(group)
            result[row, first : first + size] = codes * step * inverse[first : first + size]
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_is_the_best_of_twenty(kind: str) -> None:
    inputs, weights = drawn(0, 40, 128, 24, 16)
    magnitudes = np.abs(inputs).mean(axis=0)
    taken = TakenInput(128, 1, 40, CPU)
    for some in np.split(inputs, 4):
        taken.see(torch.from_numpy(some))
    assert np.allclose(taken.magnitudes().numpy(), magnitudes, rtol=1e-6)
    found = search(taken.magnitudes(), taken.error_of(), taken.kept, [torch.from_numpy(w) for w in weights], 64, KINDS[kind][0])

    def off(ratio: float) -> list[float]:
        powers = np.clip(taken.magnitudes().numpy() ** np.float32(ratio), 1e-4, None)
        scale = powers / np.sqrt(powers.max() * powers.min())
        return [float(np.mean((inputs.astype(np.float64) @ (by_hand(w, scale, 64, kind) - w).T) ** 2)) for w in weights]

    tried = [off(number / 20) for number in range(20)]
    best = int(np.argmin([24 * first + 16 * second for first, second in tried]))
    assert 0 < best < 20
    assert found.ratio == best / 20
    assert found.nearest == pytest.approx(tried[0], rel=1e-3)
    assert found.searched == pytest.approx(tried[best], rel=1e-3)
    assert all(after < 0.8 * before for before, after in zip(found.nearest, found.searched, strict=True))
    assert float(found.scale.max() * found.scale.min()) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@examples(20)
@given(seed=st.integers(0, 99), size=st.sampled_from([64, 128]))
def test_weights_are_rounded_as_the_conversion_rounds_them(kind: str, seed: int, size: int) -> None:
    torch_type, numpy_type = KINDS[kind]
    inputs, (weight,) = drawn(seed, 8, 256, 6)
    weight = weight.astype(numpy_type)
    scale = scale_of(torch.from_numpy(np.abs(inputs).mean(axis=0)), seed % 20 / 20)
    arrays = opened({"w": weight, "s": scale.numpy()})
    packed = {name: values(array) for name, (array, _) in pack("w", arrays["w"], arrays["s"], size, numpy_type, 64).items()}
    numbers = signed_pairs(packed["weight"].view(np.uint8)).astype(np.float32)
    numbers = (numbers.reshape(6, -1, size) * packed["weights_scaling_factor"][:, :, None]).reshape(6, 256)
    expected = numbers * packed["prequant_scaling_factor"].astype(np.float32)
    wide = torch.from_numpy(weight.astype(np.float32))
    assert np.array_equal(rounded(wide, scale, size, torch_type).numpy(), expected)
    assert np.array_equal(by_hand(weight.astype(np.float32), scale.numpy(), size, kind), expected)


def test_a_channel_that_is_never_used_and_one_that_is_huge() -> None:
    magnitudes = torch.tensor([0.0, 1.0, 1e9, 3.0])
    for number in range(20):
        scale = scale_of(magnitudes, number / 20)
        assert bool(((scale >= 2.0**-12) & (scale <= 2.0**12)).all())
    assert scale_of(magnitudes, 0.0).tolist() == [1, 1, 1, 1]


def test_the_error_by_products_of_features_is_that_by_tokens() -> None:
    inputs, (weight,) = drawn(3, 200, 64, 32)
    many, few = TakenInput(64, 1, 200, CPU), TakenInput(64, 4, 200, CPU)
    for some in np.split(inputs, 5):
        many.see(torch.from_numpy(some))
        few.see(torch.from_numpy(some))
    difference = torch.from_numpy(weight)
    for taken, rows in ((many, inputs), (few, inputs[::4])):
        expected = float(((rows.astype(np.float64) @ weight.T.astype(np.float64)) ** 2).sum())
        assert taken.error_of()(difference) == pytest.approx(expected, rel=1e-4)
        assert taken.kept == len(rows)
        assert np.allclose(taken.magnitudes().numpy(), np.abs(inputs).mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize(("every", "lengths"), [(3, (5, 4, 8)), (7, (3, 3, 3, 3)), (1, (2, 2))])
def test_tokens_are_taken_evenly_over_samples(every: int, lengths: tuple[int, ...]) -> None:
    inputs = np.arange(sum(lengths) * 64, dtype=np.float32).reshape(-1, 64)
    taken, one = TakenInput(64, every, len(inputs), CPU), torch.zeros(1, 64)
    for some in np.split(inputs, np.cumsum(lengths)[:-1]):
        taken.see(torch.from_numpy(some))
    one[0, 0] = 1  # the output is the first feature
    assert taken.error_of()(one) == pytest.approx(float((inputs[::every, 0].astype(np.float64) ** 2).sum()))
    assert taken.kept == len(inputs[::every])


class Layer(torch.nn.Module):
    """Two linears that take the same, one that takes a copy of it, and one that takes what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.copied, self.o = (torch.nn.Linear(64, 64, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(self.q(x) + self.k(x) + self.copied(x.clone()))


def test_linears_that_take_the_same_have_one_scale() -> None:
    torch.manual_seed(0)
    layer, inputs = Layer(), LayerInputs(AwqSettings(64), torch.float16, 48)
    for name, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear):
            inputs.hook(name, module)
    x = torch.from_numpy(drawn(1, 48, 64)[0])
    with torch.no_grad():
        for sample in x.split(16):
            layer(sample[None])
    found = dict(inputs.arrays())
    assert found.keys() == {f"{name}|{kind}" for name in ("q", "k", "copied", "o") for kind in ("awq", "awq_error")}
    assert np.array_equal(found["q|awq"], found["k|awq"])
    assert np.array_equal(found["q|awq"], found["copied|awq"])
    assert not np.array_equal(found["q|awq"], found["o|awq"])
    for name in ("q", "k", "copied"):
        weight = getattr(layer, name).weight.detach()
        for place, scale in enumerate((torch.ones(64), torch.from_numpy(found["q|awq"]))):
            off = x @ (rounded(weight, scale, 64, torch.float16) - weight).T
            assert found[f"{name}|awq_error"][place] == pytest.approx(float(off.square().mean()), rel=1e-3)
