"""Directories that a conversion has made, and takes away again: never what others have put there meanwhile."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline import BadInput, convert
from pipeline.sinks.reserve import missing, unmake
from pipeline.watching.listener import Silent
from tests.support import checkpoints
from tests.support.directories import contents


@pytest.mark.parametrize("others", ["", "a", "a/b", "a/b/c"])
def test_what_was_made_goes_up_to_what_others_have_there(tmp_path: Path, others: str) -> None:
    directory = tmp_path / "a/b/c/d"
    created = missing(directory)
    assert created == tmp_path / "a"
    directory.mkdir(parents=True)
    (directory / "file").touch()
    if others:
        (tmp_path / others / "theirs").touch()
    unmake(directory, created)
    assert not directory.exists()
    assert sorted(path.name for path in tmp_path.rglob("*")) == (sorted([*others.split("/"), "theirs"]) if others else [])


def test_what_was_there_before_stays(tmp_path: Path) -> None:
    assert missing(tmp_path) is None
    unmake(tmp_path, None)
    assert tmp_path.is_dir()


@pytest.mark.parametrize("scratch", ["none", "unpack"])
def test_a_conversion_that_is_given_up_takes_no_other_one_along(tmp_path: Path, scratch: str) -> None:
    """It has made the directory that both are in, and of scratch, too; the other one is done before it meets a value of no code."""
    config = {**checkpoints.LLAMA, "intermediate_size": 192}
    tensors = checkpoints.values(config, 0)
    checkpoints.save(tmp_path / "good", config, tensors)
    name = "model.layers.1.mlp.down_proj.weight"
    checkpoints.save(tmp_path / "bad", config, {**tensors, name: np.full_like(tensors[name], np.nan)})
    cuts = {"scratch": tmp_path / "scratch/of/all", "scratch_after": scratch}

    def other() -> None:
        keep = {**cuts, "keep_scratch": True} if scratch != "none" else cuts
        convert(model_dir=tmp_path / "good", output_dir=tmp_path / "ranks/all/b", scheduler="threads", **keep)

    class Meanwhile(Silent):
        def started(self, *_: object) -> None:
            other()

    options = {"model_dir": tmp_path / "bad", "output_dir": tmp_path / "ranks/all/a", "use_weight_only": True, **cuts}
    with pytest.raises(BadInput, match="NaN"):
        convert(**options, scheduler="synchronous", listener=Meanwhile())
    there = contents(tmp_path / "ranks/all/b")
    assert [path.name for path in (tmp_path / "ranks/all").iterdir()] == ["b"]
    kept = list((tmp_path / "scratch").rglob("*.zarr"))
    assert len(kept) == (scratch != "none")
    convert(model_dir=tmp_path / "good", output_dir=tmp_path / "alone", scheduler="threads")
    assert there == contents(tmp_path / "alone")
