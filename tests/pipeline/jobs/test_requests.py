"""What a batch asks for: files, directories, patterns and matrices, and every mistake in them by name."""

from __future__ import annotations

import itertools
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import BadInput
from pipeline.jobs.files import job_file, validate
from pipeline.jobs.matrix import expand
from pipeline.jobs.requests import BatchFile, Request, gather
from pipeline.model.tables import CONFIGS
from pipeline.planning.job import make_job
from pipeline.planning.quantizations import QUANTIZATIONS

BATCHES = sorted((CONFIGS / "batches").glob("*.toml"))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def names(requests: tuple[Request, ...]) -> list[str]:
    return [request.name for request in requests]


def test_files_directories_and_patterns_in_the_order_of_their_naming(tmp_path: Path) -> None:
    for name in ("b", "a", "more/x", "more/y", "other/x"):
        write(tmp_path / f"{name}.toml", f'model_dir = "m"\noutput_dir = "{name}"\n')
    asked = gather(["b.toml", "more", "*/x.toml"], tmp_path)
    assert [Path(request.where).relative_to(tmp_path).as_posix() for request in asked.requests] == [
        "b.toml",
        "more/x.toml",
        "more/y.toml",
        "more/x.toml",
        "other/x.toml",
    ]
    jobs = [request.job for request in asked.requests if request.job]
    assert jobs[1].model_dir == tmp_path / "more/m", "paths are relative to their file"
    assert {job.scheduler for job in jobs} == {"threads"}


def test_a_job_that_names_a_scheduler_has_it(tmp_path: Path) -> None:
    file = write(tmp_path / "a.toml", 'model_dir = "m"\noutput_dir = "o"\nscheduler = "local"\n')
    (request,) = gather([str(file)], tmp_path).requests
    assert request.job
    assert request.job.scheduler == "local"


CLUSTER = 'cluster = { class = "distributed.LocalCluster", n_workers = 1 }\n'


def test_a_job_that_names_a_cluster_has_that_and_no_scheduler(tmp_path: Path) -> None:
    file = write(tmp_path / "a.toml", f'model_dir = "m"\noutput_dir = "o"\n{CLUSTER}')
    table = f'model_dir = "m"\noutput_dir = "NAME"\n{CLUSTER}'
    batch = write(tmp_path / "batch.toml", f"[[job]]\n{table.replace('NAME', 'x')}[[matrix]]\n{table.replace('NAME', 'y')}")
    requests = gather([str(file), str(batch)], tmp_path).requests
    assert [request.problems for request in requests] == [(), (), ()]
    for request in requests:
        assert request.job
        assert request.job.elsewhere
        assert "scheduler" not in request.job.model_fields_set


def test_a_job_file_that_names_two_clusters_is_refused_alone(tmp_path: Path) -> None:
    write(tmp_path / "a.toml", f'model_dir = "m"\noutput_dir = "o"\nscheduler = "threads"\n{CLUSTER}')
    write(tmp_path / "b.toml", 'model_dir = "m"\noutput_dir = "p"\n')
    wrong, right = gather([str(tmp_path)], tmp_path).requests
    assert wrong.job is None
    assert str(wrong.problems[0]).startswith("cluster.class: found --scheduler threads beside it")
    assert right.job


def test_a_job_file_that_is_wrong_is_a_request_that_is(tmp_path: Path) -> None:
    write(tmp_path / "a.toml", 'model_dir = "m"\noutput_dir = "o"\ntp_size = 0\n')
    write(tmp_path / "b.toml", "not toml")
    write(tmp_path / "c.toml", 'model_dir = "m"\noutput_dir = "o"\n')
    requests = gather([str(tmp_path)], tmp_path).requests
    assert [request.job is None for request in requests] == [True, True, False]
    assert str(requests[0].problems[0]).startswith(f"{tmp_path / 'a.toml'}: tp_size: found 0;")
    assert "text that is not TOML" in str(requests[1].problems[0])


