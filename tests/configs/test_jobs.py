"""The example jobs of configs/jobs: each plans."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import plan
from pipeline.model.tables import CONFIGS
from tests.support import checkpoints
from tests.support.places import SMOLLM2 as MODEL

JOBS = sorted((CONFIGS / "jobs").glob("*.toml"))


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)
def test_every_example_plans(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The models and directories that the examples name are on other machines: a small model stands in for a large one.
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    monkeypatch.setattr("pipeline.planning.opening.check_output", lambda *_: [])
    model = MODEL if job.stem == "smollm2" else tmp_path / "model"
    made = plan(job, model_dir=model)
    assert len(made.targets) == 2
    assert 0 < made.bytes_written < sum(file.size_bytes for target in made.targets for file in target.output.files)
    assert [phase.name for phase in made.phases][-1] == "write"
