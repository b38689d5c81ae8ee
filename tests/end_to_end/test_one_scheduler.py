"""Several conversions at once on one scheduler: to it, tasks of one key are one, so that no two runs may share any."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from distributed import LocalCluster

from pipeline import convert
from tests.support import checkpoints
from tests.support.directories import contents

CUT = {"scratch_after": "unpack"}


def test_conversions_that_share_a_scheduler_share_no_task(tmp_path: Path) -> None:
    models = [tmp_path / f"model{n}" for n in range(4)]
    for seed, model in enumerate(models):
        checkpoints.write(model, checkpoints.LLAMA, seed=seed)
        convert(model_dir=model, output_dir=tmp_path / "alone" / model.name, tp_size=2, scheduler="synchronous")
    with LocalCluster(n_workers=2, threads_per_worker=2, processes=False, protocol="tcp", dashboard_address=None) as cluster:

        def together(model: Path) -> None:
            more = {**CUT, "scratch": tmp_path / f"scratch-{model.name}"} if model.name[-1] in "13" else {}
            output = tmp_path / "together" / model.name
            convert(model_dir=model, output_dir=output, tp_size=2, scheduler=cluster.scheduler_address, **more)

        with ThreadPoolExecutor(len(models)) as threads:
            list(threads.map(together, models))
    for model in models:
        assert contents(tmp_path / "together" / model.name) == contents(tmp_path / "alone" / model.name)
