"""`headrace report`: a page of real outputs and of made-up ones, whatever is missing, broken or hostile in them."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import convert
from pipeline.errors import BadInput
from pipeline.reporting.html import default_report_path, render_report
from pipeline.reporting.report import make_report
from pipeline.reporting.verification import verify
from pipeline.tensor.checkpoint import Checkpoint
from tests.support import checkpoints, quantized_checkpoints, report_pages
from tests.support.commands import headrace, tree
from tests.support.examples import examples
from tests.support.places import DATA

HOSTILE = "</style></code>\"'><script>alert(1)</script><img src=x onerror=alert(2)>&lt;{{ 7 * 7 }}{% endif %}\u202e\x00\ud800"


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, list[str]]] = []
        self.values: list[tuple[str, str]] = []
        self.parts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, [name for name, _ in attrs]))
        self.values += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.parts))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of two ranks in int8, beside its source `model`."""
    folder = tmp_path_factory.mktemp("report")
    checkpoints.write(folder / "model", quantized_checkpoints.LLAMA)
    convert(model_dir=folder / "model", output_dir=folder / "out", tp_size=2, use_weight_only=True, scheduler="threads")
    return folder / "out"


def test_a_real_output(output: Path) -> None:
    before = tree(output)
    ran = headrace("report", output)
    page = output.with_name("out.report.html")
    assert (ran.code, ran.out, ran.err.splitlines()[-2:]) == (0, f"wrote {page}\n", ["integrity: 100 %", "round trip: 100 %"])
    assert tree(output) == before
    made = Page(page.read_text())
    told = json.loads((output / "headrace.json").read_text())
    summary = verify(output, output.with_name("model")).summary()
    for words in (told["id"], str(output), str(output.with_name("model")), "W8A16", "--tp_size 2", "Verified: nothing wrong"):
        assert words in made.text
    for stage in ("read", "quantize", "shard", "checksum", "write"):
        assert stage in made.text
    for tensor in summary["round_trip"]["tensors"]:
        assert tensor["name"] in made.text
        if tensor["snr_db"] is not None:
            assert f"{math.floor(tensor['snr_db'] * 10) / 10:.1f}" in made.text
    assert not list(output.parent.glob("*.new"))


