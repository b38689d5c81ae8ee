"""trtllm-build's options: what its help says, what the table of 1.2.1 says, and the words that a request becomes."""

from __future__ import annotations

import re
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cli.build import split_words
from pipeline.planning.builder_options import (
    BuilderOption,
    arguments,
    check_options,
    command_words,
    known_options,
    parse_help,
)
from tests import stand_ins

TABLE = known_options()
FLAGS = sorted(name for name, option in TABLE.items() if option.values == "none" and not option.refused)
SINGLE = sorted(name for name, option in TABLE.items() if option.values == "one" and not option.choices and option.type == "text")
LISTS = sorted(name for name, option in TABLE.items() if option.values == "many")


@pytest.fixture(scope="module")
def help_text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    command = stand_ins.install(tmp_path_factory.mktemp("bin"))
    return {
        columns: subprocess.run([command, "--help"], env={"COLUMNS": columns}, capture_output=True, text=True, check=True).stdout
        for columns in ("50", "80", "200")
    }


@pytest.mark.parametrize("columns", ["50", "80", "200"])
def test_help_is_read_whatever_its_width(help_text: dict[str, str], columns: str) -> None:
    options = parse_help(help_text[columns])
    assert options["max_batch_size"] == BuilderOption("one", "int")
    assert options["strip_plan"].values == "none"
    assert options["lora_dir"] == BuilderOption("many", "path")
    assert options["lora_target_modules"].choices == ("attn_qkv", "attn_q", "mlp_gate")
    assert options["gemm_plugin"].choices == ("auto", "float16", "float32", "bfloat16", "int32", "fp8", "nvfp4", "disable")
    assert options["max_decoder_seq_len"] == options["max_seq_len"] == BuilderOption("one", "int")
    assert options["dry_run"].refused
    assert options["workers"].inert


def test_the_table_has_the_options_that_the_help_lists(help_text: dict[str, str]) -> None:
    assert parse_help(help_text["80"]).keys() == TABLE.keys()


def test_the_table_and_the_help_agree_on_values(help_text: dict[str, str]) -> None:
    listed = parse_help(help_text["80"])
    differing = {name for name in TABLE if (TABLE[name].values, TABLE[name].choices) != (listed[name].values, listed[name].choices)}
    # The stand-in lists fewer modules and modes than there are.
    assert differing == {"lora_target_modules", "speculative_decoding_mode"}


@pytest.mark.parametrize(
    "text", ["", "usage: something [-h]\n  -h, --help  show this\n", "Traceback (most recent call last):\n  --x y"]
)
def test_what_is_no_help_lists_nothing(text: str) -> None:
    assert parse_help(text) == {}


@pytest.mark.parametrize(
    ("values", "found", "expected"),
    [
        ({"max_batchsize": 8}, "--max_batchsize: found an option that trtllm-build does not have", "such as max_batch_size"),
        ({"zzz": 8}, "--zzz: found an option that trtllm-build does not have", "that trtllm-build --help lists"),
        ({"gemm_plugin": "bf16"}, "--gemm_plugin: found bf16", "one of auto, float16"),
        ({"max_batch_size": "many"}, "--max_batch_size: found many", "a whole number"),
        ({"max_batch_size": 1.5}, "--max_batch_size: found 1.5", "a whole number"),
        ({"max_batch_size": []}, "--max_batch_size: found no value", "one value"),
        ({"max_batch_size": [1, 2]}, "--max_batch_size: found 1 2", "one value"),
        ({"max_batch_size": True}, "--max_batch_size: found no value", "one value"),
        ({"strip_plan": "yes"}, "--strip_plan: found yes", "no value"),
        ({"lora_dir": []}, "--lora_dir: found no value", "one value or more"),
        ({"dry_run": True}, "--dry_run: found an option that headrace does not pass on", "--print_command"),
        ({"checkpoint_dir": "x"}, "--checkpoint_dir: found an option that headrace does not pass on", "headrace build"),
    ],
    ids=str,
)
def test_what_the_builder_would_not_take_is_named(values: dict[str, object], found: str, expected: str) -> None:
    (problem,) = map(str, check_options(arguments(values, TABLE), TABLE))
    assert problem.startswith(found)
    assert expected in problem


def test_values_of_a_job_file_become_words() -> None:
    values = {
        "max_batch_size": 8,
        "context_fmha": True,
        "paged_state": False,
        "strip_plan": True,
        "fast_build": False,
        "lora_dir": ["a", "b"],
    }
    words = arguments(values, TABLE)
    assert command_words(words) == [
        *("--max_batch_size", "8", "--context_fmha", "enable", "--paged_state", "disable"),
        *("--strip_plan", "--lora_dir", "a", "b"),
    ]
    assert check_options(words, TABLE) == []


values = st.one_of(
    st.tuples(st.sampled_from(FLAGS), st.just(())),
    st.tuples(st.sampled_from(SINGLE), st.tuples(st.from_regex(r"[a-z0-9/.=_]{1,8}", fullmatch=True))),
    st.tuples(
        st.sampled_from(LISTS), st.lists(st.from_regex(r"[a-z0-9/.=]{1,8}", fullmatch=True), min_size=1, max_size=3).map(tuple)
    ),
)


@given(st.lists(values, max_size=6, unique_by=lambda pair: pair[0]).map(dict), st.booleans(), st.booleans())
def test_a_command_line_comes_back_from_its_words(chosen: dict[str, tuple[str, ...]], dashed: bool, first: bool) -> None:
    words = command_words(chosen)
    if dashed:
        words = [re.sub("(?<=.)_", "-", word) if word.startswith("--") else word for word in words]
    # After an option of many values nothing says where they end.
    words = ["CHECKPOINT", *words] if first or set(chosen) & set(LISTS) else [*words, "CHECKPOINT"]
    places, split = split_words(words, TABLE)
    assert places == ["CHECKPOINT"]
    assert arguments(split, TABLE) == chosen


@pytest.mark.parametrize(
    ("words", "split"), [(["--workers=4"], {"workers": ["4"]}), (["--max_num_tokens", "-1"], {"max_num_tokens": ["-1"]})]
)
def test_values_behind_an_equals_sign_and_negative_ones(words: list[str], split: dict[str, list[str]]) -> None:
    assert split_words([*words, "C"], TABLE) == (["C"], split)
