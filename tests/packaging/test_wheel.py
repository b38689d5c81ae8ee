"""What users install: the wheel, built from the source distribution, in an environment that has never seen the repository.

The environment's other packages are links to those of this one, without headrace: nothing is fetched. So what is proved is what the
distributions hold and that it works alone; that pip finds the dependencies is for whoever installs this repository for the tests.
"""

from __future__ import annotations

import email
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support import checkpoints
from tests.support.built_kernels import CAN_BUILD
from tests.support.commands import convert, headrace, tree
from tests.support.places import ROOT

KERNELS = ("stages/quantization/kernels", "stages/verify/kernels")
# A third of the work: this repository's own installation has all levels, which the tests of the kernels try.
ONE_LEVEL = {"SKBUILD_CMAKE_DEFINE": "ALL_LEVELS=OFF"}
BUILD = "import sys; from scikit_build_core import build; print(getattr(build, sys.argv[1])(sys.argv[2]))"

CLIENT = """
from pathlib import Path

import headrace
from headrace import BuildOptions, Inspection, Job, JobOptions, Plan, Report, Result, VerificationSummary

options: JobOptions = {"model_dir": "model", "tp_size": 2, "memory_limit": "1GiB", "scratch_after": ["read", "shard"]}
job = Job(output_dir="out", dtype="bfloat16", target=[{"output_dir": "a", "engine": {"max_batch_size": 8}}])
engine: BuildOptions = {"output_dir": "engine", "gemm_plugin": "auto", "remove_input_padding": True}


def work(job: Job) -> float:
    planned: Plan = headrace.plan(job, tp_size=2)
    result: Result = headrace.convert(Path("job.toml"), **options)
    found: VerificationSummary = headrace.verify("out", "model", logits=True)
    told: Inspection = headrace.inspect("model")
    page: Report = headrace.report("out", verification=found)
    weights = headrace.load_from_hf_checkpoint("model", tp_size=2, tp_rank=1, dtype="float16", use_weight_only=True)
    shape: tuple[int, ...] = weights.shape("transformer.ln_f.weight")
    try:
        return result.seconds + headrace.build("out", **engine).seconds
    except headrace.BadInput as error:
        print(error.problems[0].subject, planned.bytes_written, page.page.name, told.tp_sizes, shape, headrace.__version__)
        raise
"""

# Each line is wrong in one way.
WRONG = """
import headrace
headrace.convert(tp_sizes=2)
headrace.convert(dtype="int4")
headrace.plan(tp_size="2")
headrace.Job(scratch_after=["nowhere"])
headrace.build("ranks", output_dir="engine", max_batch_sizes=8)
headrace.verify("ranks").okay
headrace.load_from_meta_llama("model", output_dir="ranks")
headrace.no_such_name
"""

# The types of these have no part in what is checked, and take a minute to read.
SKIPPED = ("dask", "distributed", "jinja2", "numpy", "rich", "safetensors", "stages", "torch", "typer", "zarr")