def test_a_batch_file_with_everything(tmp_path: Path) -> None:
    write(tmp_path / "jobs/one.toml", 'model_dir = "m"\noutput_dir = "one"\n')
    batch = write(
        tmp_path / "batch.toml",
        """
        max_jobs = 3
        max_memory = "2GiB"
        files = ["jobs/*.toml"]
        [retry]
        attempts = 2
        [defaults]
        dtype = "bfloat16"
        scratch = "cuts"
        [[job]]
        model_dir = "m"
        output_dir = "two"
        [[job]]
        model_dir = "m"
        dtype = "float16"
        [[job.target]]
        output_dir = "three"
        [[matrix]]
        model_dir = "m"
        tp_size = [1, 2]
        output_dir = "ranks/{model}-{tp_size}"
        """,
    )
    asked = gather([str(batch)], tmp_path)
    assert (asked.settings.max_jobs, asked.settings.max_memory, asked.settings.retry.attempts) == (3, 2 << 30, 2)
    assert names(asked.requests) == ["one", "two", "three", "m-1", "m-2"]
    jobs = [request.job for request in asked.requests if request.job]
    assert [job.dtype for job in jobs] == ["auto", "bfloat16", "float16", "bfloat16", "bfloat16"]
    assert [job.scratch for job in jobs[1:]] == [str(tmp_path / "cuts")] * 4
    assert [str(target.output_dir) for job in jobs for target in job.targets] == [
        str(tmp_path / each) for each in ("jobs/one", "two", "three", "ranks/m-1", "ranks/m-2")
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "jobs = []\n[[job]]\nmodel_dir = 'm'",
            "batch.toml: jobs: found a key that headrace does not have; expected cluster, defaults, files,",
        ),
        ("max_jobs = 0\n[[job]]", "batch.toml: max_jobs: found 0; expected 1 or more"),
        (
            "[[job]]\n[retry]\ntimes = 3",
            "batch.toml: retry.times: found a key that headrace does not have; expected attempts, factor",
        ),
        ("[[job]]\n[retry]\nfactor = 'x'", "batch.toml: retry.factor: found 'x'; expected a number"),
        ("files = ['no/*.toml']", "no/*.toml: found nothing; expected a pattern that some job file's path fits"),
        ("files = ['batch.toml']", "batch.toml: files: found a batch file that names itself"),
        ("[[matrix]]\nmodel_dir = 'm'", "batch.toml: matrix.0.output_dir: found None; expected a text such as"),
        (
            "[[matrix]]\nmodel_dir = 'm'\ntp = 1\noutput_dir = 'o'",
            "batch.toml: matrix.0.tp: found an option that headrace does not",
        ),
        ("[[matrix]]\nmodel_dir = []\noutput_dir = 'o'", "batch.toml: matrix.0.model_dir: found an empty list"),
        ("[[matrix]]\nmodel_dir = 'x-*'\noutput_dir = 'o'", "batch.toml: matrix.0.model_dir: found nothing at x-*"),
        ("[[matrix]]\nmodel_dir = 'm'\ntp_size = [1, 2]\noutput_dir = 'o'", "o for two of them; expected a directory for each"),
        ("[[matrix]]\nmodel_dir = 'm'\noutput_dir = '{x}'", "found {x}; expected one of model, model_dir"),
        ("[[matrix]]\nmodel_dir = 'm'\noutput_dir = '{'", "matrix.0.output_dir: found '{'"),
        (
            "[[matrix]]\nmodel_dir = 'm'\nquantization = 'int3'\noutput_dir = 'o'",
            "matrix.0.quantization: found 'int3'; expected of none",
        ),
        ("[[matrix]]\nmodel_dir = 'm'\noutput_dir = 'o'\nexclude = [{model_dir = 'm'}]", "no combination that is not excluded"),
        ("[[matrix]]\nmodel_dir = 'm'\noutput_dir = 'o'\nexclude = 3", "matrix.0.exclude: found 3; expected a list of tables"),
    ],
)
def test_what_is_wrong_with_a_batch_is_said_before_anything_begins(tmp_path: Path, text: str, found: str) -> None:
    write(tmp_path / "batch.toml", text)
    with pytest.raises(BadInput) as refusal:
        gather([str(tmp_path / "batch.toml")], tmp_path)
    assert found in str(refusal.value)


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as refusal:
        gather(["no-*.toml", "gone-*.toml"], tmp_path)
    assert len(refusal.value.problems) == 2


def test_a_job_of_a_batch_that_is_wrong_is_named_by_its_place(tmp_path: Path) -> None:
    batch = write(
        tmp_path / "batch.toml", "[[job]]\nmodel_dir = 'm'\noutput_dir = 'o'\n[[job]]\nmodel_dir = 'm'\ntp_size = 'two'\n"
    )
    good, bad = gather([str(batch)], tmp_path).requests
    assert good.job
    assert [str(problem).split(": found")[0] for problem in bad.problems] == [
        f"{batch}: job.1.tp_size",
        f"{batch}: job.1.output_dir",
    ]


AXES = {
    "tp_size": st.lists(st.integers(1, 64), min_size=1, max_size=3, unique=True),
    "pp_size": st.lists(st.integers(1, 8), min_size=1, max_size=2, unique=True),
    "dtype": st.lists(st.sampled_from(["auto", "float16", "bfloat16"]), min_size=1, max_size=3, unique=True),
    "quantization": st.lists(st.sampled_from(sorted(QUANTIZATIONS)), min_size=1, max_size=3, unique=True),
    "model_dir": st.lists(st.sampled_from(["/m/a", "/m/b", "/n/c", "org/d"]), min_size=1, max_size=3, unique=True),
}


