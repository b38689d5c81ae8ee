"""Which options of a job file are paths, and which names of a model; and which are a model's on the Hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.planning.job import Job, make_job
from pipeline.planning.job_file import LISTS_OF_PATHS, PATHS, model_name


@pytest.mark.parametrize("name", ["org/name", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "org/name:Q4_K_M", "org/name:name-IQ4_XS.v2"])
def test_a_name_of_the_hub_is_kept(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_name(name) == name


@pytest.mark.parametrize(
    "name", ["name", "./org/name", "../name", "/org/name", "org/name/more", "org/name:", ":Q4_0", "org/name:Q/4"]
)
def test_another_name_is_a_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_name(name) == Path(tmp_path / name).resolve()


def test_a_path_that_is_there_is_no_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert model_name("org/name") == tmp_path / "org" / "name"


def test_every_option_that_is_a_path_is_known_as_one() -> None:
    holding = {name for name, field in Job.model_fields.items() if "Path" in str(field.annotation)}
    assert holding >= {"model_dir", "output_dir", "scratch_outputs"}
    assert holding | {"scratch"} == PATHS | LISTS_OF_PATHS  # which may be a URL, and is a text
    assert {name for name in holding if str(Job.model_fields[name].annotation).startswith("tuple")} == LISTS_OF_PATHS


@pytest.mark.parametrize("name", sorted((PATHS | LISTS_OF_PATHS) - {"output_dir", "meta_ckpt_dir"}))
def test_paths_start_from_the_folder_of_the_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    given = '["there/file"]' if name in LISTS_OF_PATHS else '"there/file"'
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").touch()  # or the name of a model would be one of the Hub
    (tmp_path / "job.toml").write_text(
        f'{name} = {given}\noutput_dir = "out"\n' + ("" if name == "model_dir" else 'model_dir = "m"\n')
    )
    found = getattr(make_job({}, tmp_path / "job.toml"), name)
    assert list(map(str, found if name in LISTS_OF_PATHS else [found])) == [str(tmp_path / "there/file")]
