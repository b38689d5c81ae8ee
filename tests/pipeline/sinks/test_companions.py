"""--copy_tokenizer: the files beside the weights that serving needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline import BadInput, convert
from tests.support import checkpoints


def test_tokenizer_files_are_copied_as_they_are(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    files = {"tokenizer.json": b"{}\n", "tokenizer_config.json": b'{"a": 1}', "chat_template.jinja": b"\xff"}
    for name, content in files.items():
        (tmp_path / "model" / name).write_bytes(content)
    (tmp_path / "model" / "README.md").write_text("not copied")
    options = {"model_dir": tmp_path / "model", "output_dir": tmp_path / "out", "scheduler": "threads", "copy_tokenizer": True}
    result = convert(**options)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "headrace.json", "rank0.safetensors", *files}
    assert {path.name for path in result.outputs} == names
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files
    assert json.loads((tmp_path / "out/headrace.json").read_text())["copied"] == sorted(files, key=list(files).index)
    assert convert(**options).up_to_date
    assert convert(**options, overwrite=True).bytes_written == result.bytes_written


def test_a_source_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    with pytest.raises(BadInput, match="no tokenizer's files"):
        convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler="threads", copy_tokenizer=True)