@given(st.fixed_dictionaries(AXES), st.data())
def test_a_matrix_is_every_combination_once(axes: dict[str, list[Any]], data: st.DataObject) -> None:
    excluded = {key: data.draw(st.sampled_from(values)) for key, values in axes.items() if data.draw(st.booleans())}
    template = "/o/{model}-{tp_size}-{pp_size}-{dtype}-{quantization}"
    wanted = [dict(zip(axes, each, strict=True)) for each in itertools.product(*axes.values())]
    wanted = [each for each in wanted if not excluded or any(each[key] != value for key, value in excluded.items())]
    table = {**axes, "output_dir": template, "exclude": [excluded] if excluded else []}
    if not wanted:
        with pytest.raises(BadInput):
            expand(table, Path("/"), "here")
        return
    made = expand(table, Path("/"), "here")
    assert len(made) == len(wanted)
    for options, each in zip(made, wanted, strict=True):
        name = each["model_dir"].rpartition("/")[2]
        directory = Path(f"/o/{name}-{each['tp_size']}-{each['pp_size']}-{each['dtype']}-{each['quantization']}")
        shape = {key: each[key] for key in ("tp_size", "pp_size", "dtype")}
        expected = {**shape, "model_dir": each["model_dir"], "output_dir": directory, "quantization": each["quantization"]}
        assert {key: str(value) for key, value in options.items()} == {key: str(value) for key, value in expected.items()}


def test_patterns_of_sources_are_looked_up_once_each_and_in_order(tmp_path: Path) -> None:
    for name in ("llama-b", "llama-a", "[odd]"):
        (tmp_path / name).mkdir()
    table = {"model_dir": ["llama-*", "llama-a", "[odd]"], "output_dir": "o/{model}"}
    with pytest.raises(BadInput, match=r"nothing at \[odd\]"):
        expand(table, tmp_path, "here")
    found = expand({**table, "model_dir": ["llama-*", str(tmp_path / "llama-a")]}, tmp_path, "here")
    assert [Path(options["model_dir"]).name for options in found] == ["llama-a", "llama-b"]
    (literal,) = expand({**table, "model_dir": [str(tmp_path / "[odd]")]}, tmp_path, "here", patterns=False)
    assert literal["output_dir"] == tmp_path / "o/[odd]"


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(TEXT, TEXT, st.lists(st.sampled_from(["read", "unpack"]), max_size=2), st.booleans())
def test_a_job_file_reads_back_as_what_it_was_made_of(name: str, more: str, after: list[str], keep: bool) -> None:
    options = {"model_dir": f"/m/{name}", "scratch_after": after, "keep_scratch": keep, "memory_limit": 1 << 31}
    options["target"] = [{"output_dir": f"/o/{more}", "tp_size": 2}, {"output_dir": "/x"}]
    assert tomllib.loads(job_file(options)) == options


def test_a_job_comes_back_from_its_file(tmp_path: Path) -> None:
    job = make_job({"model_dir": "/m", "target": [{"output_dir": "/a"}, {"output_dir": "/b", "tp_size": 2}], "dtype": "float16"})
    file = write(tmp_path / "job.toml", job_file(job.model_dump(mode="json", exclude_defaults=True)))
    assert make_job({}, file).targets == job.targets
    assert make_job({}, file).model_dir == job.model_dir


@pytest.mark.parametrize("file", BATCHES, ids=lambda path: path.stem)
def test_every_example_loads(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The models that the examples name are on other machines.
    monkeypatch.setattr("pipeline.jobs.matrix.glob.glob", lambda pattern: [pattern.replace("*", "3-8b")])
    asked = gather([str(file)], Path.cwd())
    assert len(asked.requests) >= 3
    assert [request.problems for request in asked.requests if request.job is None] == []


def test_keys_of_every_table_are_known_in_reports() -> None:
    with pytest.raises(BadInput, match=r"x: retry.y: .* expected attempts, factor, first_seconds, longest_seconds"):
        validate(BatchFile, {"retry": {"y": 1}}, "x")


def test_the_example_of_the_documents_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (CONFIGS.parent / "docs/batches.md").read_text()
    file = write(tmp_path / "batch.toml", text.split("```toml\n")[1].split("```")[0])
    monkeypatch.setattr("pipeline.jobs.matrix.glob.glob", lambda pattern: [pattern.replace("*", "a")])
    asked = gather([str(file)], tmp_path)
    assert names(asked.requests) == ["llama-small-int8", "a-tp1", "a-tp2", "a-tp3"]
    assert all(request.job for request in asked.requests)
