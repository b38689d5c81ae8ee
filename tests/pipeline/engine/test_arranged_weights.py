"""Integer weights are in the order of one kind of GPU: no engine is built of them by another, which nothing else would notice."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from pipeline.engine.requests import arranged_of
from pipeline.model.kernels import alike
from stages.build.arranged_weights import ArrangedWeights
from tests.support import checkpoints, quantized_checkpoints
from tests.support.builds import build, gpu_worker, names, nvidia_smi, start, wait_for_line
from tests.support.commands import convert, headrace


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "model"
    checkpoints.write(folder, quantized_checkpoints.LLAMA)
    return folder


def converted(model: Path, folder: Path, *more: object) -> Path:
    assert convert(model, folder / "ranks", "--use_weight_only", *more).code == 0
    return folder / "ranks"


def test_weights_for_other_gpus_are_refused_and_nothing_is_written(model: Path, engine: Path, on_path: Path) -> None:
    ranks = converted(model, engine.parent)
    nvidia_smi(on_path, "9.0")
    before = names(engine.parent)
    ran = build(ranks, engine)
    assert ran.code == 2, ran
    host, listed = socket.gethostname(), ", ".join(map(str, alike(80)))
    found = f"the GPU of {host}: found generation 90; expected one of {listed}, whose order the W8A16 weights of {ranks} are in"
    assert f"{found}. Convert with --sm 90, or build on one of these" in ran.err
    assert names(engine.parent) == before
    nvidia_smi(on_path, "8.6")
    assert build(ranks, engine).code == 0
    nvidia_smi(on_path, "9.0")  # what is there already is not built
    assert build(ranks, engine).out.endswith("nothing to do\n")
    assert build(ranks, engine, "--overwrite").code == 2


@pytest.mark.parametrize("kind", ["float", "unsaid"])
def test_weights_in_no_order_and_those_of_which_nothing_is_said_are_built(
    model: Path, engine: Path, on_path: Path, kind: str
) -> None:
    nvidia_smi(on_path, "9.0")
    assert convert(model, engine.parent / "ranks", *(["--use_weight_only"] if kind == "unsaid" else [])).code == 0
    if kind == "unsaid":
        (engine.parent / "ranks" / "headrace.json").unlink()
    assert build(engine.parent / "ranks", engine).code == 0


@pytest.mark.parametrize(
    ("algorithm", "sm", "ordered"),
    [("W8A16", 90, True), ("W4A16_GPTQ", 80, True), ("W8A16", "any", False), ("W4A16_AWQ", 80, False), ("FP8", 80, False)],
)
def test_which_weights_are_in_an_order(algorithm: str, sm: int | str, ordered: bool) -> None:
    config, provenance = {"quantization": {"quant_algo": algorithm}}, {"options": {"sm": sm}}
    assert arranged_of(Path("ranks"), config, provenance) == (
        ArrangedWeights(Path("ranks"), algorithm, int(sm)) if ordered else None
    )
    assert arranged_of(Path("ranks"), config, {}) is None
    assert arranged_of(Path("ranks"), {}, provenance) is None


def test_a_job_is_refused_before_it_converts_whatever_is_there_now(model: Path, tmp_path: Path, on_path: Path) -> None:
    job = tmp_path / "job.toml"
    table = f"model_dir = '{model}'\noutput_dir = 'ranks'\nscheduler = 'threads'\nuse_weight_only = true\n[engine]\n"
    job.write_text(table)
    nvidia_smi(on_path, "9.0")
    assert headrace("plan", job).code == 2
    ran = headrace("convert", job)
    assert (ran.code, "found generation 90" in ran.err) == (2, True), ran
    assert names(tmp_path) == {"job.toml"}
    # The checkpoint that is to be written counts, not the one in its place.
    converted(model, tmp_path)
    job.write_text(table.replace("use_weight_only = true", "use_weight_only = true\nsm = 90"))
    assert headrace("convert", job, "--overwrite").code == 0
    assert names(tmp_path) == {"job.toml", "ranks", "ranks-engine", "ranks-engine.log"}


def test_a_worker_that_comes_later_refuses_and_the_checkpoint_stays(model: Path, tmp_path: Path) -> None:
    from distributed import LocalCluster

    from tests.pipeline.engine.test_cluster import PATIENT

    nvidia_smi(tmp_path, "9.0")
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        address, job = cluster.scheduler_address, tmp_path / "job.toml"
        job.write_text(f"model_dir = '{model}'\noutput_dir = 'ranks'\nscheduler = '{address}'\nuse_weight_only = true\n[engine]\n")
        running = start("convert", job, command=PATIENT)
        wait_for_line(running, "waiting for a Dask worker with the resource GPU")
        path = f"{tmp_path / 'gpu' / 'bin'}{os.pathsep}{tmp_path}{os.pathsep}{os.environ['PATH']}"
        with gpu_worker(address, tmp_path / "gpu", PATH=path):
            _, errors = running.communicate()
    assert running.returncode == 4, errors
    assert f"{tmp_path}/ranks-engine: no engine is built of weights in another order:\nthe GPU of " in errors
    assert "ranks-engine" not in names(tmp_path)
    assert (tmp_path / "ranks" / "config.json").exists()
