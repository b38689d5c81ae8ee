"""W8A16 and W4A16 of a source's own codes: arranged as any, with the source's scales, and never with zero points dropped."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from pipeline.errors import BadInput
from stages.quantization.kernels.layout import kernel_layout
from stages.quantization.targets.kept_rows import pack_rows
from tests.support.lazy import values
from tests.support.packed_tensors import expected_codes, opened, random_codes, random_scales

BF16 = np.dtype(ml_dtypes.bfloat16)


def parameters(bits: int, offset: int = 0, dtype: np.dtype = BF16) -> dict[str, np.ndarray]:
    offsets = np.zeros((1, 64), np.int16)
    offsets[0, 40] = offset
    codes = expected_codes(random_codes((64, 128), bits, 2), bits)
    return {f"codes{bits}": codes, "scales": random_scales((1, 64), 2, dtype), "offsets": offsets}


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_arranged_and_scales_kept(bits: int, sm: int) -> None:
    given, layout = parameters(bits), kernel_layout(bits, sm, False)
    result = pack_rows("w", opened(given), layout, BF16, "bfloat16", 64)
    weight, known = result["weight"]
    assert values(weight).tobytes() == layout.arrange(given[f"codes{bits}"]).tobytes()
    assert known.dtype == "int8"
    assert dict(known.header)["out"] * 64 == 64 * bits // 8
    scales, _ = result["per_channel_scale"]
    assert values(scales).tobytes() == given["scales"].tobytes()


def test_a_scale_is_rounded_once() -> None:
    given = parameters(8, dtype=np.dtype(np.float32))
    scales, _ = pack_rows("w", opened(given), kernel_layout(8, 80, False), BF16, "bfloat16", 64)["per_channel_scale"]
    assert np.array_equal(values(scales), given["scales"][0].astype(BF16))


def test_a_zero_point_is_refused() -> None:
    scales, _ = pack_rows("a.weight", opened(parameters(8, 1)), kernel_layout(8, 80, False), BF16, "bfloat16", 64)[
        "per_channel_scale"
    ]
    with pytest.raises(BadInput, match=r"a\.weight: found zero points; expected codes that are symmetric\. Give --requantize"):
        values(scales)


@pytest.mark.parametrize("scale", [1e5, 2e-8])
def test_a_scale_that_float16_does_not_hold_is_refused(scale: float) -> None:
    given = parameters(8, dtype=np.dtype(np.float32))
    given["scales"][0, 5] = scale
    scales, _ = pack_rows("a.weight", opened(given), kernel_layout(8, 80, False), np.dtype(np.float16), "float16", 64)[
        "per_channel_scale"
    ]
    with pytest.raises(BadInput, match=r"a\.weight: scales: found a scale of .*Give --dtype bfloat16"):
        values(scales)
