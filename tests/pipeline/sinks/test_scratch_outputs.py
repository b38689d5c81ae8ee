"""Cuts that are kept for some outputs: whoever completes the last of them removes the cut, also another batch's conversion."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipeline import BadInput, convert
from pipeline.sinks.journal import Journal
from tests.support import quantized_checkpoints
from tests.support.directories import contents

Convert = Callable[..., Any]


@pytest.fixture(params=["local", "remote"])
def scratch(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / ".headrace-scratch") if request.param == "local" else f"memory://{tmp_path.name}"


@pytest.fixture
def job(tmp_path: Path, scratch: str) -> Convert:
    """A conversion of a packed source to the directory of a name, for the outputs of some names."""
    quantized_checkpoints.write(tmp_path / "model", quantized_checkpoints.LLAMA, quantized_checkpoints.gptq())

    def converted(name: str, outputs: str = "", **more: Any) -> Any:
        cut: dict[str, Any] = {"scratch": scratch, "scratch_after": "unpack", "keep_scratch": bool(outputs)}
        places = [tmp_path / each for each in outputs]
        options: dict[str, Any] = {"model_dir": tmp_path / "model", "output_dir": tmp_path / name, "scheduler": "threads"}
        return convert(**options, **cut, scratch_outputs=places, **more)

    return converted


def cuts(scratch: str) -> list[str]:
    if "://" in scratch:
        return list(fsspec.filesystem("memory").find(scratch.removeprefix("memory:/")))
    return [path.name for path in Path(scratch).iterdir()] if Path(scratch).exists() else []


def test_it_goes_with_the_last_of_its_outputs(job: Convert, scratch: str, tmp_path: Path) -> None:
    assert "unpack" in job("x", "xyz").stages
    assert cuts(scratch)
    assert "unpack" not in job("y", "xyz", sync=True).stages
    assert cuts(scratch)
    assert "unpack" not in job("z", "xyz", tp_size=2).stages
    assert cuts(scratch) == []
    assert not (tmp_path / ".headrace-scratch").exists()
    assert contents(tmp_path / "x") == contents(tmp_path / "y")


def test_one_that_is_up_to_date_may_be_the_last(job: Convert, scratch: str) -> None:
    job("y", "xy")
    job("x")  # one that keeps nothing leaves what others keep, until all of these are whole
    assert cuts(scratch) == []
    job("y", "xy", overwrite=True)
    assert cuts(scratch) == [], "x is whole, and y"


def test_another_batch_joins_with_outputs_of_its_own(job: Convert, scratch: str) -> None:
    job("x", "xy")
    assert "unpack" not in job("z", "zw").stages
    assert cuts(scratch)
    job("y", "xy")
    assert cuts(scratch), "w is not there"
    job("w", "zw")
    assert cuts(scratch) == []


def test_one_that_only_reads_does_not_take_it_from_those_that_wait_for_it(job: Convert, scratch: str) -> None:
    job("x", "xy")
    assert "unpack" not in job("z").stages
    assert cuts(scratch)
    job("y", "xy")
    assert cuts(scratch) == []


def test_an_output_that_is_being_written_is_not_whole(job: Convert, scratch: str, tmp_path: Path) -> None:
    job("y", "xyw")
    job("w", "xyw")
    journal = Journal(tmp_path / "y/headrace.json.partial")  # as of a conversion that is made anew
    job("x", "xyw")
    assert cuts(scratch)
    with pytest.raises(BadInput, match="another job"):
        job("y", "xyw", overwrite=True)
    journal.remove()
    job("x", "xyw")  # up to date
    assert cuts(scratch) == []


def test_what_is_kept_for_good_stays(job: Convert, scratch: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "model_dir": tmp_path / "model",
        "scheduler": "threads",
        "scratch": scratch,
        "scratch_after": "unpack",
    }
    convert(output_dir=tmp_path / "kept", keep_scratch=True, **options)
    job("x")
    assert cuts(scratch)
