"""Scratch behind a URL: the same bytes, and chunks that plain zarr reads."""

from __future__ import annotations

import sys
from pathlib import Path

import fsspec
import pytest
import zarr

from pipeline import BadInput, convert, plan
from tests.support import checkpoints
from tests.support.directories import contents


@pytest.mark.parametrize("after", ["read", "rename", "unpack", "read,unpack", "shard", "unpack,shard"])
@pytest.mark.parametrize("config", [checkpoints.LLAMA, checkpoints.MIXTRAL], ids=["llama", "mixtral"])
def test_the_same_bytes(config: dict, after: str, tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", {**config, "torch_dtype": "bfloat16"})
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "plain", tp_size=4, scheduler="threads")
    url = f"memory://{tmp_path.name}"
    options = {"model_dir": tmp_path / "model", "tp_size": 4, "scheduler": "threads", "scratch": url, "scratch_after": after}
    convert(output_dir=tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
    assert not fsspec.filesystem("memory").find(f"/{tmp_path.name}"), "scratch is removed after success"


@pytest.mark.parametrize("after", ["read", "shard"])
def test_blocks_of_several_pieces_are_put_whole(after: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 6001, "hidden_size": 1024, "num_hidden_layers": 1, "intermediate_size": 64, "torch_dtype": "bfloat16"}
    checkpoints.write(tmp_path / "model", {**checkpoints.LLAMA, **sizes})
    options = {"model_dir": tmp_path / "model", "tp_size": 2, "use_parallel_embedding": True, "scheduler": "threads"}
    convert(output_dir=tmp_path / "plain", **options)
    convert(output_dir=tmp_path / "out", scratch=f"memory://{tmp_path.name}", scratch_after=after, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


def test_a_kept_cut_is_reused(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    options = {"model_dir": tmp_path / "model", "scheduler": "threads", "scratch": "memory://kept", "scratch_after": "read"}
    convert(output_dir=tmp_path / "one", keep_scratch=True, **options)
    (cut,) = plan(output_dir=tmp_path / "two", tp_size=2, **options).summary()["scratch"]
    assert cut["reused"]
    held = zarr.open_group(cut["path"], mode="r")
    assert {name: held[name][:].tobytes() for name in source} == {name: values.tobytes() for name, values in source.items()}
    convert(output_dir=tmp_path / "two", tp_size=2, **options)
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "plain", tp_size=2, scheduler="threads")
    assert contents(tmp_path / "two") == contents(tmp_path / "plain")


@pytest.mark.parametrize("url", ["nowhere://b/x", "gs://b/x"])
def test_a_store_that_nothing_here_can_write_is_refused_by_the_plan(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    for command in (plan, convert):
        with pytest.raises(BadInput, match=f"--scratch {url}: found .*; expected a store that fsspec can write"):
            command(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scratch=url, scratch_after="unpack")
    assert not (tmp_path / "out").exists()