def test_it_is_written_again_in_its_place(output: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("something else")
    assert headrace("report", output, "--output", page).code == 0
    assert "headrace report" in page.read_text()


def test_the_page_asks_for_nothing() -> None:
    text = render_report(report_pages.checkpoint(cuts=("unpack",)), report_pages.failed())
    made = Page(text)
    assert {"script", "iframe", "object", "embed", "base", "form"}.isdisjoint(tag for tag, _ in made.tags)
    links = [value for name, value in made.values if name in ("src", "href", "srcset", "action", "data", "background")]
    assert links == ["data:,"]
    assert not [name for name, _ in made.values if name.startswith("on")]
    assert "default-src 'none'" in text
    assert "@import" not in text
    assert "url(" not in text


def test_what_was_damaged_is_named_on_the_page_and_by_the_exit_code(output: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(output, tmp_path / "broken"))
    path = broken / "rank1.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x40
    path.write_bytes(data)
    ran = headrace("report", broken)
    assert ran.code == 5
    assert "1 finding:" in ran.err
    text = Page((tmp_path / "broken.report.html").read_text()).text
    assert "Something is wrong: 1 finding" in text
    assert "rank1.safetensors: transformer." in text
    assert "as the files themselves are wrong" in text


def test_ranks_that_cannot_be_read_have_a_page(output: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(output, tmp_path / "broken"))
    path = broken / "rank0.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    ran = headrace("report", broken)
    assert ran.code == 5
    text = Page((tmp_path / "broken.report.html").read_text()).text
    assert "the files cannot be read" in text
    assert "W8A16" in text
    assert json.loads((broken / "headrace.json").read_text())["id"] in text


def test_another_source_than_the_recorded_one(output: Path, tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "other", quantized_checkpoints.LLAMA, seed=9)
    page = tmp_path / "page.html"
    ran = headrace("report", output, "--source", tmp_path / "other", "--output", page)
    assert ran.code == 5
    assert "with more error than the format allows" in Page(page.read_text()).text


def test_a_recorded_source_that_changed_is_not_compared(output: Path, tmp_path: Path) -> None:
    of_its_own(output, tmp_path)
    assert headrace("report", tmp_path / "out").code == 0
    assert "compared with the source;" in Page((tmp_path / "out.report.html").read_text()).text
    (tmp_path / "model/config.json").write_text("{}")
    assert headrace("report", tmp_path / "out").code == 0
    assert "as no source was there" in Page((tmp_path / "out.report.html").read_text()).text


def of_its_own(output: Path, place: Path) -> Path:
    """A copy of an output, whose headrace.json names a copy of its source."""
    for name in ("model", "out"):
        shutil.copytree(output.with_name(name), place / name)
    told = json.loads((place / "out/headrace.json").read_text())
    told["source"]["path"] = str(place / "model")
    (place / "out/headrace.json").write_text(json.dumps(told))
    return place / "out"


def test_a_model_that_was_trained_on_in_its_place_is_not_held_against_the_ranks(output: Path, tmp_path: Path) -> None:
    """Its files have the same names, sizes and headers: only their times tell."""
    out = of_its_own(output, tmp_path)
    checkpoints.write(tmp_path / "model", quantized_checkpoints.LLAMA, seed=9)
    ran = headrace("report", out)
    assert ran.code == 0, ran.err
    text = Page((tmp_path / "out.report.html").read_text()).text
    assert "is not as it was (model.safetensors was written to); to compare with it as it is, give --source" in text
    assert headrace("report", out, "--source", tmp_path / "model").code == 5


def test_another_header_is_another_source_whatever_its_time(output: Path, tmp_path: Path) -> None:
    out, path = of_its_own(output, tmp_path), tmp_path / "model/model.safetensors"
    before, data = path.stat(), bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    first, second = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"
    header[first], header[second] = header[second], header[first]
    text = json.dumps(header, separators=(",", ":")).encode()
    data[8 : 8 + length] = text.ljust(length)
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert headrace("report", out).code == 0
    assert "(model.safetensors has another header)" in Page((tmp_path / "out.report.html").read_text()).text


def test_what_nvidia_wrote(tmp_path: Path) -> None:
    out = Path(shutil.copytree(DATA / "dense/expected/gqa_tp2", tmp_path / "out"))
    assert headrace("report", out).code == 0
    text = Page(default_report_path(out).read_text()).text
    assert "another program wrote this directory" in text
    assert "The values were not compared with the source's" in text
    assert headrace("report", out, "--source", DATA / "dense/models/gqa_fp16").code == 0
    assert "hold the source's values bit for bit" in Page(default_report_path(out).read_text()).text


def test_a_verification_from_a_file(output: Path, tmp_path: Path) -> None:
    ran = headrace("verify", output, "--json")
    (tmp_path / "found.json").write_text(ran.out)
    page = tmp_path / "page.html"
    assert headrace("report", output, "--output", page, "--verification", tmp_path / "found.json").code == 0
    assert "Verified" in page.read_text()
    (tmp_path / "found.json").write_text(json.dumps(report_pages.failed()))
    ran = headrace("report", output, "--output", page, "--verification", tmp_path / "found.json")
    assert ran.code == 5
    assert report_pages.FINDING["subject"] in ran.err
    text = Page(page.read_text()).text
    assert report_pages.FINDING["remedy"] in text
    assert "a directory of another name" in text


def test_a_verification_of_another_output_of_that_name_is_refused(output: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / output.name
    convert(model_dir=output.with_name("model"), output_dir=other, tp_size=1, scheduler="threads")
    found = verify(output).summary()
    (tmp_path / "found.json").write_text(json.dumps(found))
    ran = headrace("report", other, "--output", tmp_path / "page.html", "--verification", tmp_path / "found.json")
    assert ran.code == 2
    assert f"--verification: found a verification of another output, {output} (id {found['output']['id']})" in ran.err
    assert not (tmp_path / "page.html").exists()
    # The same output elsewhere, and a verification that does not say of which it is, are taken.
    moved = Path(shutil.copytree(output, tmp_path / "moved"))
    for summary in (found, {**found, "output": {}}):
        (tmp_path / "found.json").write_text(json.dumps(summary))
        ran = headrace("report", moved, "--output", tmp_path / "page.html", "--verification", tmp_path / "found.json")
        assert ran.code == 0, ran.err


def test_checksums_tell_outputs_of_one_id(output: Path, tmp_path: Path) -> None:
    found = verify(output).summary()
    with pytest.raises(BadInput, match="a verification of another output"):
        make_report(output, output=tmp_path / "page.html", verification={**found, "output": {**found["output"], "xxh3": "0" * 16}})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[1]", "found a list"),
        ("{", "found no JSON"),
        ("{}", "directory: found nothing"),
        (json.dumps({**report_pages.summary(2), "round_trip": {"seconds": "x"}}), "round_trip.seconds: found 'x'"),
        (json.dumps({**report_pages.summary(2), "findings": [{}]}), "findings.0.level: found nothing"),
    ],
)
def test_what_is_no_verification_is_refused(output: Path, tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "found.json").write_text(text)
    ran = headrace("report", output, "--output", tmp_path / "page.html", "--verification", tmp_path / "found.json")
    assert ran.code == 2
    assert problem in ran.err
    assert "headrace verify --json" in ran.err
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    "name", ["page.txt", "rank0.safetensors", "out/page.html", "nowhere/page.html", "folder.html", "link/page.html"]
)
def test_places_where_no_page_goes(output: Path, tmp_path: Path, name: str) -> None:
    out = Path(shutil.copytree(output, tmp_path / "out"))
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "link").symlink_to(out)
    before = tree(tmp_path)
    ran = headrace("report", out, "--output", tmp_path / name)
    assert ran.code == 2
    assert f"--output {tmp_path / name}" in ran.err
    assert tree(tmp_path) == before


