"""One reading of a rank file serves its checksums and its values, whatever the pieces are that it is read in."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import convert
from pipeline.planning import make_plan as planning
from pipeline.reporting.one_reading import MatchedSource, match
from pipeline.tensor.checkpoint import Checkpoint, FileTensor
from pipeline.tensor.placement import Region, size
from pipeline.tensor.tensors import Block, tensor_bytes
from stages.read import open_source
from stages.read.ranks import open_checkpoint
from stages.verify.roundtrip import comparison, walk
from stages.verify.roundtrip.findings import FiguresByTensor
from stages.verify.roundtrip.walk import check_part, tensor_parts
from tests.support import checkpoints, quantized_checkpoints
from tests.support.built_kernels import needs_module

FLAGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "int8": {"use_weight_only": True},
    "int4": {"use_weight_only": True, "weight_only_precision": "int4"},
    "rowwise": {"use_fp8_rowwise": True},
    "cast": {"dtype": "float16"},
    "gptq": {},
    "gptq bfloat16": {"dtype": "bfloat16"},
    "awq": {},
}


@dataclass(frozen=True)
class Tallied:
    """A rank's tensor that tallies the bytes that are read of it, by name."""

    tensor: FileTensor
    name: str
    read: dict[str, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> np.dtype:
        return self.tensor.dtype

    @property
    def path(self) -> str:
        return self.tensor.path

    def viewed(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        return replace(self, tensor=self.tensor.viewed(shape, dtype))  # type: ignore[arg-type]

    def block(self, region: Region) -> Block:
        self.read[self.name] = self.read.get(self.name, 0) + size(region) * self.dtype.itemsize
        return self.tensor.block(region)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Checkpoint, MatchedSource]]:
    """Two ranks of models whose tensors were written in several parts, each matched with its source."""
    folder, made = tmp_path_factory.mktemp("walked"), {}
    config = {**quantized_checkpoints.LLAMA, "vocab_size": 131, "num_hidden_layers": 1}
    checkpoints.write(folder / "model", {**config, "torch_dtype": "bfloat16"})
    quantized_checkpoints.write(folder / "gptq", config, quantized_checkpoints.gptq(sym=False))
    quantized_checkpoints.write(folder / "awq", config, quantized_checkpoints.awq())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "block_bytes", lambda _: 9_000)
        for kind, flags in FLAGS.items():
            packed = kind.split()[0] if kind.startswith(("gptq", "awq")) else "model"
            source, output = folder / packed, folder / f"{kind} ranks"
            convert(model_dir=source, output_dir=output, tp_size=2, scheduler="synchronous", **flags)
            checkpoint = open_checkpoint(output)
            made[kind] = checkpoint, match(checkpoint, open_source(source))
    return made


def walked(checkpoint: Checkpoint, matched: MatchedSource) -> tuple[FiguresByTensor, int]:
    """The figures of every tensor, and the number of parts that were read."""
    figures, parts = FiguresByTensor(), list(tensor_parts(checkpoint, matched.original, matched.origins))
    for part in parts:
        for checked in check_part(checkpoint, matched.original, matched.kept, part):
            assert checked.problem is None
            if checked.figures is not None:
                figures.add({(checked.rank, checked.name): checked.figures})
    return figures, len(parts)


