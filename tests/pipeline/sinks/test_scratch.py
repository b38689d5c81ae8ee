"""Cuts: Zarr between any two stages changes no byte, reads with plain zarr, and serves other jobs."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import zarr
from typer.testing import CliRunner

from pipeline import BadInput, convert, plan
from pipeline.cli import app
from pipeline.model.dtypes import BY_SAFETENSORS
from pipeline.sinks.journal import Journal
from tests.goldens.test_dense import CASES, DENSE, LOSES_A_LAYER
from tests.support import checkpoints
from tests.support.directories import contents
from tests.support.places import SMOLLM2 as MODEL

STAGES = ["read", "rename", "unpack", "shard"]


# Of every container and of experts: these are cut at each stage by `make test`, and every golden at all of them.
FEW = ("gqa_tp2", "mixtral_tp2", "meta_gqa_4_tp2", "bin_sharded_tp2")
EVERY = ",".join(STAGES)


@pytest.mark.parametrize(
    ("case", "after"),
    [
        pytest.param(case, after, marks=() if after == EVERY or case in FEW else pytest.mark.nightly)
        for case in CASES
        for after in (*STAGES, "read,shard", EVERY)
        if case != LOSES_A_LAYER
    ],
)
def test_every_golden_with_each_cut(case: str, after: str, tmp_path: Path) -> None:
    options = dict(zip(*[iter(_pairs(CASES[case]["arguments"]))] * 2, strict=True))
    source = next(iter(options))  # --model_dir or --meta_ckpt_dir
    options |= {source: DENSE / options[source], "output_dir": tmp_path / "out"}
    if case == "bias_gqa_tp4":  # its biases of the MLP are left out by NVIDIA's converter
        options["mlp_bias"] = "omit"
    convert(**options, scheduler="threads", scratch_after=after)
    for path in (DENSE / "expected" / case).glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert {path.name for path in tmp_path.iterdir()} == {"out"}, "scratch is removed after success"


def _pairs(arguments: str) -> list[Any]:
    words: list[Any] = []
    for word in shlex.split(arguments):
        if word.startswith("--"):
            if len(words) % 2:
                words.append(True)
            words.append(word[2:])
        else:
            words.append(int(word) if word.isdigit() else word)
    return words if len(words) % 2 == 0 else [*words, True]


@pytest.mark.parametrize("scheduler", ["local", "synchronous"])
def test_cuts_on_other_schedulers(scheduler: str, tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", checkpoints.MIXTRAL, shards=3)
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "plain", tp_size=4, moe_ep_size=2, scheduler="threads")
    convert(
        model_dir=tmp_path / "model",
        output_dir=tmp_path / "cut",
        tp_size=4,
        moe_ep_size=2,
        scheduler=scheduler,
        scratch_after=["rename", "shard"],
    )
    assert contents(tmp_path / "cut") == contents(tmp_path / "plain")


def test_plain_zarr_reads_what_a_cut_holds(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "model", checkpoints.LLAMA | {"torch_dtype": "bfloat16"})
    options = {"model_dir": tmp_path / "model", "scratch": tmp_path / "scratch", "scratch_after": "rename", "keep_scratch": True}
    convert(output_dir=tmp_path / "out", scheduler="threads", **options)
    (directory,) = (tmp_path / "scratch").iterdir()
    group = zarr.open(directory, mode="r")
    names = {group[name].attrs["source"]: name for name in group}
    assert names.keys() == source.keys()
    for name, values in source.items():
        array = group[names[name]]
        assert array.attrs["dtype"] == "BF16"
        assert array.attrs["shape"] == list(values.shape) == list(array.shape)
        np.testing.assert_array_equal(array[:].view(BY_SAFETENSORS["BF16"].numpy).view(np.uint16), values.view(np.uint16))
    assert "transformer.layers.2.attention.qkv.k.weight" in group


@pytest.mark.nightly
def test_a_packed_model_is_unpacked_once_for_two_jobs(tmp_path: Path) -> None:
    options = {"model_dir": MODEL, "scratch": tmp_path / "scratch", "scratch_after": "unpack", "scheduler": "threads"}
    first = convert(output_dir=tmp_path / "one", tp_size=1, keep_scratch=True, **options)
    assert first.stages["unpack"]["bytes"] > 0
    (directory,) = (tmp_path / "scratch").iterdir()
    (tensor,) = (t for t in gguf.GGUFReader(MODEL).tensors if t.name == "blk.3.ffn_up.weight")
    held = zarr.open(directory, mode="r")["transformer.layers.3.mlp.gate.weight"][:]
    np.testing.assert_array_equal(held, gguf.dequantize(tensor.data, tensor.tensor_type))

    # Chunks at the edge are as large as the others: a little more than the values.
    held_bytes = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file() and path.name != "zarr.json")
    assert 538_060_032 < held_bytes < 1.05 * 538_060_032
    planned = plan(output_dir=tmp_path / "three", tp_size=3, **options).summary()
    sizes = {"bytes": first.scratch_bytes_written, "disk_bytes": held_bytes}
    assert planned["scratch"] == [{"stage": "unpack", "path": str(directory), **sizes, "reused": True}]
    assert first.scratch_bytes_written == 538_060_032
    second = convert(output_dir=tmp_path / "three", tp_size=3, **options)
    assert "unpack" not in second.stages, "the second job reads scratch"
    convert(model_dir=MODEL, output_dir=tmp_path / "plain", tp_size=3, scheduler="threads")
    assert contents(tmp_path / "three") == contents(tmp_path / "plain")
    assert directory.exists(), "the first job asked to keep it"


def test_scratch_of_another_source_is_not_reused(tmp_path: Path) -> None:
    options = {"output_dir": tmp_path / "out", "scratch": tmp_path / "scratch", "scratch_after": "unpack", "keep_scratch": True}
    for seed in (1, 2):
        checkpoints.write(tmp_path / "model", checkpoints.LLAMA, seed=seed)
        convert(model_dir=tmp_path / "model", scheduler="threads", overwrite=True, **options)
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "plain", scheduler="threads")
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
    assert len(list((tmp_path / "scratch").iterdir())) == 2


def test_the_plan_says_what_each_cut_costs_and_why_there_is_none(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    options = {"model_dir": tmp_path / "model", "output_dir": tmp_path / "out"}
    automatic = plan(**options).summary()
    assert automatic["scratch"] == []
    assert all(reason.startswith("no cut: ") for reason in automatic["scratch_reasons"].values())
    cut = plan(**options, scratch_after="read,unpack").summary()
    nbytes = sum(values.nbytes for values in source.values())
    assert [entry["bytes"] for entry in cut["scratch"]] == [nbytes, nbytes]
    assert cut["scratch_reasons"]["read"].startswith(f"cut, as asked: {nbytes:,} bytes written and read again (not needed: ")
    assert [phase["name"] for phase in cut["phases"]] == ["scratch after read", "scratch after unpack", "write"]
    assert not (tmp_path / ".headrace-scratch").exists(), "a plan writes nothing"


def test_listing_and_removing(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    scratch = tmp_path / "scratch"
    for stage in ("read", "unpack"):
        options = {"scratch_after": stage, "scratch": scratch, "keep_scratch": True}
        convert(model_dir=tmp_path / "model", output_dir=tmp_path / stage, scheduler="threads", **options)
    run = CliRunner()
    listed = json.loads(run.invoke(app, ["scratch", "ls", str(scratch), "--json"]).output)
    assert [cut["stage"] for cut in listed] == ["read", "unpack"]
    assert all(cut["complete"] and cut["bytes"] > 0 for cut in listed)
    assert "unpack" in run.invoke(app, ["scratch", "ls", str(scratch)]).output
    name = Path(listed[0]["path"]).name
    # A cut that a job is at work on stays.
    journal = Journal(scratch / name / "headrace.journal")
    with pytest.raises(BadInput, match="another job"):
        run.invoke(app, ["scratch", "rm", str(scratch), name], catch_exceptions=False)
    journal.remove()
    assert run.invoke(app, ["scratch", "rm", str(scratch), name]).exit_code == 0
    assert [path.name for path in scratch.iterdir()] == [Path(listed[1]["path"]).name]
    with pytest.raises(BadInput, match="no such cut"):
        run.invoke(app, ["scratch", "rm", str(scratch), "nothing.zarr"], catch_exceptions=False)
    assert run.invoke(app, ["scratch", "rm", str(scratch), "--all", "--yes"]).exit_code == 0
    assert not list(scratch.iterdir())


def test_what_is_not_converted_goes_to_no_scratch(tmp_path: Path) -> None:
    """Names of tensors that a family ignores are a stranger's text, and would be names of directories."""
    values = checkpoints.values(checkpoints.LLAMA)
    outside = "model.rotary_emb.inv_freq.x./../../../../elsewhere"
    plain = {**values, "model.rotary_emb.inv_freq.x": np.zeros(4, np.float32), outside: np.zeros((4, 4), np.float32)}
    checkpoints.save(tmp_path / "model", checkpoints.LLAMA, plain)
    convert(
        model_dir=tmp_path / "model",
        output_dir=tmp_path / "out",
        scheduler="threads",
        scratch=tmp_path / "scratch",
        scratch_after="read",
        keep_scratch=True,
    )
    (cut,) = (tmp_path / "scratch").iterdir()
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out", "scratch"}
    stored = {str(path.parent.relative_to(cut)) for path in cut.rglob("zarr.json")} - {"."}
    assert {name.rpartition("/")[2] for name in stored} == set(values)
