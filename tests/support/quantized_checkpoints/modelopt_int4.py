"""ModelOpt's INT4-AWQ."""

from __future__ import annotations

import numpy as np

from tests.support.quantized_checkpoints.base import BF16, Format, Packed


def modelopt_awq(*, group: int = 64, dtype: np.dtype = BF16) -> Format:
    """ModelOpt's INT4-AWQ: the factors of the activations are folded into the module before, but for o_proj and down_proj."""
    random = np.random.default_rng(6)

    def quantize(module: str, weight: np.ndarray) -> Packed:
        smooth = random.uniform(0.5, 2, weight.shape[1]).astype(dtype)
        smooth = smooth if module.endswith(("o_proj", "down_proj")) else np.ones_like(smooth)
        scaled = (weight / smooth.astype(np.float32)).reshape(len(weight), -1, group)
        scales = np.abs(scaled).max(axis=2) / np.float32(7)
        codes = np.clip(np.rint(scaled / scales[..., None]), -8, 7).reshape(weight.shape).astype(np.int64)
        stands_for = codes.astype(np.float32) * np.repeat(scales, group, axis=1) * smooth.astype(np.float32)
        parameters = {"weight": ((codes[0::2] & 15) | ((codes[1::2] & 15) << 4)).astype(np.uint8), "weight_scale": scales}
        if module.endswith(("o_proj", "down_proj")):
            parameters["pre_quant_scale"] = smooth
        return Packed(parameters, stands_for)

    held = {"quant_algo": "W4A16_AWQ", "group_size": group, "has_zero_point": False, "pre_quant_scale": True}
    said = {"producer": {"name": "modelopt", "version": "0.27.0"}, "quantization": {**held, "exclude_modules": ["lm_head"]}}
    return Format(quantize, {}, "W4A16_AWQ", files={"hf_quant_config.json": said})
