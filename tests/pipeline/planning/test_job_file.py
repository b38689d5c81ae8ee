"""Which names of a model are paths, and which are a model's on the Hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.planning.job_file import model_name


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
