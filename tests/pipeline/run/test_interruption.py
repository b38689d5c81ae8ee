"""Conversions that are stopped in the middle, or lose their source: nothing that looks whole, and the next run ends right."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import Interrupted, WriteFailed
from pipeline import convert as convert_in_python
from tests.support import checkpoints
from tests.support.commands import COMMAND, convert

# 400 MB of bfloat16, nearly all of it holes in two files; the cast to float16 on one worker takes long enough to be stopped.
LARGE = {
    **checkpoints.LLAMA,
    "vocab_size": 4096,
    "hidden_size": 2048,
    "num_hidden_layers": 4,
    "intermediate_size": 6144,
    "torch_dtype": "bfloat16",
}
# The first tensor of each file, and what it becomes: only they are not zeros, and so say how far a run is.
FIRST = {
    "model.embed_tokens.weight": "transformer.vocab_embedding.weight",
    "model.layers.2.self_attn.q_proj.weight": "transformer.layers.2.attention.qkv.weight",
}
FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
ARGUMENTS = ("--dtype", "float16", "--tp_size", "2", "--workers", "1", "--log_format", "json")


def write_sparse(directory: Path) -> None:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(LARGE))
    shapes = checkpoints.shapes(LARGE)
    second = list(shapes).index(list(FIRST)[1])
    for file, names in zip(FILES, (list(shapes)[:second], list(shapes)[second:]), strict=True):
        header, end = {}, 0
        for name in names:
            size = 2 * math.prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        with (directory / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text + b"\x80\x3f" * 100)  # 1.0 in bfloat16
            stream.truncate(8 + len(text) + end)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tmp_path_factory.mktemp("large") / "model"
    write_sparse(model)
    return model


@pytest.fixture(scope="module")
def expected(large: Path) -> dict[str, str]:
    """Digests of what an undisturbed run writes."""
    output = large.parent / "whole"
    assert convert(large, output, *ARGUMENTS).code == 0
    result = digests(output)
    shutil.rmtree(output)
    return result


def digests(output: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in output.iterdir() if path.name != "headrace.json"}


def reached(output: Path) -> str | None:
    """The file of the source whose first values have arrived in the output, the first file first; None for neither."""
    try:
        with (output / "rank0.safetensors.partial").open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
            for file, name in zip(FILES, FIRST.values(), strict=True):
                stream.seek(8 + length + header[name]["data_offsets"][0])
                if any(stream.read(16)):
                    return file
    except (OSError, ValueError):  # not yet there, or its header is not
        pass
    return None


def start(model: Path, output: Path, scheduler: str) -> subprocess.Popen[str]:
    arguments = ["convert", "--model_dir", model, "--output_dir", output, "--scheduler", scheduler, *ARGUMENTS]
    running = subprocess.Popen([*COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while reached(output) is None:
        assert running.poll() is None, running.communicate()
        time.sleep(0.002)
    return running


STOPPED = (("threads", signal.SIGINT), ("local", signal.SIGINT), ("local", signal.SIGKILL), ("synchronous", signal.SIGTERM))


@pytest.mark.parametrize(
    ("scheduler", "sent"),
    [
        pytest.param(*pair, marks=() if pair in STOPPED else pytest.mark.nightly, id=f"{pair[0]}-{pair[1].name}")
        for pair in itertools.product(("threads", "local", "synchronous"), (signal.SIGINT, signal.SIGTERM, signal.SIGKILL))
    ],
)
def test_a_run_that_is_stopped_leaves_partial_files_and_the_next_one_ends_right(
    large: Path, expected: dict[str, str], tmp_path: Path, scheduler: str, sent: signal.Signals
) -> None:
    output = tmp_path / "out"
    running = start(large, output, scheduler)
    running.send_signal(sent)
    _, errors = running.communicate()
    assert running.returncode == (-signal.SIGKILL if sent == signal.SIGKILL else 3), errors
    assert "Traceback" not in errors
    assert {path.name for path in output.iterdir()} == {
        "headrace.json.partial",
        "rank0.safetensors.partial",
        "rank1.safetensors.partial",
        *(["headrace.json.lock"] if sent == signal.SIGKILL else []),  # who was at work
    }
    if sent != signal.SIGKILL:
        assert "run the same command again" in errors
        assert str(output) in errors
    assert convert(large, output, *ARGUMENTS, "--scheduler", scheduler).code == 0
    assert digests(output) == expected
    assert (output / "headrace.json").exists()
    shutil.rmtree(output)


def test_other_options_are_not_mixed_into_a_stopped_run(large: Path, tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    running = start(large, tmp_path / "out", "threads")
    running.kill()
    running.communicate()
    refused = convert(tmp_path / "model", tmp_path / "out")
    assert refused.code == 2
    assert "an unfinished conversion of another source" in refused.err
    assert convert(tmp_path / "model", tmp_path / "out", "--overwrite").code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "headrace.json", "rank0.safetensors"}


class Meddler:
    """A listener that does something once, when the run has begun or when its first task has ended."""

    def __init__(self, act: Callable[[], None], *, on: str) -> None:
        self.act, self.on, self.ended = act, on, False

    def _heard(self, event: str) -> None:
        if event == self.on:
            self.on = ""
            self.act()

    def started(self, *_: object) -> None:
        self._heard("started")

    def advanced(self, written: object) -> None:  # noqa: ARG002
        self._heard("advanced")

    def finished(self) -> None:
        self.ended = True


SCHEDULERS = pytest.mark.parametrize("scheduler", ["threads", "local", "synchronous"])


@SCHEDULERS
def test_ctrl_c_in_python_is_interrupted(tmp_path: Path, scheduler: str) -> None:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    meddler = Meddler(lambda: signal.raise_signal(signal.SIGINT), on="started")
    with pytest.raises(Interrupted, match="run the same command again"):
        convert_in_python(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler=scheduler, listener=meddler)
    assert meddler.ended
    assert not (tmp_path / "out" / "config.json").exists()
    assert convert(tmp_path / "model", tmp_path / "out").code == 0


@SCHEDULERS
@pytest.mark.parametrize("left", [0, 5000])
def test_a_source_that_is_cut_short_while_it_is_read(tmp_path: Path, scheduler: str, left: int) -> None:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    file = tmp_path / "model" / "model.safetensors"
    meddler = Meddler(lambda: os.truncate(file, left), on="started")
    with pytest.raises(WriteFailed, match=r"model\.safetensors.*run the same command again") as failure:
        convert_in_python(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler=scheduler, listener=meddler)
    assert failure.value.exit_code == 3
    assert meddler.ended
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"headrace.json.partial", "rank0.safetensors.partial"}


@SCHEDULERS
def test_a_source_that_is_removed_while_it_is_read(tmp_path: Path, scheduler: str) -> None:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    file = tmp_path / "model" / "model.safetensors"
    with pytest.raises(WriteFailed, match=str(file)):
        convert_in_python(
            model_dir=tmp_path / "model",
            output_dir=tmp_path / "out",
            scheduler=scheduler,
            listener=Meddler(file.unlink, on="started"),
        )
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("scheduler", ["threads", "local"])
def test_the_command_exits_3_where_its_source_is_cut_short(tmp_path: Path, scheduler: str) -> None:
    write_sparse(tmp_path / "model")
    running = start(tmp_path / "model", tmp_path / "out", scheduler)
    # The file that is not being read: what is mapped already must not be taken away.
    file = tmp_path / "model" / FILES[0 if reached(tmp_path / "out") == FILES[1] else 1]
    os.truncate(file, 1000)
    _, errors = running.communicate()
    assert running.returncode == 3, errors
    assert str(file) in errors
    assert "Traceback" not in errors
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert not (tmp_path / "out" / "config.json").exists()
    shutil.rmtree(tmp_path / "out")


@SCHEDULERS
def test_an_output_that_is_taken_away_while_it_is_written(tmp_path: Path, scheduler: str) -> None:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    with pytest.raises(WriteFailed):
        convert_in_python(
            model_dir=tmp_path / "model",
            output_dir=tmp_path / "out",
            scheduler=scheduler,
            listener=Meddler(lambda: shutil.rmtree(tmp_path / "out"), on="started"),
        )
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_signal_while_a_conversion_is_planned_ends_it_with_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As planning may fetch a model for an hour."""

    def planning(*_: object, **__: object) -> None:
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("pipeline.planning.make_plan.make_plan", planning)
    ran = convert(tmp_path / "model", tmp_path / "out")
    assert (ran.code, ran.err) == (3, "headrace: interrupted before anything was written\n")
