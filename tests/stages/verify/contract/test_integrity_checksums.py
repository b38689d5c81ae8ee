"""integrity: a changed byte is found by its tensor's name, headrace.json must fit the files, and nothing may be left over."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import convert
from pipeline.errors import Problem
from pipeline.planning import make_plan as planning
from stages.read.ranks import open_checkpoint
from stages.verify.contract import integrity
from stages.verify.contract.integrity import check_tensor, checksums, headers
from tests.stages.verify.contract.test_contract_config import VALUES
from tests.support import checkpoints


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks of a model whose vocabulary is padded; its larger tensors were written in several parts."""
    folder = tmp_path_factory.mktemp("converted")
    checkpoints.write(folder / "model", {**checkpoints.LLAMA, "vocab_size": 97, "num_hidden_layers": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "block_bytes", lambda _: 4_000)
        convert(model_dir=folder / "model", output_dir=folder / "ranks", tp_size=2, scheduler="synchronous")
    return folder / "ranks"


@pytest.fixture
def ranks(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may harm."""
    return Path(shutil.copytree(original, tmp_path / "ranks"))


def wrong_bytes(directory: Path) -> list[Problem]:
    checkpoint = open_checkpoint(directory)
    checked = (check_tensor(checkpoint, rank, name) for rank, name, _ in checksums(checkpoint))
    return [problem for problem in checked if problem]


def edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> list[Problem]:
    """Change headrace.json, and say what is wrong with it."""
    path = directory / "headrace.json"
    provenance = json.loads(path.read_text())
    change(provenance)
    path.write_text(json.dumps(provenance))
    return list(headers(open_checkpoint(directory)))


def test_a_conversion_is_what_it_says(original: Path) -> None:
    checkpoint = open_checkpoint(original)
    assert list(headers(checkpoint)) == []
    assert wrong_bytes(original) == []
    sums = list(checksums(checkpoint))
    assert sorted((rank, name) for rank, name, _ in sums) == sorted(
        (n, name) for n, rank in enumerate(checkpoint.ranks) for name in rank
    )
    sizes = [path.stat().st_size for path in original.glob("rank*.safetensors")]
    assert 0 < sum(sizes) - sum(nbytes for *_, nbytes in sums) < 10_000, "all but the files' headers"
    table = checkpoint.provenance["xxh3"]
    assert max(len(parts) for sums in table.values() for parts in sums.values()) > 2


@pytest.mark.parametrize("piece", [100, 4 << 20])
def test_each_changed_byte_is_found(piece: int, ranks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every tensor of a file, at its first byte, its last and one between; the padding of lm_head too."""
    monkeypatch.setattr(integrity, "PIECE_BYTES", piece)
    path = ranks / "rank1.safetensors"
    for name, tensor in open_checkpoint(ranks).ranks[1].items():
        offset, nbytes = tensor.offset, int(np.prod(tensor.shape)) * tensor.dtype.itemsize
        for at in {0, nbytes // 3, nbytes - 1}:
            with path.open("r+b") as file:
                file.seek(offset + at)
                (byte,) = file.read(1)
                file.seek(offset + at)
                file.write(bytes([byte ^ 1]))
            (problem,) = wrong_bytes(ranks)
            assert problem.subject == f"rank1.safetensors: {name}"
            first, last = (int(part.replace(",", "")) for part in problem.found.rpartition("bytes ")[2].split(" to "))
            assert first <= at < last <= nbytes
            with path.open("r+b") as file:
                file.seek(offset + at)
                file.write(bytes([byte]))
    assert wrong_bytes(ranks) == []


def test_a_check_runs_as_a_task_elsewhere(ranks: Path) -> None:
    task = pickle.dumps((check_tensor, (open_checkpoint(ranks), 0, "lm_head.weight")))
    with (ranks / "rank0.safetensors").open("r+b") as file:
        file.seek(open_checkpoint(ranks).ranks[0]["lm_head.weight"].offset)
        file.write(b"\xff\xff\xff\xff")
    function, arguments = pickle.loads(task)
    assert function(*arguments).subject == "rank0.safetensors: lm_head.weight"


def test_a_file_that_has_become_shorter(ranks: Path) -> None:
    checkpoint = open_checkpoint(ranks)
    with (ranks / "rank0.safetensors").open("r+b") as file:
        file.truncate(2_000)
    problems = [check_tensor(checkpoint, rank, name) for rank, name, _ in checksums(checkpoint)]
    shorter = [problem for problem in problems if problem]
    assert shorter
    assert all("shorter" in problem.found and problem.subject.startswith("rank0.safetensors: ") for problem in shorter)


# --- headrace.json

NORM = "transformer.ln_f.weight"


def sums(provenance: dict[str, Any], rank: int = 1) -> dict[str, Any]:
    found: dict[str, Any] = provenance["xxh3"][f"rank{rank}.safetensors"]
    return found


@pytest.mark.parametrize(
    ("change", "subject", "said"),
    [
        (lambda p: p.pop("xxh3"), "headrace.json: xxh3", "null"),
        (lambda p: p.update(xxh3=[1]), "headrace.json: xxh3", "[1]"),
        (lambda p: p["xxh3"].pop("rank1.safetensors"), "rank1.safetensors", "no checksums"),
        (lambda p: p["xxh3"].update({"rank1.safetensors": 5}), "rank1.safetensors", "no checksums"),
        (lambda p: p["xxh3"].update({"rank2.safetensors": {}}), "headrace.json: xxh3 of 'rank2.safetensors'", "no rank file"),
        (lambda p: sums(p).pop(NORM), f"rank1.safetensors: {NORM}", "no checksum"),
        (lambda p: sums(p).update({"other.weight": []}), "rank1.safetensors: other.weight", "no such tensor"),
        (lambda p: sums(p).update({NORM: []}), f"rank1.safetensors: {NORM}", "[]"),
        (lambda p: sums(p).update({NORM: "0123456789abcdef"}), f"rank1.safetensors: {NORM}", "0123456789abcdef"),
        (lambda p: sums(p).update({NORM: [[128]]}), f"rank1.safetensors: {NORM}", "[[128]]"),
        (lambda p: sums(p)[NORM][0].__setitem__(0, 126), f"rank1.safetensors: {NORM}", "126"),
        (lambda p: sums(p)[NORM][0].__setitem__(0, 128.0), f"rank1.safetensors: {NORM}", "128.0"),
        (lambda p: sums(p)[NORM][0].__setitem__(1, "xyz"), f"rank1.safetensors: {NORM}", "xyz"),
        (lambda p: sums(p)[NORM].extend([[-2, "0" * 16], [2, "0" * 16]]), f"rank1.safetensors: {NORM}", "-2"),
        (lambda p: p["options"].update(sm=88), "headrace.json: options.sm", "88"),
        (lambda p: p.update(options=[]), "headrace.json: options.sm", "null"),
        (lambda p: p.update(left_out=None), "headrace.json: left_out", "null"),
        (lambda p: p.update(notes=5), "headrace.json: notes", "5"),
    ],
)
def test_what_does_not_fit_the_files(change: Callable[[dict[str, Any]], object], subject: str, said: str, ranks: Path) -> None:
    (problem,) = edit(ranks, change)
    assert problem.subject == subject
    assert said in problem.found
    # What is left of it is still of use, and a broken entry does not raise.
    assert wrong_bytes(ranks) == []


def test_another_checksum_is_another_tensor(ranks: Path) -> None:
    assert edit(ranks, lambda provenance: sums(provenance)[NORM][0].__setitem__(1, "0" * 16)) == []
    (problem,) = wrong_bytes(ranks)
    assert problem.subject == f"rank1.safetensors: {NORM}"
    assert problem.expected == "the xxh3 0000000000000000 of headrace.json"


def test_a_checkpoint_without_headrace_json_has_no_checksums(ranks: Path) -> None:
    (ranks / "headrace.json").unlink()
    checkpoint = open_checkpoint(ranks)
    assert list(headers(checkpoint)) == []
    assert list(checksums(checkpoint)) == []
    assert check_tensor(checkpoint, 0, NORM) is None
    # But an empty one is no headrace.json.
    (ranks / "headrace.json").write_text("{}")
    assert [problem.subject for problem in headers(open_checkpoint(ranks))] == ["headrace.json: xxh3"]


@given(st.dictionaries(st.sampled_from(["xxh3", "options", "id", "left_out", "notes"]), VALUES, min_size=1))
def test_no_headrace_json_makes_it_raise(original: Path, provenance: dict[str, Any]) -> None:
    checkpoint = replace(open_checkpoint(original), provenance=provenance)
    assert list(headers(checkpoint))
    assert list(checksums(checkpoint)) == []


# --- files that are left over


@pytest.mark.parametrize(
    "name",
    [
        "rank2.safetensors",
        "rank7.safetensors",
        "rank01.safetensors",
        "rank0.safetensors.partial",
        "headrace.json.partial",
        "config.json.new",
    ],
)
def test_files_of_another_run(name: str, ranks: Path) -> None:
    (ranks / name).write_bytes((ranks / "rank0.safetensors").read_bytes())
    (problem,) = headers(open_checkpoint(ranks))
    assert problem.subject == name


def test_other_files_are_nobodys_business(ranks: Path) -> None:
    for name in ("tokenizer.json", "rank.safetensors", "README.md", "model.safetensors"):
        (ranks / name).write_text("{}")
    assert list(headers(open_checkpoint(ranks))) == []


def test_fewer_ranks_than_the_sizes_say(ranks: Path) -> None:
    """config.json's world_size is what is opened; the other sizes must agree with it."""
    path = ranks / "config.json"
    config = json.loads(path.read_text())
    config["mapping"].update(tp_size=1, moe_tp_size=1)
    path.write_text(json.dumps(config))
    subjects = [problem.subject for problem in headers(open_checkpoint(ranks))]
    assert "config.json: mapping.world_size" in subjects
    assert str(ranks) in subjects
