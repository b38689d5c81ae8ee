"""NVFP4: scales of the parts of a fused module under the largest scale of all; what is not finite is refused by name."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from pipeline.errors import BadInput
from stages.quantization.targets.nvfp4 import pack
from tests.support.lazy import values
from tests.support.packed_tensors import opened

F8 = ml_dtypes.float8_e4m3fn
NAMES = ("q.weight", "k.weight")


def parts(**changed: np.ndarray) -> list[dict[str, Any]]:
    """Two parts, of which the second has `changed` parameters."""
    result = []
    for number, name in enumerate(NAMES):
        stored = {
            "fp4": np.zeros((4, 16), np.uint8),
            "block_scale": np.full((4, 2), 2.0, F8),
            "global_scale": np.array([0.5 + number / 2], np.float32),
            "input_scale": np.array([0.25], np.float32),
            **(changed if number else {}),
        }
        arrays = opened({f"{name}.{key}": array for key, array in stored.items()})
        result.append({key.removeprefix(f"{name}."): array for key, array in arrays.items()})
    return result


def test_parts_have_the_largest_scale_of_all() -> None:
    own, shared = pack(NAMES, parts())
    assert values(shared["weights_scaling_factor_2"][0]).tolist() == [1.0]
    assert [values(each["weights_scaling_factor"][0]).astype(np.float32).max() for each in own] == [1.0, 2.0]


def test_a_module_of_one_part_is_left_as_it_is() -> None:
    first, *_ = parts()
    (own,), _ = pack(NAMES[:1], [first])
    assert own["weight"][0] is first["fp4"]
    assert values(own["weights_scaling_factor"][0]).tobytes() == values(first["block_scale"]).tobytes()


@pytest.mark.parametrize("key", ["block_scale", "global_scale", "input_scale"])
@pytest.mark.parametrize("alone", [True, False])
def test_scales_that_are_not_finite_are_refused_by_name(key: str, alone: bool) -> None:
    wrong = np.full((4, 2), np.nan, F8) if key == "block_scale" else np.array([np.nan], np.float32)
    given = parts(**{key: wrong})[1 if alone else 0 :]
    own, shared = pack(NAMES[1 if alone else 0 :], given)
    array = {
        "block_scale": own[-1]["weights_scaling_factor"],
        "global_scale": shared["weights_scaling_factor_2"],
        "input_scale": shared["activation_scaling_factor"],
    }[key][0]
    with pytest.raises(BadInput, match=r"k\.weight: scales: found a scale that is not finite"):
        values(array)
