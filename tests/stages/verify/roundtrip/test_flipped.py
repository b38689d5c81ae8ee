"""A byte that is another than was written is found, wherever it is: by its checksum, and where there is none by its value, which C
and NumPy name alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import convert
from pipeline.native import VARIABLE
from pipeline.reporting.one_reading import MatchedSource, match
from pipeline.tensor.checkpoint import Checkpoint
from pipeline.tensor.tensors import tensor_bytes
from stages.read import open_source
from stages.read.ranks import open_checkpoint
from stages.verify.roundtrip import comparison
from stages.verify.roundtrip.findings import FiguresByTensor
from stages.verify.roundtrip.kept_codes import compare_columns
from stages.verify.roundtrip.one_pass import one_pass
from stages.verify.roundtrip.walk import PartChecked, check_part, tensor_parts
from tests.support import act_ranges, checkpoints, quantized_checkpoints
from tests.support.built_kernels import BUILT_CHECKS, needs_module
from tests.support.examples import examples

KERNELS = ["numpy", *(["c"] if BUILT_CHECKS else [])]
# Of a format, its source, the options, and the bits of a byte of its weights that no rounding explains.
FORMATS: dict[str, tuple[quantized_checkpoints.Format | None, dict[str, Any], int]] = {
    "dense": (None, {}, 0x01),
    "cast": (None, {"dtype": "float16"}, 0x01),
    "int8": (None, {"use_weight_only": True}, 0x80),
    "int8 for Hopper": (None, {"use_weight_only": True, "sm": 90}, 0x80),
    "int4": (None, {"use_weight_only": True, "weight_only_precision": "int4"}, 0x88),
    "int4 for Blackwell": (None, {"use_weight_only": True, "weight_only_precision": "int4", "sm": 100}, 0x88),
    "float8 by row": (None, {"use_fp8_rowwise": True}, 0x40),
    "float8": (quantized_checkpoints.compressed_float8(dynamic=False), {}, 0x40),
    "GPTQ": (quantized_checkpoints.gptq(sym=False), {}, 0x11),
    "AWQ": (quantized_checkpoints.awq(), {}, 0x11),
    "pack-quantized": (quantized_checkpoints.compressed(), {}, 0x11),
    "GPTQ quantized again": (quantized_checkpoints.gptq(sym=False), {"requantize": True}, 0x88),
    "ModelOpt's AWQ": (quantized_checkpoints.modelopt_awq(), {}, 0x11),
    "float8, measured": (None, {"use_fp8": True}, 0x40),
    "NVFP4": (quantized_checkpoints.nvfp4(alike=False), {}, 0x44),
    "GPTQ of 8 bits": (quantized_checkpoints.gptq(bits=8, sym=False), {}, 0x01),
    "int8 of a source": (quantized_checkpoints.compressed_int8(), {"use_weight_only": True}, 0x01),
}
each_format = pytest.mark.parametrize("name", FORMATS)
Opened = tuple[Checkpoint, MatchedSource]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Opened]:
    folder, made = tmp_path_factory.mktemp("flipped"), {}
    config = {**quantized_checkpoints.LLAMA, "num_hidden_layers": 1}
    checkpoints.write(folder / "model", {**config, "torch_dtype": "bfloat16"})
    ranges = act_ranges.write(folder / "ranges", checkpoints.values(config))
    for name, (kind, options, _) in FORMATS.items():
        source, output = folder / ("model" if kind is None else name), folder / f"{name} ranks"
        if kind is not None:
            quantized_checkpoints.write(source, config, kind)
        more = {} if kind is None else kind.flags
        more = {**more, "act_range": ranges} if "measured" in name else more
        convert(model_dir=source, output_dir=output, tp_size=2, scheduler="synchronous", **{**more, **options})
        checkpoint = open_checkpoint(output)
        made[name] = checkpoint, match(checkpoint, open_source(source))
    return made


@contextmanager
def flipped(checkpoint: Checkpoint, rank: int, name: str, byte: int, mask: int) -> Iterator[None]:
    """Some bits of one byte of a tensor are others."""
    tensor: Any = checkpoint.ranks[rank][name]
    with Path(tensor.path).open("r+b") as file:
        file.seek(tensor.offset + byte)
        (before,) = file.read(1)

        def write(value: int) -> None:
            file.seek(tensor.offset + byte)
            file.write(bytes([value]))
            file.flush()

        write(before ^ mask)
        try:
            yield
        finally:
            write(before)


def checked(opened: Opened, name: str, kernels: str, sums: bool) -> list[PartChecked]:
    checkpoint, matched = opened
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, kernels)
        parts = [part for part in tensor_parts(checkpoint, matched.original, matched.origins) if part.name == name]
        some = parts if sums else [replace(part, sums=tuple(() for _ in part.sums)) for part in parts]
        return [each for part in some for each in check_part(checkpoint, matched.original, matched.kept, part)]


@each_format
@examples(4)
@given(data=st.data())
def test_its_checksum_finds_it(name: str, outputs: dict[str, Opened], data: st.DataObject) -> None:
    checkpoint = outputs[name][0]
    rank = data.draw(st.integers(0, 1))
    tensor = data.draw(st.sampled_from(sorted(checkpoint.ranks[rank])))
    byte = data.draw(st.integers(0, tensor_bytes(checkpoint.ranks[rank][tensor]) - 1))
    with flipped(checkpoint, rank, tensor, byte, data.draw(st.integers(1, 255))):
        for kernels in KERNELS:
            wrong = [(each.rank, each.name) for each in checked(outputs[name], tensor, kernels, True) if each.problem]
            assert wrong == [(rank, tensor)], kernels


@each_format
@examples(6)
@given(data=st.data())
def test_its_value_finds_it_and_is_named(name: str, outputs: dict[str, Opened], data: st.DataObject) -> None:
    checkpoint, matched = outputs[name]
    rank = data.draw(st.integers(0, 1))
    modules = {
        f"{tensor.removesuffix('.per_channel_scale').removesuffix('.weights_scaling_factor')}.weight"
        for tensor in checkpoint.ranks[rank]
        if tensor.endswith(("per_channel_scale", "weights_scaling_factor"))
    }
    tensor = data.draw(st.sampled_from(sorted(modules or {origin.tensor for origin in matched.origins if origin.rank == rank})))
    byte = data.draw(st.integers(0, tensor_bytes(checkpoint.ranks[rank][tensor]) - 1))
    found = []
    for damaged in (False, True):
        with flipped(checkpoint, rank, tensor, byte, FORMATS[name][2] if damaged else 0):
            for kernels in KERNELS:
                figures = FiguresByTensor()
                for each in checked(outputs[name], tensor, kernels, False):
                    assert each.problem is None
                    assert each.figures is not None
                    figures.add({(each.rank, each.name): each.figures})
                problems = figures.problems(checkpoint)
                assert [problem.subject for problem in problems] == ([f"rank{rank}.safetensors: {tensor}"] if damaged else [])
                found += problems
    assert all(problem == found[0] for problem in found), found


@needs_module
@each_format
def test_c_confirms_what_is_right(name: str, outputs: dict[str, Opened], monkeypatch: pytest.MonkeyPatch) -> None:
    """No value of these formats is left to NumPy, but for those that the kernels do not know: 4-bit floats, and factors beside."""
    checkpoint, matched = outputs[name]
    confirmed: list[bool] = []

    def counting(work: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            found = work(*arguments)
            confirmed.append(found is not None)
            return found

        return counted

    monkeypatch.setattr(comparison, "one_pass", counting(one_pass))
    monkeypatch.setattr(comparison, "compare_columns", counting(compare_columns))
    for tensor in {origin.tensor for origin in matched.origins}:
        checked(outputs[name], tensor, "c", False)
    unknown = any(tensor.endswith(("prequant_scaling_factor", "weights_scaling_factor_2")) for tensor in checkpoint.ranks[0])
    assert (name in ("dense", "cast")) == (confirmed == [])
    assert all(confirmed) or unknown