@pytest.mark.parametrize("kind", FLAGS)
def test_each_byte_is_read_once_and_pieces_change_nothing(kind: str, outputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, matched = outputs[kind]
    assert matched.problems == ()
    whole, count = walked(checkpoint, matched)
    assert whole.problems(checkpoint) == []
    for name, value in (("TASK_BYTES", 1), ("BYTES_AT_ONCE", 700)):
        monkeypatch.setattr(walk, name, value)
    for name, value in (("BLOCK_ELEMENTS", 300), ("ONE_PASS_ELEMENTS", 300), ("BIT_BYTES", 700), ("COLUMNS", 12)):
        monkeypatch.setattr(comparison, name, value)
    monkeypatch.setattr(comparison, "COLUMNS_ELEMENTS", 1)
    read: dict[str, int] = {}
    ranks = [
        {name: Tallied(tensor, f"{n} {name}", read) for name, tensor in rank.items()} for n, rank in enumerate(checkpoint.ranks)
    ]
    pieces, more = walked(replace(checkpoint, ranks=tuple(ranks)), matched)
    assert more > count
    for key, figures in whole.figures.items():
        one, other = pieces.figures[key].summary(), figures.summary()
        assert (one.pop("snr_db") or 0) == pytest.approx(other.pop("snr_db") or 0, rel=1e-5)
        assert one == pytest.approx(other, rel=1e-5), key
    weights = {f"{n} {name}": tensor_bytes(tensor) for n, rank in enumerate(ranks) for name, tensor in rank.items()}
    compared = {f"{origin.rank} {origin.tensor}" for origin in matched.origins}
    assert {name: read[name] for name in compared} == {name: weights[name] for name in compared}
    assert read.keys() == weights.keys()


@needs_module
@pytest.mark.parametrize("kind", ["gptq", "gptq bfloat16", "awq"])
def test_codes_that_were_kept_are_compared_where_they_lie(kind: str, outputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words along columns are not unpacked; only where a value is wrong is it told row by row which it is."""
    checkpoint, matched = outputs[kind]
    asked: list[str] = []
    block = type(matched.original).block
    monkeypatch.setattr(type(matched.original), "block", lambda self, name, *where: asked.append(name) or block(self, name, *where))  # type: ignore[func-returns-value]
    figures, _ = walked(checkpoint, matched)
    assert figures.problems(checkpoint) == []
    packed = [name for name in matched.original.names() if name.endswith("_proj.weight")]
    assert len(packed) == 7
    assert not set(asked) & set(packed)
    name = "transformer.layers.0.mlp.proj.weight"
    data = (
        checkpoint.ranks[1][name]
        .block(tuple((0, n) for n in checkpoint.ranks[1][name].shape))
        .read(tuple((0, n) for n in checkpoint.ranks[1][name].shape))
        .copy()
    )
    data.reshape(-1).view(np.uint8)[700] ^= 0x10
    (part,) = [
        part for part in tensor_parts(checkpoint, matched.original, matched.origins) if part.name == name and 1 in part.ranks
    ]
    comparing = comparison.TensorComparison(
        checkpoint, comparison.SourceRows(matched.original), True, 1, name, part.origins[part.ranks.index(1)]
    )
    comparing.compare(data.reshape(-1).view(np.uint8).reshape(-1, comparing.unit_bytes), 0)
    assert comparing.figures.wrong == 1
    assert asked[-1] == "model.layers.0.mlp.down_proj.weight"


def test_a_source_that_cannot_be_read_is_no_damage_of_the_ranks(outputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, matched = outputs["dense"]
    part = next(part for part in tensor_parts(checkpoint, matched.original, matched.origins) if all(part.origins))
    path = checkpoint.ranks[0][part.name].path
    for place, raised in (("/a/source", True), (path, False)):

        def failing(*_: Any, place: str = place) -> None:
            raise OSError(5, "Input/output error", place)

        monkeypatch.setattr(comparison.TensorComparison, "compare", failing)
        if raised:
            with pytest.raises(OSError, match="/a/source"):
                check_part(checkpoint, matched.original, matched.kept, part)
        else:
            problem = check_part(checkpoint, matched.original, matched.kept, part)[0].problem
            assert problem is not None
            assert problem.subject == f"rank0.safetensors: {part.name}"


def test_ranks_that_hold_the_same_rows_of_the_source_are_read_together(outputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies, and the columns of row-parallel weights: the source is read once for all ranks."""
    checkpoint, matched = outputs["dense"]
    parts = list(tensor_parts(checkpoint, matched.original, matched.origins))
    together = {part.name for part in parts if part.ranks == (0, 1)}
    assert together >= {f"transformer.layers.0.{name}.weight" for name in ("attention.dense", "mlp.proj", "input_layernorm")}
    assert not together & {f"transformer.layers.0.{name}.weight" for name in ("attention.qkv", "mlp.fc", "mlp.gate")}
    asked: list[str] = []
    block = type(matched.original).block
    monkeypatch.setattr(type(matched.original), "block", lambda self, name, *where: asked.append(name) or block(self, name, *where))  # type: ignore[func-returns-value]
    walked(checkpoint, matched)
    assert asked.count("model.layers.0.mlp.down_proj.weight") == asked.count("model.embed_tokens.weight") == 1


def test_a_damaged_rank_is_named_and_the_others_are_not(outputs: Any, tmp_path: Path) -> None:
    checkpoint, matched = outputs["dense"]
    broken = Path(shutil.copytree(checkpoint.directory, tmp_path / "ranks"))
    name = "transformer.layers.0.mlp.proj.weight"
    opened = open_checkpoint(broken)
    with (broken / "rank1.safetensors").open("r+b") as file:
        file.seek(opened.ranks[1][name].offset)  # type: ignore[attr-defined]
        file.write(bytes(4))
    parts = tensor_parts(opened, matched.original, matched.origins)
    results = [each for part in parts for each in check_part(opened, matched.original, matched.kept, part)]
    assert [(each.rank, each.name) for each in results if each.problem] == [(1, name)]


def test_parts_end_with_a_row_and_with_sums_of_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = [(30, "a"), (10, "b"), (25, "c"), (15, "d"), (40, "e")], [(40, "f"), (80, "g")]
    assert [(start, nbytes) for start, nbytes, _ in walk._cut(120, 20, [one])] == [(0, 120)]
    monkeypatch.setattr(walk, "TASK_BYTES", 32)
    cuts = list(walk._cut(120, 20, [one]))
    assert [(start, nbytes, len(sums)) for start, nbytes, (sums,) in cuts] == [(0, 40, 2), (40, 40, 2), (80, 40, 1)]
    assert [each for *_, (sums,) in cuts for each in sums] == one
    assert list(walk._cut(120, 20, [one, two, []])) == [
        (0, 40, (tuple(one[:2]), tuple(two[:1]), ())),
        (40, 80, (tuple(one[2:]), tuple(two[1:]), ())),
    ]
    assert [(start, nbytes) for start, nbytes, _ in walk._cut(100, 20, [[]])] == [(0, 40), (40, 40), (80, 20)]
