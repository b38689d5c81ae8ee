"""Mistakes of a command line: sentences, with the name that was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.commands import headrace


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("convert --tp_siz 2", "no option --tp_siz; did you mean --tp_size?"),
        ("convert --tp-siz 2", "no option --tp_siz; did you mean --tp_size?"),
        ("convert --gemm_plugin auto", "no option --gemm_plugin: it is one of trtllm-build's; give it to headrace build"),
        ("convert --zzzz", "no option --zzzz\n"),
        ("verify --logit", "no option --logit; did you mean --logits?"),
        ("verfy out", "no command verfy; did you mean verify?"),
        ("verify a b", "b: found an argument too many; expected options by their names"),
        ("convert --tp_size", "--tp_size: found nothing after it; expected a value"),
        ("generate out", "--prompt: found nothing; expected a value"),
        ("--versoin", "no option --versoin; did you mean --version?"),
    ],
)
def test_a_command_line_that_is_none(words: str, said: str) -> None:
    ran = headrace(*words.split())
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err
    assert " --help\n" in ran.err
    assert "nothing was written" not in ran.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--tp_size x", "--tp_size: found 'x'; expected a whole number"),
        ("--tp_size 0", "--tp_size: found '0'; expected 1 or more"),
        ("--dtype flaot16", "--dtype: found 'flaot16'; expected auto, float16, bfloat16 or float32. Did you mean float16?"),
        ("--smoothquant 2", "--smoothquant: found '2'; expected 1 or less"),
        ("--memory_limit lots", "--memory_limit: found 'lots'; expected a size such as 2GiB"),
        ("--embedding_sharding_dim 2", "--embedding_sharding_dim: found 2; expected 0 or 1"),
        ("--scratch_after reed", "found 'reed'; expected read, rename, unpack, shard, auto or none. Did you mean read?"),
    ],
)
def test_a_wrong_value_is_a_sentence(flags: str, said: str, tmp_path: Path) -> None:
    ran = headrace("convert", "--model_dir", tmp_path, "--output_dir", tmp_path / "out", *flags.split())
    assert ran.code == 2
    assert said in ran.err
    assert "input should" not in ran.err.lower()


def test_all_wrong_values_are_said_at_once(tmp_path: Path) -> None:
    ran = headrace("plan", "--model_dir", tmp_path, "--output_dir", tmp_path, "--tp_size", "x", "--dtype", "float8")
    assert "--tp_size: found" in ran.err
    assert "--dtype: found" in ran.err


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (
            "tpsize = 2",
            "job.toml: tpsize: found an option that headrace does not have; expected one that `headrace convert --help` ",
        ),
        ("tpsize = 2", "--help` lists. Did you mean tp_size?"),
        ("world_size = 2", "job.toml: world_size: found a flag of NVIDIA's, another name of tp_size; expected tp_size"),
        ("n_layer = 2", "Leave it out, or write num_hidden_layers into the table `expect`"),
        ("qformat = 'fp8'", "job.toml: qformat: found a flag of NVIDIA's that is not taken"),
        ("model_dir = 3", "job.toml: model_dir: found 3; expected a text"),
    ],
)
def test_a_job_files_key_that_is_none(key: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(f"{key}\n")
    ran = headrace("convert", tmp_path / "job.toml", *(() if "model_dir" in key else ("--model_dir", tmp_path)))
    assert ran.code == 2
    assert said in ran.err
    assert "cp_size" not in ran.err  # of all names, that which was meant


@pytest.mark.parametrize("command", ["plan", "inspect", "verify"])
def test_what_writes_nothing_does_not_say_so(command: str, tmp_path: Path) -> None:
    words = ("--model_dir", tmp_path, "--output_dir", tmp_path / "out") if command == "plan" else (tmp_path,)
    ran = headrace(command, *words)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.splitlines()[0] in ("headrace: 1 problem:", "headrace: 2 problems:")


def test_what_would_write_says_that_it_did_not(tmp_path: Path) -> None:
    ran = headrace("convert", "--model_dir", tmp_path, "--output_dir", tmp_path / "out")
    assert ran.err.splitlines()[0] == "headrace: 1 problem, nothing was written:"


def test_options_of_a_list_before_another_command_are_refused() -> None:
    ran = headrace("jobs", "--state", "failed", "--limit", 3, "--json", "show", 1)
    assert ran.code == 2, ran
    subjects = [line.removeprefix("  - ").partition(": found it before `show`")[0] for line in ran.err.splitlines()[1:]]
    assert subjects == ["--state failed", "--limit 3", "--json"]
