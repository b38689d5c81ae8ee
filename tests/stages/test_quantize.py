"""quantize: a module that a target does not quantize is numbers of the module's own type, in whatever form the source packs it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from pipeline.model.dtypes import BY_TARGET
from pipeline.model.parallelism import Parallelism
from pipeline.model.quantization import Quantization
from pipeline.model.tables import CONFIGS, Module, layout, slot_names
from pipeline.tensor.names import TensorName
from pipeline.tensor.placement import whole
from stages.cast import cast
from stages.quantization.modules import linear
from stages.quantization.sources import formats
from stages.quantize import quantize
from stages.shard import Embedding, Sharding
from stages.unpack import format_of, unpack
from tests.support import quantized_checkpoints as source
from tests.support.lazy import held, values
from tests.support.packed_tensors import opened
from tests.support.rank_oracle import model_of

SIZES = {"num_experts": 8, "shared_expert_intermediate_size": 128, "num_labels": 64}
MODEL = model_of(4, 2, 64, 256, 128, 64, 2, **SIZES, attn_bias=1, norm_bias=1, qk_norm=1)
LAYOUTS = sorted(path.stem for path in Path(CONFIGS / "layouts").glob("*.toml"))


def packed_gguf(module: str, weight: np.ndarray) -> source.Packed:  # noqa: ARG001
    kind = gguf.GGMLQuantizationType.Q4_0
    stored = gguf.quants.quantize(weight, kind)
    return source.Packed({"gguf_Q4_0": stored}, gguf.quants.dequantize(stored, kind))


FORMATS: dict[str, source.Format] = {**source.formats(), "gguf": source.Format(packed_gguf, {}, "")}


def matrices(name: str) -> list[Module]:
    """The modules of a layout that have a matrix."""
    return [module for module in layout(name).modules.values() if module.in_]


def sharding(name: str) -> Sharding:
    return Sharding(layout(name), MODEL, Parallelism(), Embedding())


@cache
def weight_of(shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(shape).normal(0.01, 0.05, shape).astype(np.float32)


def made(name: str, module: Module, kind: source.Format, dtype: str, algorithm: str | None) -> tuple[np.ndarray, np.ndarray, str]:
    """The array of a packed module in a target, the numbers that it stands for, and its format's name."""
    slot_name = next(slot for slot, part in slot_names(module) if part or not module.parts).replace("{layer}", "1")
    if module.experts:
        slot_name = next(slot for slot, _ in slot_names(module) if "{expert}" in slot).format(layer=1, expert=3)
    slot = layout(name).find(slot_name)
    assert slot is not None
    shape = (MODEL.dimension(slot.out or module.out), MODEL.dimension(module.in_))
    packed = kind.quantizer(slot_name, weight_of(shape))
    form = format_of(packed.parameters)
    assert form is not None
    arranged = form.arrange(held({key: np.ascontiguousarray(array) for key, array in packed.parameters.items()}))
    settings = form.module_settings(slot_name, arranged, kind.settings)
    assert not form.check(slot_name, arranged, settings)
    stored = {key: np.asarray(tensor.block(whole(tensor.shape))) for key, tensor in arranged.items()}
    tensors = opened({TensorName(slot_name, key): array for key, array in stored.items()})
    canonical = cast(unpack(tensors, settings), layout(name), dtype)
    entries = quantize(canonical, sharding(name), Quantization(algorithm), dtype)
    return values(entries[TensorName(slot_name, "weight")].array), packed.weight, form.name


def has_form(module: Module, kind: source.Format) -> bool:
    """Whether a format can hold a module: not so few out-features that they fill none of its words or bytes."""
    if module.parts or module.experts:
        return True
    try:
        packed = kind.quantizer("model.layers.1.mlp.gate", weight_of((MODEL.dimension(module.out), MODEL.dimension(module.in_))))
    except ValueError:
        return False
    return all(array.size for array in packed.parameters.values())


def name_of(kind: source.Format) -> str:
    form = format_of(kind.quantizer("model.layers.0.self_attn.k_proj", weight_of((64, 256))).parameters)
    assert form is not None
    return form.name


CASES = [(name, key) for name in LAYOUTS for key in FORMATS]


@pytest.mark.parametrize(("name", "key"), CASES, ids=lambda text: text)
def test_every_module_has_its_own_type_whatever_it_was_packed_as(name: str, key: str) -> None:
    kind, seen = FORMATS[key], 0
    for module in matrices(name):
        if not has_form(module, kind):
            continue
        # As a target of numbers has all of them, and as one that quantizes its linear modules has the others.
        for algorithm in (None, *(() if linear(module) else ("W8A16",))):
            for dtype in ("float16", "bfloat16"):
                array, stands_for, _ = made(name, module, kind, dtype, algorithm)
                stored = BY_TARGET[module.dtype or dtype].numpy
                assert array.dtype == stored, module.name
                assert_close(array, stands_for, exact=name_of(kind) != "modelopt-awq")
                seen += 1
    assert seen >= 10


def assert_close(array: np.ndarray, stands_for: np.ndarray, exact: bool) -> None:
    """The numbers, rounded once; where these are products of three factors, two orders of these may differ by a rounding."""
    rounded = stands_for.astype(array.dtype)
    if exact:
        assert np.array_equal(array, rounded)
    else:
        step = np.spacing(np.abs(rounded)).astype(np.float64) if array.dtype != BY_TARGET["bfloat16"].numpy else 2.0**-7
        assert np.all(np.abs(array.astype(np.float64) - rounded.astype(np.float64)) <= step)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if any(module.dtype for module in matrices(name))])
def test_a_router_is_float32(name: str) -> None:
    (router,) = (module for module in matrices(name) if module.dtype)
    assert (router.name.rpartition(".")[2], router.dtype) == ("router", "float32")
    assert router.stored_dtype("float16") == "float32"


def test_formats_of_rows_can_hold_one() -> None:
    gate = next(module for module in matrices("qwen_moe") if module.out == "1")
    held = {key for key, kind in FORMATS.items() if has_form(gate, kind)}
    assert {"modelopt fp8", "compressed fp8", "compressed fp8 dynamic", "compressed w8a8", "fbgemm", "gguf"} <= held
    assert held.isdisjoint({"gptq", "awq", "modelopt awq"})


def test_each_format_is_tried() -> None:
    tried: set[Any] = {name_of(kind) for kind in FORMATS.values()}
    assert tried == {each.name for each in formats()}
