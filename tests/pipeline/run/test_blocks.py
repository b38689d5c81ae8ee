"""No choice of blocks, pieces or scheduler changes an output byte."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from distributed import LocalCluster

from pipeline import convert
from pipeline.planning import compose
from pipeline.planning import make_plan as planning
from pipeline.planning.memory import budget
from tests.support import checkpoints, gguf_files
from tests.support.examples import by_night

LLAMA = {**checkpoints.LLAMA, "attention_bias": True, "tie_word_embeddings": True, "vocab_size": 97}
BLOCKS = (1, 3000, 40_000, 1 << 28)
PIECES = (1, 700, 9000, 8 << 20)
SOURCES = ("llama", "mixtral", "gguf", "gguf experts")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    checkpoints.write(folder / "llama", LLAMA, shards=3)
    checkpoints.write(folder / "mixtral", checkpoints.MIXTRAL)
    gguf_files.write(folder / "llama.gguf", checkpoints.LLAMA, checkpoints.values(checkpoints.LLAMA), "Q4_0", parts=2)
    gguf_files.write(folder / "mixtral.gguf", checkpoints.MIXTRAL, checkpoints.values(checkpoints.MIXTRAL), "Q8_0")
    return {
        "llama": folder / "llama",
        "mixtral": folder / "mixtral",
        "gguf": folder / "llama-00001-of-00002.gguf",
        "gguf experts": folder / "mixtral.gguf",
    }


@pytest.fixture(scope="module")
def expected(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What the defaults write: one block and one piece for each of these tiny tensors."""
    return {name: converted(path, tmp_path_factory.mktemp("expected")) for name, path in models.items()}


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as running:
        yield running.scheduler_address


def converted(model: Path, folder: Path, scheduler: str = "synchronous") -> dict[str, bytes]:
    """Every file of a conversion but headrace.json, which says how long it took."""
    convert(model_dir=model, output_dir=folder / "out", tp_size=2, pp_size=2, scheduler=scheduler)
    return {path.name: path.read_bytes() for path in (folder / "out").iterdir() if path.name != "headrace.json"}


def cut(monkeypatch: pytest.MonkeyPatch, block_bytes: int, piece_bytes: int) -> None:
    def chosen(*arguments: Any) -> Any:
        return replace(budget(*arguments), piece_bytes=piece_bytes)

    monkeypatch.setattr(compose, "ROW_MULTIPLE", 1)
    monkeypatch.setattr(planning, "block_bytes", lambda *_: block_bytes)
    monkeypatch.setattr(planning, "budget", chosen)


def test_the_sizes_do_cut(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests below would pass for nothing."""
    counts = []
    for block_bytes in BLOCKS:
        cut(monkeypatch, block_bytes, 1)
        plan = planning.make_plan(planning.Job(model_dir=models["mixtral"], output_dir=tmp_path / "out"))
        counts.append((max(store.arrays[0].npartitions for store in plan.phases[0].stores), plan.tasks))
        assert plan.budget.piece_bytes == 1
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == len(BLOCKS)
    assert counts[0][0] > 8
    assert counts[-1] == (1, 1)


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
@pytest.mark.parametrize("source", by_night(SOURCES, ["llama", "gguf"]))
def test_blocks_and_pieces_of_any_size(
    source: str,
    scheduler: str,
    models: dict[str, Path],
    expected: dict[str, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for number, (block_bytes, piece_bytes) in enumerate(itertools.product(BLOCKS, PIECES)):
        # Threads differ in the order of tasks alone: a diagonal of the sizes will do.
        if scheduler == "threads" and number % 5:
            continue
        cut(monkeypatch, block_bytes, piece_bytes)
        assert converted(models[source], tmp_path / str(number), scheduler) == expected[source], (block_bytes, piece_bytes)


@pytest.mark.parametrize("source", by_night(SOURCES, ["mixtral"]))
def test_on_the_cluster_in_this_process(
    source: str, models: dict[str, Path], expected: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(monkeypatch, 3000, 700)
    assert converted(models[source], tmp_path, "local") == expected[source]


@pytest.mark.parametrize("source", by_night(SOURCES, ["gguf"]))
def test_on_a_cluster_of_other_processes(
    source: str,
    cluster: str,
    models: dict[str, Path],
    expected: dict[str, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut(monkeypatch, 3000, 700)
    assert converted(models[source], tmp_path, cluster) == expected[source]