def build(hook: str, source: Path, folder: Path, **more: str) -> Path:
    """Build a distribution with the project's backend, with more variables of its environment; nothing is fetched for it."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", BUILD, hook, str(folder)]
    ran = subprocess.run(command, cwd=source, env={**os.environ, **more}, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder / ran.stdout.splitlines()[-1]


def install(wheel: Path, folder: Path) -> Path:
    """Make an environment with nothing but a wheel in it; returns its interpreter."""
    venv.create(folder, symlinks=True)
    python = folder / "bin/python"
    run(folder, sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps", wheel)
    return python


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packaging")


@pytest.fixture(scope="module")
def sdist(place: Path) -> Path:
    return build("build_sdist", ROOT, place / "dist")


@pytest.fixture(scope="module")
def source(sdist: Path, place: Path) -> Path:
    """The source distribution, unpacked."""
    with tarfile.open(sdist) as archive:
        archive.extractall(place / "source", filter="data")
    (folder,) = (place / "source").iterdir()
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, place: Path) -> Path:
    return build("build_wheel", source, place / "dist", **ONE_LEVEL)


@pytest.fixture(scope="module")
def python(wheel: Path, place: Path) -> Path:
    """The interpreter of a fresh environment in which the wheel is installed."""
    folder = place / "environment"
    python = install(wheel, folder)
    here = Path(sysconfig.get_path("purelib"))
    there = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    present = {path.name for path in there.iterdir()}
    for path in here.iterdir():
        if path.name not in present and "headrace" not in path.name and path.suffix != ".pth":
            (there / path.name).symlink_to(path)
    return python


@pytest.fixture
def model(tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    return tmp_path / "model"


def environment() -> dict[str, str]:
    """That of the tests, without the repository on PYTHONPATH."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def run(folder: Path, *words: object, **more: str) -> str:
    """Run a command in a folder, with more variables of its environment; returns what it prints."""
    variables = {**environment(), **more}
    ran = subprocess.run(list(map(str, words)), cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def check_types(python: Path, folder: Path, text: str) -> list[str]:
    """What mypy says of a program that uses the installed package."""
    (folder / "client.py").write_text(text)
    skipped = "".join(f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in SKIPPED)
    (folder / "mypy.ini").write_text(f"[mypy]\nstrict = True\n{skipped}")
    command = [sys.executable, "-m", "mypy", "--python-executable", str(python), "--cache-dir", str(python.parents[1] / "mypy")]
    command += ["--no-error-summary", "--hide-error-context", "client.py"]
    ran = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert ran.stderr == ""
    return ran.stdout.splitlines()


def sources(*folders: str) -> set[str]:
    """The files of the repository that belong to the product, by their names in it."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)) for path in found if path.suffix != ".pyc" and not made_by_cmake(path)}


def made_by_cmake(path: Path) -> bool:
    """Whether a file beside the kernels is there because they were built in their folder."""
    own = path.relative_to(ROOT).as_posix().startswith(KERNELS)
    return own and path.suffix not in (".c", ".h", ".py", ".pyi") and path.name != "CMakeLists.txt"


def files(wheel: Path) -> set[str]:
    """The files of a wheel, without those that describe it."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_has_every_file_in_its_place_and_the_kernels_for_every_python(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    configs = {f"pipeline/{name}" for name in sources("configs")}
    modules = {name for name in sources("pipeline", "stages") if not name.endswith((".c", ".h", "CMakeLists.txt"))}
    modules |= {"headrace.py", "headrace-stubs/__init__.pyi"}
    built = {f"{folder}/_kernels.abi3.so" for folder in KERNELS} if CAN_BUILD else set()
    assert files(wheel) == modules | configs | built
    assert ("-cp311-abi3-linux_" if CAN_BUILD else "-py3-none-any.") in wheel.name
    assert {"pipeline/py.typed", "stages/py.typed", "pipeline/configs/families/llama.toml"} <= names
    licences = {name.removeprefix(f"{info}/licenses/") for name in names if name.startswith(f"{info}/licenses/")}
    assert licences == {path.name for path in ROOT.glob("LICENSE*")}


def test_the_metadata_says_what_the_project_says(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        said = email.message_from_bytes(archive.read(name))
    assert (said["Name"], said["License-Expression"], said["Requires-Python"]) == ("headrace", "Apache-2.0", ">=3.11")
    assert said["Description-Content-Type"] == "text/markdown"
    assert not said.get_all("Project-URL")


def test_the_source_distribution_has_what_the_wheel_is_made_of_and_no_tests(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = sources("pipeline", "stages", "configs") | {"headrace.py", "pyproject.toml", "README.md", "constraints.txt"}
    assert wanted <= names
    assert not {name for name in names if name.startswith(("tests", "benchmarks", "."))}


def test_the_installed_command_writes_what_the_repository_writes(python: Path, model: Path, tmp_path: Path) -> None:
    command = python.with_name("headrace")
    assert f"kernels: {'C (' if CAN_BUILD else 'NumPy'}" in run(tmp_path, command, "--version")
    where = run(
        tmp_path, python, "-c", "import headrace as h, pipeline as p, stages as s; print(h.__file__, p.__file__, s.__file__)"
    )
    assert all(Path(file).is_relative_to(python.parents[1]) for file in where.split())
    assert run(tmp_path, command, "--version") == run(tmp_path, python, "-m", "headrace", "--version")
    assert json.loads(run(tmp_path, command, "families", "--json")) == json.loads(headrace("families", "--json").out)
    assert convert(model, tmp_path / "ours", "--tp_size", 2, "--use_fp8_rowwise").code == 0
    job = tmp_path / "job.toml"
    job.write_text("model_dir = 'model'\noutput_dir = 'theirs'\ntp_size = 2\nuse_fp8_rowwise = true\nscheduler = 'threads'\n")
    # A batch converts in processes of its own, which must find the package as well.
    run(tmp_path, command, "batch", job)
    ranks = [path.name for path in (tmp_path / "ours").glob("rank*")] + ["config.json"]
    assert len(ranks) == 3
    assert all((tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes() for name in ranks)
    before = tree(tmp_path / "theirs")
    page = run(tmp_path, python, "-c", "import headrace; print(headrace.report('theirs', 'model').page)")
    assert Path(page.strip()).read_text().startswith("<!doctype html>")  # its templates are in configs
    assert tree(tmp_path / "theirs") == before


def test_a_type_checker_follows_a_program_that_uses_the_installed_package(python: Path, tmp_path: Path) -> None:
    assert check_types(python, tmp_path, CLIENT) == []


def test_a_type_checker_sees_each_mistake(python: Path, tmp_path: Path) -> None:
    said = check_types(python, tmp_path, WRONG)
    errors = [line for line in said if ": error: " in line]
    first = WRONG.splitlines().index("import headrace") + 2
    assert sorted({int(line.split(":")[1]) for line in errors}) == list(range(first, first + len(WRONG.splitlines()) - 2)), said


@pytest.mark.parametrize("missing", ["compiler", "cmake"])
def test_without_a_compiler_the_wheel_is_pure_and_says_so(missing: str, wheel: Path, source: Path, tmp_path: Path) -> None:
    lacking = {"CC": str(tmp_path / "no-compiler")} if missing == "compiler" else {"PATH": str(tmp_path)}
    pure = build("build_wheel", source, tmp_path / "dist", **lacking)
    assert pure.name.endswith("-py3-none-any.whl")
    assert files(pure) == {name for name in files(wheel) if not name.endswith(".so")}
    with zipfile.ZipFile(pure) as archive:
        archive.extractall(tmp_path / "installed")
    said = run(tmp_path, sys.executable, "-P", "-m", "headrace", "--version", PYTHONPATH=str(tmp_path / "installed"))
    assert said.splitlines()[1:] == ["kernels: NumPy"]


@pytest.mark.nightly
def test_an_editable_install_is_the_repository_unless_another_is_named(source: Path, place: Path, tmp_path: Path) -> None:
    python = install(build("build_editable", source, place / "editable", **ONE_LEVEL), tmp_path / "environment")
    where = [python, "-P", "-c", "import headrace, pipeline; print(headrace.__file__, pipeline.__file__)"]
    assert run(tmp_path, *where).split() == [str(source / "headrace.py"), str(source / "pipeline/__init__.py")]
    kernels = "import stages.quantization.kernels.chosen as c; print(c.__file__, c.kernels_in_use())"
    file, said = run(tmp_path, python, "-P", "-c", kernels).split(maxsplit=1)
    assert file == str(source / KERNELS[0] / "chosen.py")
    if CAN_BUILD:
        built = run(tmp_path, python, "-P", "-c", "from stages.verify.kernels import _kernels; print(_kernels.__file__)")
        assert Path(built.strip()).parent == source / KERNELS[1]
    assert said.startswith("C (" if CAN_BUILD else "NumPy")
    assert run(tmp_path, python, "-P", "-c", "import pipeline.model.tables as t; print(t.CONFIGS)").split() == [
        str(source / "configs")
    ]
    other = tmp_path / "other"
    for name in ("headrace.py", "pipeline/__init__.py"):
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).touch()
    found = run(tmp_path, *where, PYTHONPATH=str(other)).split()
    assert found == [str(other / "headrace.py"), str(other / "pipeline/__init__.py")]
