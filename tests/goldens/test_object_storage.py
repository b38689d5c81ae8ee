"""NVIDIA's own outputs, byte for byte, from a bucket into a bucket; sources that are not read by ranges from a directory."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipeline.planning.rank_parts
from tests.goldens import test_dense, test_families, test_quantized
from tests.goldens.differences import check_config
from tests.support.commands import headrace
from tests.support.examples import by_night
from tests.support.places import DATA
from tests.support.s3_server import Proxied, objects, open_uploads, s3_server, upload

LEFT_OUT = {
    f"dense/{test_dense.LOSES_A_LAYER}",
    f"dense/{test_dense.LOSES_BIASES}",
    f"families/{test_families.REPEATS_A_LAYER}",
    f"quantized/{test_quantized.LOSES_SCALES}",
}
CASES = {
    f"{folder}/{case['case']}": case
    for folder in ("dense", "families", "quantized", "smoothquant")
    for case in json.loads((DATA / folder / "cases.json").read_text())
    if (DATA / folder / "expected" / case["case"]).exists() and f"{folder}/{case['case']}" not in LEFT_OUT
}
BY_DAY = [next(name for name in CASES if name.startswith(folder)) for folder in ("dense", "quantized")]


@pytest.fixture(scope="module")
def server() -> Iterator[Proxied]:
    with s3_server() as found:
        yield found


def arguments(name: str, case: dict[str, str], far: bool) -> list[str]:
    """The options of a case; where `far`, its model is in the bucket, if its weights are in files that are read by ranges."""
    folder = name.partition("/")[0]
    words = shlex.split(case["arguments"])
    model = case["model"] if folder == "families" else words[1]
    place = DATA / folder / ("models" if folder == "families" else "") / model
    flag = words.index("--model_dir") if folder == "families" else 0
    ranged = far and words[flag] == "--model_dir" and place.is_dir() and any(place.glob("*.safetensors"))
    words[flag + 1] = upload(place, f"s3://bucket/models/{folder}/{Path(model).name}") if ranged else str(place)
    if folder == "smoothquant":
        words += ["--act_range", str(DATA / folder / "expected" / case["case"] / "act_range.safetensors")]
    if model == "internlm2":
        words += ["--rope_scaling", "keep"]
    return words


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("name", by_night(CASES, BY_DAY))
def test_output_equals_the_reference(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(name, True, tmp_path, monkeypatch)


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("name", by_night([name for name in CASES if name.startswith(("dense", "families"))], BY_DAY[:1]))
def test_output_of_a_directory_equals_the_reference(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of several ranks are made of the same rows."""
    check(name, False, tmp_path, monkeypatch)


def check(name: str, far: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(pipeline.planning.rank_parts, "PART_BYTES", 20_000)
    monkeypatch.chdir(tmp_path)
    out, expected = f"s3://bucket/ranks/{'far' if far else 'near'}/{name}", DATA / name.replace("/", "/expected/")
    ran = headrace("convert", *arguments(name, CASES[name], far), "--output_dir", out, "--scheduler", "threads", "--quiet")
    assert ran.code == 0, ran.err
    found = objects(out)
    assert set(found) == {path.name for path in expected.iterdir()} - {"act_range.safetensors"} | {"headrace.json"}
    for path in expected.glob("rank*.safetensors"):
        assert found[path.name] == path.read_bytes(), path.name
    assert open_uploads() == []
    (tmp_path / "config.json").write_bytes(found["config.json"])
    check_config(name, tmp_path)
