"""The documents as a site: built without a warning, its links lead somewhere, its reference is the code's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.planning.job import Job
from tests.support.places import DOCS, ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-b",
        "html",
        "-d",
        f"{folder}/doctrees",
        DOCS,
        folder / "html",
    ]
    ran = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return folder / "html"


def test_every_page_of_the_documents_is_on_it(site: Path) -> None:
    for page in DOCS.rglob("*.md"):
        assert (site / page.relative_to(DOCS)).with_suffix(".html").is_file()


def test_links_within_the_site_lead_to_files(site: Path) -> None:
    checked = 0
    for page in site.rglob("*.html"):
        if page.is_relative_to(site / "source"):
            continue
        for to in re.findall(r'<a [^>]*href="([^"#:]+?)(?:#[^"]*)?"', page.read_text()):
            assert (page.parent / to).exists(), f"{page.relative_to(site)}: {to}"
            checked += 1
    assert checked > 500


def test_a_file_of_the_repository_is_shown_with_the_site(site: Path) -> None:
    assert "def shard" in re.sub(r"<[^>]*>", "", (site / "source/stages/shard.py.html").read_text())
    assert 'href="source/stages/shard.py.html"' in (site / "architecture.html").read_text()


def test_the_reference_has_every_option_and_name(site: Path) -> None:
    commands = (site / "reference/commands.html").read_text()
    for name in ("--model_dir", "--tp_size", "--scratch_after", "--calibration_tokens", "--n_layer"):
        assert name in commands
    files = (site / "reference/files.html").read_text()
    assert all(name in files for name in Job.model_fields)
    python = (site / "reference/python.html").read_text()
    assert all(f'id="headrace.{name}"' in python for name in ("convert", "plan", "Result", "BadInput", "load_from_hf_checkpoint"))
