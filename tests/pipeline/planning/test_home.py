"""Paths from home directories: those of users that there are, and of one that there is not, refused by its option's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.planning.home import UNKNOWN, at_home, from_folder
from tests.support import checkpoints
from tests.support.commands import headrace, tree

GONE = "~no-such-user/x"
SOURCE, OUTPUT = 'model_dir = "model"\n', 'output_dir = "out"\n'


def test_paths_from_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert at_home("~/x") == from_folder("~/x", Path("/y")) == tmp_path / "x"
    assert from_folder("a/~b", Path("/y")) == Path("/y/a/~b")
    assert from_folder(GONE, Path("/y")) == GONE
    with pytest.raises(ValueError, match=UNKNOWN):
        at_home(GONE)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("convert", "--model_dir", "model", "--output_dir", GONE), "--output_dir"),
        (("convert", "--model_dir", GONE, "--output_dir", "out"), "--model_dir"),
        (("convert", "--model_dir", "model", "--output_dir", "out", "--scratch", GONE), "--scratch"),
        (("plan", "--model_dir", "model", "--output_dir", "out", "--act_range", GONE), "--act_range"),
        (("inspect", GONE), "--model_dir"),
        (("calibrate", GONE, "--output", "ranges", "--calibration_tokens", "tokens"), "MODEL_DIR"),
        (("build", "ranks", "--output_dir", GONE), "--output_dir"),
        (("build", GONE, "--output_dir", "engine"), "CHECKPOINT"),
        (("build", "ranks", "--output_dir", "engine", "--build_config", GONE, "--print_command"), "--build_config"),
        (("batch", "~no-such-user/*.toml"), "~no-such-user/*.toml"),
        (("batch", "--model_dir", "model", "--output_dir", GONE), "--matrix.output_dir"),
    ],
    ids=str,
)
def test_a_home_that_nobody_knows_is_refused_by_its_option(
    words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(words, said, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f'{SOURCE}output_dir = "{GONE}"\n', "output_dir"),
        (f'model_dir = "{GONE}"\n{OUTPUT}', "model_dir"),
        (f'{SOURCE}[[target]]\noutput_dir = "{GONE}"\n', "target.output_dir"),
        (f'{SOURCE}{OUTPUT}[scratch]\ndir = "{GONE}"\n', "scratch"),
        (f'{SOURCE}{OUTPUT}[engine]\noutput_dir = "{GONE}"\n', "engine.output_dir"),
    ],
)
@pytest.mark.parametrize("command", ["convert", "batch"])
def test_the_same_of_a_job_file(command: str, text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job.toml").write_text(text)
    refused((command, "job.toml"), said, tmp_path, monkeypatch)


def refused(words: tuple[str, ...], said: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.write(place / "model", checkpoints.LLAMA)
    monkeypatch.chdir(place)
    before = tree(place)
    ran = headrace(*words)
    assert ran.code == 2, ran
    text = ran.out + ran.err
    assert f"{said}: found " in text
    assert " ".join(UNKNOWN.split()) in " ".join(text.split())
    assert "Traceback" not in text
    assert tree(place) == before