def test_requests_that_make_no_sense(output: Path, tmp_path: Path) -> None:
    assert headrace("report", tmp_path / "nothing").code == 2
    assert headrace("report", output, "--source", "x", "--verification", "y").code == 2
    ran = headrace("report", output, "--output", tmp_path / "page.html", "--verification", tmp_path / "none.json")
    assert (ran.code, "No such file" in ran.err) == (2, True)
    assert not list(tmp_path.iterdir())


def test_a_page_that_cannot_be_written(output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "page.html").write_text("the old page")
    monkeypatch.setattr(Path, "replace", full)
    ran = headrace("report", output, "--output", tmp_path / "page.html")
    assert (ran.code, "No space left" in ran.err) == (3, True)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["the old page"]


@pytest.mark.parametrize("level", ["integrity", "round_trip", "logits", "source", "none"])
@pytest.mark.parametrize("provenance", [True, False])
def test_parts_may_be_missing(level: str, provenance: bool) -> None:
    made = Page(render_report(report_pages.checkpoint(provenance=provenance), {**report_pages.summary(), level: None}))
    assert ("another program wrote" in made.text) is not provenance
    assert ("Round trip : not done" in made.text) is (level == "round_trip")
    assert ("Integrity : not checked" in made.text) is (level == "integrity")
    assert ("through the model" in made.text) is (level != "logits")


def test_without_a_verification() -> None:
    assert "Not verified" in Page(render_report(report_pages.checkpoint())).text


def test_values_that_were_rounded_once() -> None:
    summary = report_pages.summary(2)
    for tensor in summary["round_trip"]["tensors"]:
        tensor["exact"] = True
    text = Page(render_report(report_pages.checkpoint(2), summary)).text
    assert "rounded once to the type that it is stored in" in text
    assert "10 rounded once and no more" in text


def test_very_many_findings_and_tensors_do_not_make_the_page_endless() -> None:
    findings = [{**report_pages.FINDING, "subject": f"tensor {n}"} for n in range(500)]
    text = render_report(report_pages.checkpoint(), report_pages.summary(300, ok=False, findings=findings))
    made = Page(text)
    assert "Something is wrong: 500 findings" in made.text
    assert "tensor 99 " in made.text
    assert "tensor 100 " not in made.text
    assert "and 400 more" in made.text
    assert "The worst 1000 of 2,103 tensors" in made.text
    assert len(text) < 2_000_000


@pytest.mark.parametrize("key", ["source", "options", "timings", "notes", "left_out", "copied", "id"])
def test_entries_that_headrace_does_not_write_are_named_and_left_out(key: str) -> None:
    checkpoint = report_pages.checkpoint()
    broken = Checkpoint(checkpoint.directory, checkpoint.config, checkpoint.ranks, {**checkpoint.provenance, key: 1.5})
    assert f"not what headrace writes: {key} of" in Page(render_report(broken, report_pages.summary())).text


def hostile(value: Any, text: str) -> Any:
    """Every text in a JSON value as another one; names of keys too where they are no fields."""
    if isinstance(value, dict):
        return {key: hostile(each, text) for key, each in value.items()}
    if isinstance(value, list):
        return [hostile(each, text) for each in value]
    return text if isinstance(value, str) else value


def attacked(text: str) -> tuple[Checkpoint, dict[str, Any]]:
    """A checkpoint and its verification, both of whose files say nothing but `text`."""
    plain = report_pages.checkpoint(2)
    told = hostile(dict(plain.provenance), text) | {"left_out": {text: text}, "options": {text: text, "tp_size": text}}
    told["timings"] = {"stages": {"read": {"seconds": 1}, text: {"seconds": 1}}, "phases": {text: 1.0}}
    ranks = tuple({f"{text}{n}": tensor for n, tensor in enumerate(rank.values())} for rank in plain.ranks)
    config = {**hostile(dict(plain.config), text), "mapping": {"tp_size": text, "pp_size": 2}}
    return Checkpoint(Path("/out"), config, ranks, told), hostile(report_pages.failed(4), text)


PLAIN = Page(render_report(*attacked("plain")))


def test_text_of_files_is_text_of_the_page() -> None:
    attack = Page(render_report(*attacked(HOSTILE)))
    assert [tag for tag in attack.tags if tag != ("wbr", [])] == PLAIN.tags
    assert "<script>alert(1)</script>" in attack.text
    assert "{{ 7 * 7 }}" in attack.text
    assert r"\u202e\x00\ud800" in attack.text
    assert "49" not in {part.strip() for part in attack.parts} - {part.strip() for part in PLAIN.parts}


@examples(25)
@given(st.text(alphabet=st.sampled_from("<>&\"'/={}%;:-_!x \n\u2028\ud800\x00\u202e"), min_size=1, max_size=12))
def test_no_text_changes_a_tag(text: str) -> None:
    made = Page(render_report(*attacked(text)))
    assert [tag for tag in made.tags if tag != ("wbr", [])] == PLAIN.tags


def test_a_summary_of_another_shape_is_refused() -> None:
    with pytest.raises(BadInput, match="tensors"):
        render_report(report_pages.checkpoint(), {**report_pages.summary(), "round_trip": {"seconds": 1, "bytes": 1}})
