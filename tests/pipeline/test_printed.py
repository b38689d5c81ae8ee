"""Texts of strangers on a terminal: nothing steers it, nothing makes a second line, nothing is markup, and nothing is endless."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.table import Table
from safetensors.numpy import load_file, save_file

from pipeline.errors import BadInput, Problem, VerificationFailed, WriteFailed
from pipeline.printed import LONGEST, escaped, printed, shortened
from pipeline.watching.bar import ProgressBar
from pipeline.watching.consoles import PlainConsole
from pipeline.watching.state import RunWatch
from tests.support import checkpoints
from tests.support.commands import convert, headrace, one, refused

STEERING = "\x1b[2J\r\x07\x9b31m\u202e\u2066\u200b\x00\udc80"


def test_what_steers_a_terminal_is_escaped_and_letters_of_all_scripts_are_not() -> None:
    assert escaped(STEERING) == r"\x1b[2J\r\x07\x9b31m\u202e\u2066\u200b\x00\udc80"
    assert escaped("Modell/模型/модель/C:\\new") == "Modell/模型/модель/C:\\new"
    assert escaped("a\nb") == r"a\nb"
    assert escaped("a\nb", keep="\n") == "a\nb"


def test_a_long_text_keeps_its_two_ends_and_says_its_length() -> None:
    text = "a" * 50_000 + "z" * 50_000
    assert len(shortened(text)) < LONGEST + 50
    assert shortened(text).startswith("aaa")
    assert shortened(text).endswith("zzz")
    assert "[... of 100,000 characters ...]" in shortened(text)
    assert shortened("a" * LONGEST) == "a" * LONGEST
    assert printed("\x1b" * 5_000).count("\\x1b") == LONGEST


@pytest.mark.parametrize("part", ["subject", "found", "expected", "remedy"])
def test_each_part_of_a_problem_is_one_line_of_bounded_length(part: str) -> None:
    parts = {"subject": "a", "found": "b", "expected": "c", "remedy": "d"} | {part: "\x1b[31m\nline" + "x" * 100_000}
    text = str(Problem(**parts))
    assert text.isprintable()
    assert len(text) < LONGEST + 200
    assert Problem(**parts).found == parts["found"]  # the value itself is as it was


@pytest.mark.parametrize("kind", [BadInput, VerificationFailed])
def test_thousands_of_problems_are_the_first_ones_and_their_number(kind: Any) -> None:
    text = str(kind([Problem(f"t{n}\x1b", "a", "b") for n in range(5_000)]))
    lines = text.splitlines()
    assert len(lines) == kind.shown + 2
    assert "5,000" in lines[0]
    assert lines[-1] == f"  ... and {5_000 - kind.shown} more"
    assert "\x1b" not in text


def test_an_error_with_a_path_is_escaped() -> None:
    assert str(WriteFailed("/tmp/\x1b[31m: no space\nThe files are named *.partial")) == (
        "/tmp/\\x1b[31m: no space\nThe files are named *.partial"
    )


def drawn(*things: Any, terminal: bool = False) -> str:
    stream = io.StringIO()
    PlainConsole(file=stream, width=200, force_terminal=terminal).print(*things)
    return stream.getvalue()


@pytest.mark.parametrize("text", ["[/b]", "ranks[fast]", "[red]x[/red]", ":smile:", "[link=http://x]y", "[[", "\\[b]"])
def test_no_string_is_markup(text: str) -> None:
    assert drawn(text).strip() == text
    table = Table()
    table.add_column(text)
    table.add_row(text)
    assert drawn(table).count(text) == 2


def test_a_table_on_a_terminal_holds_no_escapes_of_its_cells() -> None:
    table = Table()
    table.add_column("file")
    table.add_row(f"a{STEERING}\nb")
    shown = drawn(table, terminal=True)
    assert "a\\x1b[2J" in shown
    assert not {"\x1b[2J", "\u202e", "\x07", "\x9b"} & {each for each in ("\x1b[2J", "\u202e", "\x07", "\x9b") if each in shown}


def test_the_progress_bar_takes_a_plans_notes_as_they_are() -> None:
    bar = ProgressBar(stream := io.StringIO(), RunWatch())
    said = ("transformer.layers.0.[/b]\x1b[2J", "a[/b]c[fast]")
    plan: Any = SimpleNamespace(job=SimpleNamespace(scheduler="threads"), scratch=(), notes=said, left_out={})
    bar.started(plan, "", 1, 0, 0)
    bar.finished()
    assert "\x1b[2J" not in stream.getvalue()
    assert "transformer.layers.0.[/b]\\x1b[2J\na[/b]c[fast]\n" in stream.getvalue()


@pytest.mark.parametrize("name", ["ranks[fast]", "a[/b]c", "x\x1b[31m\ny", "weights \u202etxt"])
def test_a_conversion_into_a_directory_of_any_name_ends_well(tmp_path: Path, name: str) -> None:
    checkpoints.write(tmp_path / name / "model[/red]", checkpoints.LLAMA)
    ran = convert(tmp_path / name / "model[/red]", tmp_path / name / "out[/b]")
    assert ran.code == 0, ran
    assert escaped(name) in (ran.out + ran.err).replace("\n", "") or len(str(tmp_path)) > 60
    again = convert(tmp_path / name / "model[/red]", tmp_path / name / "out[/b]")
    assert again.code == 0
    assert f"{escaped(name)}/out[/b] is up to date" in again.out
    for command in ("plan", "inspect", "verify"):
        arguments = {
            "plan": ("plan", "--model_dir", tmp_path / name / "model[/red]", "--output_dir", tmp_path / name / "new[/b]"),
            "inspect": ("inspect", tmp_path / name / "model[/red]"),
            "verify": ("verify", tmp_path / name / "out[/b]"),
        }[command]
        told = headrace(*arguments)
        assert told.code == 0, told
        assert not {"\x1b", "\u202e"} & set(told.out + told.err)


def test_a_tensors_name_cannot_speak_for_headrace(tmp_path: Path) -> None:
    model = tmp_path / "model"
    checkpoints.write(model, checkpoints.LLAMA)
    tensors = load_file(model / "model.safetensors")
    name = "model.x\nheadrace: done\x1b[2J\u202e" + "y" * 100_000
    save_file({**tensors, name: tensors["model.norm.weight"]}, model / "model.safetensors", metadata={"format": "pt"})
    problem = one(refused(model))
    assert problem.startswith("model.x\\nheadrace: done\\x1b[2J\\u202eyyy")
    assert len(problem) < 4 * LONGEST
    assert "characters ...]" in problem


def test_a_value_of_config_json_cannot_either(tmp_path: Path) -> None:
    model = tmp_path / "model"
    checkpoints.write(model, checkpoints.LLAMA)
    (model / "config.json").write_text(json.dumps({**checkpoints.LLAMA, "architectures": ["\x1b]0;x\x07\nA" + "b" * 100_000]}))
    problem = one(refused(model))
    assert "\\x1b]0;x\\x07\\nAbbb" in problem
    assert len(problem) < 4 * LONGEST
