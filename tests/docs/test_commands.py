"""Every command and example of the documents: run in a folder with tiny models of the names that they use, or marked why not."""

from __future__ import annotations

import shlex
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from pipeline.cli import app
from tests.docs.pages import PAGES, Block, blocks
from tests.docs.sandbox import furnish, make_models, placed
from tests.support.commands import headrace
from tests.support.places import ROOT

# What a page takes for granted, and another page has shown.
BEFORE = {
    "docs/verification.md": ["headrace convert --model_dir Llama-3.1-8B --output_dir ranks --copy_tokenizer"],
    "docs/quantization.md": [
        "headrace calibrate Llama-3.1-8B --output scales.safetensors --calibration_tokens tokens.safetensors --awq_group_size 128"
    ],
    "docs/batches.md": ["headrace convert --model_dir models/llama-small --output_dir /ranks/llama-small-tp1"],
}
WITH_COMMANDS = [
    page
    for page in PAGES
    if any((block.mark and block.mark.kind == "python") or any(ran for _, ran in block.commands()) for block in blocks(page))
]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    return folder


def run(line: str, folder: Path, code: int = 0) -> None:
    """A line of the shell that begins with `headrace`, without a shell: patterns are looked up.

    Each example of a conversion finds its output directory empty, as pages call all of them `ranks`, and one of a calibration no
    file in its place.
    """
    words = shlex.split(placed(line, folder), comments=True)
    assert words[0] in ("headrace", ".venv/bin/headrace"), f"no test runs {line!r}: say why in a comment before it"
    found = [word for given in words[1:] for word in (sorted(map(str, Path().glob(given))) if "*" in given else [given])]
    if words[1] in ("convert", "plan") and "--output_dir" in words:
        shutil.rmtree(folder / words[words.index("--output_dir") + 1], ignore_errors=True)
    if words[1] == "calibrate":
        (folder / words[words.index("--output") + 1]).unlink(missing_ok=True)  # what others of the page take
    ran = headrace(*found)
    assert ran.code == code, f"{line}\n{ran.err}{ran.out}"


def do(block: Block, folder: Path) -> None:
    """Write the file that a block is, or run what is in it."""
    if block.mark and block.mark.kind == "file":
        path = folder / block.mark.value
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(placed(block.text, folder))
    elif block.kind == "python" and block.mark and block.mark.kind == "python":
        shutil.rmtree(folder / "ranks", ignore_errors=True)
        exec(compile(placed(block.text, folder), f"block at line {block.line}", "exec"), {"__name__": "example"})
    for line, ran in block.commands():
        if ran:
            run(line, folder, block.exit_code)


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name_of)
def test_a_page_does_as_it_says(page: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path, made)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for line in BEFORE.get(name_of(page), []):
        run(line, tmp_path)
    for block in blocks(page):
        do(block, tmp_path)


def test_pages_with_commands_are_found() -> None:
    assert len(WITH_COMMANDS) >= 9


def commands_of_ours() -> list[Any]:
    return [
        pytest.param(line, id=f"{name_of(page)}:{block.line}:{line[:50]}")
        for page in PAGES
        for block in blocks(page)
        for line, _ in block.commands()
        if line.startswith(("headrace ", ".venv/bin/headrace ")) and "..." not in line and "[" not in line
    ]


@pytest.mark.parametrize("line", commands_of_ours())
def test_a_command_and_its_flags_exist(line: str) -> None:
    """Also of commands that are not run: what is taken apart here is not begun."""
    words = shlex.split(line, comments=True)[1:]
    command: Any = typer.main.get_command(app)
    context = command.make_context("headrace", words, resilient_parsing="--version" in words)
    while context is not None and hasattr(command, "get_command"):
        left = [*context._protected_args, *context.args]
        if not left:
            return
        name, command, rest = command.resolve_command(context, left)
        context = command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_examples_of_toml_and_python_can_be_read(page: Path) -> None:
    for block in blocks(page):
        if block.kind == "toml":
            tomllib.loads(block.text)
        elif block.kind == "python":
            compile(block.text, f"{page}:{block.line}", "exec", dont_inherit=True)


def test_a_block_is_taken_apart(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- not run (serve): a daemon -->\n```sh\nheadrace plan job.toml   # a comment\nheadrace serve s.toml\n```\n\n"
        "<!-- not run: elsewhere -->\n```sh\nmake test\n```\n\ntext\n\n    headrace families\n    a line of output\n\n"
        "```text\n$ headrace formats\nout\n```\n"
    )
    found = [command for block in blocks(page) for command in block.commands()]
    assert found == [
        ("headrace plan job.toml", True),
        ("headrace serve s.toml", False),
        ("make test", False),
        ("headrace families", True),
        ("headrace formats", True),
    ]
