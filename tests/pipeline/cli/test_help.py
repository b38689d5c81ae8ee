"""Help pages: groups, whole names and choices at every width, defaults as people write them, an example of each command."""

from __future__ import annotations

import re
import sys

import pytest

from pipeline.cli.help import NARROWEST, WIDEST
from pipeline.cli.options import IN_FILES_ALONE, PANELS
from pipeline.planning.builder_options import known_options
from pipeline.planning.job import Job
from pipeline.planning.nvidia_table import nvidia_flags
from tests.support.commands import headrace

COMMANDS = (
    "convert",
    "plan",
    "build",
    "calibrate",
    "inspect",
    "families",
    "formats",
    "verify",
    "generate",
    "report",
    "batch",
    "serve",
    "unlock",
    "scratch ls",
    "scratch rm",
    "jobs list",
    "jobs show",
    "jobs logs",
    "jobs cancel",
    "jobs retry",
)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch):
    def read(command: str, columns: int) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        ran = headrace(*command.split(), "--help")
        assert (ran.code, ran.err) == (0, "")
        return ran.out

    return read


def unwrapped(text: str) -> str:
    return " ".join(text.split())


def test_each_option_of_a_job_is_in_one_group() -> None:
    names = [name for group in PANELS.values() for name in group]
    assert len(names) == len(set(names))
    assert set(names) | IN_FILES_ALONE == Job.model_fields.keys()


@pytest.mark.parametrize("columns", [80, 140])
@pytest.mark.parametrize("command", ["convert", "plan"])
def test_no_name_and_no_choice_is_cut(page, command: str, columns: int) -> None:
    text = page(command, columns)
    assert "…" not in text
    lines = text.splitlines()
    assert max(map(len, lines)) <= min(columns, WIDEST)
    shown = {word for line in lines for word in re.findall(r"^  (--\w+)", line)}
    assert shown >= {f"--{name}" for group in PANELS.values() for name in group}
    assert shown >= {f"--{flag.name}" for flag in nvidia_flags().values() if not flag.refused}
    said = unwrapped(text)
    assert "Choices: int8, int4, int4_gptq, int8_gptq, int4_awq. Default: int8." in said
    assert all(f"\n{group}:\n" in text for group in PANELS)


def test_defaults_are_as_people_write_them(page) -> None:
    said = unwrapped(page("convert", 80))
    assert "unpack, shard; auto; none. Default: auto." in said
    assert "such as 2GiB. Default: 2GiB." in said
    assert "None" not in said
    assert "('" not in said


def test_brackets_are_no_markup(page) -> None:
    assert "A job file's [engine] table has each target's engine built" in unwrapped(page("convert", 80))


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_an_example_with_options_of_its_own(page, command: str) -> None:
    text = page(command, 80)
    example = text[text.index("Example") :].splitlines()[1].strip()
    assert example.startswith(f"headrace {command} ") or example == f"headrace {command}"
    known = set(re.findall(r"^  (--\w+)", text, re.MULTILINE)) | {f"--{name}" for name in known_options() if command == "build"}
    assert set(re.findall(r"--\w+", example)) <= known
    assert max(map(len, text.splitlines())) <= 80


def test_all_commands_are_listed(page) -> None:
    listed = set(re.findall(r"^  ([a-z]+)  ", page("", 80), re.MULTILINE))
    assert listed == {command.split()[0] for command in COMMANDS}


@pytest.mark.parametrize("columns", [1, NARROWEST, 1000])
def test_odd_widths(page, columns: int) -> None:
    assert "--remove_duplicated_kv_heads" in page("convert", columns)


def test_without_a_command_it_says_what_to_do_first() -> None:
    ran = headrace()
    assert (ran.code, ran.err) == (0, "")
    assert [line.split()[1] for line in ran.out.splitlines() if line.startswith("  headrace ")] == [
        "inspect",
        "plan",
        "convert",
        "verify",
    ]


@pytest.mark.parametrize("command", ["convert", "verify", "batch", "scratch"])
def test_a_command_without_words_is_its_help_and_exits_2(command: str) -> None:
    ran = headrace(command)
    assert ran.code == 2
    assert ran.out.startswith(f"Usage: headrace {command} ")


def test_help_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich, which is slow to import, is for tables alone."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    assert headrace("convert", "--help").code == 0
    assert "rich" not in sys.modules
