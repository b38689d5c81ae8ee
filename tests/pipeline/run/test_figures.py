"""Read and written are one thing each, wherever they are said, and agree with the sizes of files."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pipeline import plan
from pipeline.run.execute import execute
from pipeline.watching.page import header
from pipeline.watching.progress import ProgressLines
from pipeline.watching.state import RunWatch
from pipeline.watching.units import human_bytes, human_rate
from tests.support import checkpoints, quantized_checkpoints
from tests.support.commands import headrace
from tests.support.directories import values_bytes

FIGURES = ("bytes_read", "scratch_bytes_read", "bytes_written", "scratch_bytes_written")
CASES: dict[str, tuple[str, list[dict[str, Any]], list[str]]] = {
    "dense": ("dense", [{"tp_size": 2}], []),
    "GPTQ with a cut": ("gptq", [{"tp_size": 2}], ["unpack"]),
    "int8 with two cuts": ("dense", [{"tp_size": 2, "use_weight_only": True}], ["read", "shard"]),
    "several targets": ("dense", [{"tp_size": 2, "use_weight_only": True}, {"tp_size": 1, "dtype": "bfloat16"}], []),
}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "dense", quantized_checkpoints.LLAMA, shards=2)
    quantized_checkpoints.write(tmp_path / "gptq", quantized_checkpoints.LLAMA, quantized_checkpoints.formats()["gptq asymmetric"])
    return tmp_path


def figures(values: Mapping[str, Any]) -> dict[str, int]:
    return {name: values[name] for name in FIGURES}


def source_bytes(model: Path) -> int:
    """The bytes of a model's safetensors files without their headers."""
    files = [path.read_bytes() for path in model.glob("*.safetensors")]
    return sum(len(data) - 8 - int.from_bytes(data[:8], "little") for data in files)


@pytest.mark.parametrize("case", CASES)
def test_every_place_says_the_same(case: str, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, targets, after = CASES[case]
    tables = [{"output_dir": models / f"out/{n}", **options} for n, options in enumerate(targets)]
    made = plan(
        model_dir=models / model,
        target=tables,
        scratch_after=after,
        scratch=str(models / "scratch"),
        keep_scratch=True,
        scheduler="threads",
    )
    planned = figures(made.summary())
    assert sum(cut["bytes"] for cut in made.summary()["scratch"]) == planned["scratch_bytes_written"]
    watch = RunWatch()
    result = execute(made, ProgressLines(sys.stderr, watch, as_json=True), watch=watch)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert figures(asdict(result)) == planned
    assert figures(watch.snapshot().summary()) == planned
    assert figures(lines[-1]) == planned
    assert lines[0]["bytes"] == lines[-1]["bytes"] == planned["bytes_written"] + planned["scratch_bytes_written"]
    assert sum(done for _, _, done, _ in lines[-1]["ranks"]) == planned["bytes_written"]
    for target in made.targets:
        timings = json.loads((target.output.directory / "headrace.json").read_text())["timings"]
        assert figures(timings) == planned
        assert timings["stages"] == result.stages
    # And so do the files.
    if model == "dense" or after:
        assert planned["bytes_read"] == source_bytes(models / model)
    assert planned["bytes_written"] == values_bytes(models / "out")
    chunks = sum(path.stat().st_size for path in (models / "scratch").rglob("c/**/*") if path.is_file())
    assert planned["scratch_bytes_written"] == chunks
    assert 0.95 * chunks <= planned["scratch_bytes_read"] <= chunks  # what no target needs is not read back


def test_people_read_the_same_words(models: Path) -> None:
    arguments = ("--model_dir", models / "dense", "--output_dir", models / "out", "--scratch_after", "unpack")
    planned = headrace("plan", *arguments).out
    told = headrace("convert", *arguments, "--scheduler", "threads").out
    reads, writes = (re.search(rf"^{word} +(.*?) *$", planned, re.MULTILINE) for word in ("reads", "writes"))
    assert reads
    assert writes
    assert f"read {reads[1]}\nwrote {writes[1]}\n" in told
    size = human_bytes(source_bytes(models / "dense"))
    assert reads[1] == f"{size} of the source, {size} of scratch"


def test_a_resumed_run_counts_what_it_moves_itself(models: Path) -> None:
    made = plan(model_dir=models / "dense", output_dir=models / "out", scheduler="threads")
    result, again = execute(made), execute(made)
    assert result.bytes_read == made.bytes_read
    assert set(figures(asdict(again)).values()) == {0}


def test_the_page_has_sizes_in_binary_units_and_rates_in_decimal_ones(models: Path) -> None:
    made = plan(model_dir=models / "dense", output_dir=models / "out", scheduler="threads", scratch_after=["unpack"])
    watch = RunWatch()
    execute(made, watch=watch)
    text = header(watch.snapshot())
    size = human_bytes(made.bytes_read)
    assert f"<b>{size} (+ {size} scratch)</b><span>read of the source</span>" in text
    assert f"<b>{human_bytes(made.bytes_written)} (+ {size} scratch)</b><span>written into rank files</span>" in text
    assert (human_bytes(1.5 * 2**30), human_rate(1.5e9), human_rate(71.44e6), human_rate(2e3)) == (
        "1.5 GiB",
        "1.50 GB/s",
        "71.4 MB/s",
        "2 kB/s",
    )
