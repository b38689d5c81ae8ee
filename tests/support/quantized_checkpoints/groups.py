"""Integer codes by groups of in-features: GPTQ's, AutoAWQ's and AutoRound's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tests.support.quantized_checkpoints.base import FP16, Format, Packed

# AutoRound's names of formats that store the zero points themselves.
ITSELF = ("auto_round", "auto_round:gptqmodel", "auto_round:exllamav2", "autoround:exllamav2")


def grouped(
    weight: np.ndarray, bits: int, group: int, symmetric: bool, dtype: np.dtype, signs: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unsigned codes [N, K], zero points [N, G] and scales [N, G] of the type that the format stores. `signs`: a symmetric scale
    has the sign that gives its group's largest magnitude the lowest code.
    """
    out, features = weight.shape
    groups = weight.reshape(out, features // group, group)
    top = (1 << bits) - 1
    if symmetric:
        scales = (np.abs(groups).max(axis=2) * 2 / top).astype(dtype)
        if signs:
            scales = np.where(groups.max(axis=2) > -groups.min(axis=2), -scales, scales).astype(dtype)
        zeros = np.full(scales.shape, 1 << (bits - 1))
    else:
        low, high = np.minimum(groups.min(axis=2), 0), np.maximum(groups.max(axis=2), 0)
        scales = ((high - low) / top).astype(dtype)
        zeros = np.clip(np.rint(-low / scales.astype(np.float32)), 1, top)
    codes = np.clip(np.rint(groups / scales.astype(np.float32)[..., None]) + zeros[..., None], 0, top)
    return codes.reshape(out, features).astype(np.int64), zeros.astype(np.int64), scales


def numbers(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, index: np.ndarray | None = None) -> np.ndarray:
    """float32 (code - zero) * scale of each in-feature's group; exact, as codes and scales have few bits."""
    index = np.arange(codes.shape[1]) // (codes.shape[1] // zeros.shape[1]) if index is None else index
    return (codes - zeros[:, index]).astype(np.float32) * scales.astype(np.float32)[:, index]


def packed32(codes: np.ndarray, bits: int, axis: int, order: tuple[int, ...] = ()) -> np.ndarray:
    """int32 words of unsigned codes along an axis: place i of a word, lowest first, holds code `order[i]` of its run.

    Codes of 3 bits go over the ends of words: their bits are one stream.
    """
    if 32 % bits:
        stream = (np.moveaxis(codes, axis, -1)[..., None] >> np.arange(bits)) & 1
        data = np.packbits(stream.reshape(*stream.shape[:-2], -1).astype(np.uint8), axis=-1, bitorder="little")
        return np.moveaxis(np.ascontiguousarray(data).view(np.int32), -1, axis)
    count = 32 // bits
    runs = np.moveaxis(codes.astype(np.uint32), axis, -1)
    runs = runs.reshape(*runs.shape[:-1], -1, count)
    words = sum(runs[..., source] << np.uint32(bits * place) for place, source in enumerate(order or range(count)))
    return np.moveaxis(np.asarray(words, dtype=np.uint32), -1, axis).view(np.int32)


def planes32(codes: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """int32 words of unsigned codes in planes along an axis: of 32 codes first the words of their lowest 4 bits (of 3: 2)."""
    blocks = np.moveaxis(codes, axis, -1).reshape(*np.moveaxis(codes, axis, -1).shape[:-1], -1, 32)
    widths = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}[bits]
    planes = [packed32(blocks >> sum(widths[:n]) & ((1 << width) - 1), width, -1) for n, width in enumerate(widths)]
    words = np.concatenate(planes, axis=-1)
    return np.moveaxis(words.reshape(*words.shape[:-2], -1), -1, axis)


def auto_round(
    *,
    bits: int = 4,
    group: int = 64,
    sym: bool = False,
    packing: str = "auto_round",
    older: bool = False,
    signs: bool = False,
) -> Format:
    """AutoRound's format; `packing` says how it packs: as GPTQ with zero points less one, as GPTQ with these themselves, or as AWQ.

    `older`: the settings as they were called before version 0.5. `signs`: as `grouped` has it.
    """
    kind = (
        awq(group=group, sym=sym)
        if "awq" in packing
        else gptq(bits=bits, group=group, sym=sym, second=packing in ITSELF, index="none", signs=signs)
    )
    method, key = ("intel/auto-round", "backend") if older else ("auto-round", "packing_format")
    settings = {"quant_method": method, key: packing, "bits": bits, "group_size": group, "sym": sym, "data_type": "int"}
    return replace(kind, settings={**settings, "autoround_version": "0.4.3" if older else "0.8.0"})


def gptq(
    *,
    bits: int = 4,
    group: int = 64,
    sym: bool = True,
    second: bool = False,
    index: str = "trivial",
    bias: bool = False,
    said: bool = True,
    dtype: np.dtype = FP16,
    beside: bool = False,
    planar: bool = False,
    signs: bool = False,
) -> Format:
    """AutoGPTQ's and GPTQModel's format.

    `group` -1: one scale a row. `second`: zero points as format v2 has them, and `said` whether the settings say so. `index`:
    "trivial", "none", or "order", where the groups follow the activations. `bias`: every module has one, of zeros. `beside`: the
    settings are in a file of their own. `planar`: GPTQModel's words in planes, whose zero points are those of v2. `signs`: as
    `grouped` has it.
    """
    random = np.random.default_rng(5)

    def quantize(module: str, weight: np.ndarray) -> Packed:  # noqa: ARG001
        out, features = weight.shape
        size = features if group == -1 else group
        order = random.permutation(features) if index == "order" else np.arange(features)
        arranged, zeros, scales = grouped(weight[:, order], bits, size, sym, dtype, signs)
        codes = np.empty_like(arranged)
        codes[:, order] = arranged
        groups = np.empty(features, dtype=np.int32)
        groups[order] = np.arange(features) // size
        stored = zeros if second or planar else zeros - 1
        pack = planes32 if planar and 32 % bits else packed32
        parameters = {
            "qweight": pack(codes.T, bits, 0),
            "qzeros": pack(stored.T, bits, 1),
            "scales": scales.T,
            **({} if index == "none" else {"g_idx": groups}),
            **({"bias": np.zeros(out, np.float16)} if bias else {}),
        }
        return Packed(parameters, numbers(codes, zeros, scales, groups))

    version = "gptq_p" if planar else "gptq_v2" if second and said else "gptq"
    settings = {"bits": bits, "group_size": group, "desc_act": index == "order", "sym": sym, "checkpoint_format": version}
    named, algorithm = {**settings, "quant_method": "gptq"}, f"W{4 if bits <= 4 else 8}A16{'' if group == -1 and sym else '_GPTQ'}"
    return Format(quantize, {} if beside else named, algorithm, files={"quantize_config.json": settings} if beside else {})


def awq(*, group: int = 64, dtype: np.dtype = FP16, zero_point: bool = True, stored: bool = True, sym: bool = False) -> Format:
    """AutoAWQ's gemm format; `group` -1: one scale a row.

    `sym`: its zero points are all 8, as they are without `zero_point`, and then `stored` or not.
    """

    def quantize(module: str, weight: np.ndarray) -> Packed:  # noqa: ARG001
        codes, zeros, scales = grouped(weight, 4, weight.shape[1] if group == -1 else group, sym or not zero_point, dtype)
        columns = (0, 2, 4, 6, 1, 3, 5, 7)
        parameters = {"qweight": packed32(codes.T, 4, 1, columns), "qzeros": packed32(zeros.T, 4, 1, columns), "scales": scales.T}
        if not stored:
            del parameters["qzeros"]
        return Packed(parameters, numbers(codes, zeros, scales))

    settings = {"bits": 4, "group_size": group, "zero_point": zero_point, "version": "gemm", "quant_method": "awq"}
    algorithm = "W4A16" if group == -1 and (sym or not zero_point) else "W4A16_GPTQ"
    return Format(quantize, {**settings, "modules_to_not_convert": None}, algorithm, zero=zero_point)
