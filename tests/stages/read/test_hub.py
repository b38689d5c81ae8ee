"""The cache by itself, laid out by hand: which directory is found, and what is said where it lacks files. Nothing may connect."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from pipeline.errors import BadInput
from stages.read import hub, open_source
from stages.read.hub_files import USUAL
from tests.support import checkpoints
from tests.support.hub import INDEX, OLD, REPO, SHA, SHARDS, SMALL, command, contents, includes, index, lay


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, which nothing may leave."""
    connected = []

    def refuse(_: socket.socket, address: Any) -> None:
        connected.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield tmp_path / "hub"
    assert not connected


def problem(revision: str | None = None, *, download: bool = False) -> str:
    """The one problem that `find` reports."""
    with pytest.raises(BadInput) as caught:
        hub.find(REPO, revision, download)
    (only,) = caught.value.problems
    assert only.subject == f"{REPO}, revision {revision or 'main'}"
    return str(only)


COMPLETE: dict[str, tuple[str, ...]] = {
    "one file": ("config.json", "model.safetensors"),
    "shards": ("config.json", INDEX, *SHARDS),
    "with companions and others": (*SMALL, INDEX, *SHARDS, "README.md", "consolidated.safetensors"),
    "pickles": ("config.json", "pytorch_model.bin"),
    "Meta": ("params.json", "consolidated.00.pth", "consolidated.01.pth", "tokenizer.model"),
}


@pytest.mark.parametrize("names", COMPLETE.values(), ids=COMPLETE)
@pytest.mark.parametrize("download", [False, True])
def test_a_whole_cache_answers_by_itself(cache: Path, names: tuple[str, ...], download: bool) -> None:
    snapshot = lay(cache, contents(*names))
    assert hub.find(REPO, None, download) == snapshot


def test_metas_folder_is_the_checkpoint_where_nothing_else_is(cache: Path) -> None:
    snapshot = lay(cache, contents("config.json", "original/params.json", "original/consolidated.00.pth"))
    assert hub.find(REPO, None, False) == snapshot / "original"


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "refs/pr/7", SHA])
def test_revisions_of_the_cache(cache: Path, revision: str | None) -> None:
    lay(cache, contents("config.json", "model.safetensors"), sha=OLD, refs=("old",))
    snapshot = lay(cache, contents("config.json", "model.safetensors", "README.md"), refs=("main", "v1.0", "refs/pr/7"))
    assert hub.find(REPO, revision, False) == snapshot
    assert hub.find(REPO, "old", False).name == hub.find(REPO, OLD, False).name == OLD


def test_what_is_found_opens_as_a_checkpoint(cache: Path, tmp_path: Path) -> None:
    tensors = checkpoints.write(tmp_path / "model", checkpoints.LLAMA, shards=2)
    lay(cache, {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()})
    source = open_source(hub.find(REPO, None, False))
    assert source.tensors.keys() == tensors.keys()


def test_safetensors_are_chosen_though_pickles_are_whole(cache: Path) -> None:
    lay(cache, contents("config.json", INDEX, SHARDS[0], "pytorch_model.bin"))
    assert SHARDS[1] in problem()


def test_a_shard_that_is_missing(cache: Path) -> None:
    lay(cache, contents("config.json", INDEX, SHARDS[0]))
    said = problem()
    assert f"found no {SHARDS[1]} in the cache {cache};" in said
    # By the commit: `main` may be another one by now, of which the cache holds nothing.
    assert command(said) == ["hf", "download", REPO, "--revision", SHA, *includes(SHARDS[1])]


def test_a_link_whose_blob_is_gone_is_missing(cache: Path) -> None:
    snapshot = lay(cache, contents("config.json", INDEX, *SHARDS))
    (snapshot / SHARDS[0]).resolve().unlink()
    assert f"found no {SHARDS[0]} in" in problem()


def test_a_configuration_that_is_missing(cache: Path) -> None:
    lay(cache, contents("model.safetensors"))
    assert "found no config.json in" in problem()


def test_many_missing_shards_are_one_pattern(cache: Path) -> None:
    shards = tuple(f"model-{n:05}-of-00030.safetensors" for n in range(1, 31))
    lay(cache, contents("config.json", INDEX, shards[4], shards=shards))
    said = problem()
    assert f"found no {', '.join(shards[:4])} and 25 more in" in said
    assert command(said)[5:] == includes("model-*-of-00030.safetensors")


def test_nothing_cached(cache: Path) -> None:
    said = problem("v2")
    assert f"found nothing of it in the cache {cache};" in said
    assert command(said) == ["hf", "download", REPO, "--revision", "v2", *includes(*USUAL)]


def test_a_configuration_alone(cache: Path) -> None:
    lay(cache, contents(*SMALL))
    said = problem()
    assert "found no weights of it in" in said
    assert "pytorch_model*.bin" in said


@pytest.mark.parametrize("revision", ["v2", OLD, "../../../etc", "/etc/passwd", "nul\0", "x" * 5000])
def test_a_revision_that_the_cache_does_not_have(cache: Path, revision: str) -> None:
    lay(cache, contents("config.json", "model.safetensors"))
    assert "found nothing of it in" in problem(revision)


@pytest.mark.parametrize("text", ["", "../../../..", "main", SHA[:10], "\udcff"])
def test_a_ref_that_is_no_commit(cache: Path, text: str) -> None:
    lay(cache, contents("config.json", "model.safetensors"))
    (cache / "models--org--name/refs/main").write_bytes(text.encode(errors="surrogateescape"))
    assert "found nothing of it in" in problem()


@pytest.mark.parametrize("content", [b"", b"[]", b'{"weight_map": 3}', b'{"weight_map": {"a": 1}}', b"[" * 99999, b"\xff"])
def test_an_index_that_is_none_is_left_to_the_source(cache: Path, content: bytes) -> None:
    snapshot = lay(cache, {**contents("config.json"), INDEX: content})
    assert hub.find(REPO, None, False) == snapshot


@pytest.mark.parametrize("shard", ["../../../secret", "/etc/nothing", "x" * 5000, "nul\0"])
def test_an_index_that_leads_out(cache: Path, shard: str) -> None:
    lay(cache, {**contents("config.json"), INDEX: index(shard)})
    assert "found no " in problem()


def test_parts_of_meta_that_are_missing(cache: Path) -> None:
    lay(cache, contents("consolidated.01.pth", "consolidated.03.pth"))
    assert "found no params.json, consolidated.00.pth, consolidated.02.pth in" in problem()


def test_offline_it_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    said = problem(download=True)
    assert f"found HF_HUB_OFFLINE set and nothing of it in the cache {cache};" in said
    assert command(said)[:3] == ["hf", "download", REPO]
    snapshot = lay(cache, contents("config.json", "model.safetensors"))
    assert hub.find(REPO, None, True) == snapshot
