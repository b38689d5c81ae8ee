"""Several targets from one read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline import BadInput, convert, plan
from pipeline.cli import app
from tests.support import checkpoints
from tests.support.directories import contents, values_bytes

SHAPES: dict[str, dict[str, Any]] = {
    "tp1": {"tp_size": 1},
    "tp4": {"tp_size": 4, "dtype": "bfloat16"},
    "pp3": {"tp_size": 2, "pp_size": 3, "use_parallel_embedding": True, "write_rope_buffers": True},
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA | {"tie_word_embeddings": True, "vocab_size": 97}, shards=2)
    return tmp_path / "model"


def tables(directory: Path) -> list[dict[str, Any]]:
    return [{"output_dir": directory / name, **shape} for name, shape in SHAPES.items()]


@pytest.mark.parametrize("after", ["none", "read", "unpack", "shard"])
def test_each_target_equals_its_own_conversion(source: Path, after: str, tmp_path: Path) -> None:
    result = convert(model_dir=source, target=tables(tmp_path / "all"), scheduler="threads", scratch_after=after)
    for name, shape in SHAPES.items():
        convert(model_dir=source, output_dir=tmp_path / name, scheduler="threads", **shape)
        assert contents(tmp_path / "all" / name) == contents(tmp_path / name)
    made = plan(model_dir=source, target=tables(tmp_path / "all"), scratch_after=after)
    assert result.bytes_written == made.bytes_written
    # A vocabulary of 97 is padded where it is split, and padding is reserved, not written.
    assert 0 <= values_bytes(tmp_path / "all") - result.bytes_written < 1024


def test_the_source_is_read_once(source: Path, tmp_path: Path) -> None:
    alone = convert(model_dir=source, output_dir=tmp_path / "one", scheduler="threads")
    together = plan(model_dir=source, target=tables(tmp_path / "all"))
    assert together.bytes_read == alone.bytes_read == sum(store.source_bytes for store in together.phases[-1].stores)


def test_a_finished_target_is_left_alone(source: Path, tmp_path: Path) -> None:
    options = {"model_dir": source, "target": tables(tmp_path / "all"), "scheduler": "threads"}
    convert(**options)
    assert convert(**options).up_to_date
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "all/tp1").iterdir()}
    shutil.rmtree(tmp_path / "all/tp4")
    assert not convert(**options).up_to_date
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "all/tp1").iterdir()}
    convert(model_dir=source, output_dir=tmp_path / "tp4", scheduler="threads", **SHAPES["tp4"])
    assert contents(tmp_path / "all/tp4") == contents(tmp_path / "tp4")
    alone, beside = (json.loads((tmp_path / at / "headrace.json").read_text())["xxh3"] for at in ("tp4", "all/tp4"))
    assert alone == beside


def test_a_job_file_lists_targets_and_flags_override_them(source: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    job.write_text(
        'model_dir = "model"\ndtype = "bfloat16"\n'
        '[[target]]\noutput_dir = "a"\ntp_size = 2\n'
        '[[target]]\noutput_dir = "b"\ntp_size = 4\ndtype = "float16"\n'
        '[scratch]\nafter = ["unpack"]\ndir = "scratch"\n'
    )
    planned = plan(job)
    assert [(target.options.tp_size, target.dtype) for target in planned.targets] == [(2, "bfloat16"), (4, "float16")]
    assert [cut.directory.parent for cut in planned.scratch] == [tmp_path / "scratch"]
    result = CliRunner().invoke(
        app, ["convert", str(job), "--dtype", "float32", "--scheduler", "threads", "--quiet"], catch_exceptions=False
    )
    assert result.exit_code == 0
    for name, tp_size in (("a", 2), ("b", 4)):
        convert(model_dir=source, output_dir=tmp_path / f"{name}-alone", tp_size=tp_size, dtype="float32", scheduler="threads")
        assert contents(tmp_path / name) == contents(tmp_path / f"{name}-alone")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ([{"tp_size": 2}], "output_dir: found nothing"),
        ([{"output_dir": "a"}, {"output_dir": "a"}], "two targets"),
        ([{"output_dir": "a", "tp": 2}], "an option that headrace does not have"),
        ([{"output_dir": "a", "tp_size": 0}], "tp_size"),
        ([{"output_dir": "a", "tp_size": 3}, {"output_dir": "b", "pp_size": 9}], "--pp_size 9"),
    ],
)
def test_bad_targets_are_refused(source: Path, target: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    absolute = [{**table, "output_dir": tmp_path / table["output_dir"]} if "output_dir" in table else table for table in target]
    with pytest.raises(BadInput, match=message):
        convert(model_dir=source, target=absolute, scheduler="threads")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
