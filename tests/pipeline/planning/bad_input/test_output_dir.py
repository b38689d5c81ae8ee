"""Output directories that are not ours, cannot be written, or have no room: refused, and left as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipeline.planning.bad_input.gguf_files import write as write_gguf
from tests.support import checkpoints
from tests.support.commands import Ran, convert, limited, one, refused, tree


@pytest.fixture
def model(tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    return tmp_path / "model"


@pytest.mark.parametrize("more", [(), ("--overwrite",)], ids=str)
@pytest.mark.parametrize(
    "name", ["notes.txt", "model.safetensors", "rank0.bin", "rank0.safetensors.bak", "a/config.json", ".git/x"]
)
def test_a_directory_with_the_files_of_others(model: Path, name: str, more: tuple[str, ...]) -> None:
    path = model.parent / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    problem = one(refused(model, *more))
    assert problem.startswith(f"--output_dir {model.parent / 'out'}: found files that headrace did not write (")
    assert name.partition("/")[0] in problem


def test_another_converters_output_is_replaced_only_where_asked(model: Path) -> None:
    output = model.parent / "out"
    output.mkdir()
    for name in ("config.json", "rank0.safetensors", "rank7.safetensors"):
        (output / name).write_text("theirs")
    assert "--overwrite" in one(refused(model))
    assert convert(model, output, "--overwrite").code == 0
    assert {path.name for path in output.iterdir()} == {"config.json", "rank0.safetensors", "headrace.json"}


def test_an_empty_directory_is_taken(model: Path) -> None:
    (model.parent / "out").mkdir()
    assert convert(model, model.parent / "out").code == 0


def test_a_directory_that_is_a_file(model: Path) -> None:
    (model.parent / "out").write_text("mine")
    assert one(refused(model)).startswith(f"--output_dir {model.parent / 'out'}: found a file; expected a directory")


def test_a_directory_inside_a_file(model: Path) -> None:
    (model.parent / "file").write_text("mine")
    output = model.parent / "file" / "out"
    assert one(refused(model, output=output)).startswith(f"--output_dir {output}: found ")


def test_a_link_to_nowhere(model: Path) -> None:
    (model.parent / "out").symlink_to(model.parent / "gone")
    assert str(model.parent / "out") in one(refused(model))


@pytest.mark.parametrize("parent", ["/proc", "/dev/null"])
def test_a_place_where_nobody_may_write(model: Path, parent: str) -> None:
    # Not even root may, so that the test means the same for every user.
    problem = one(refused(model, output=Path(parent) / "headrace" / "out"))
    assert f"{parent}/headrace/out" in problem


@pytest.mark.parametrize("more", [(), ("--overwrite",)], ids=str)
def test_the_source_directory_itself(model: Path, more: tuple[str, ...]) -> None:
    assert str(model) in one(refused(model, *more, output=model))


@pytest.mark.parametrize("more", [(), ("--overwrite",)], ids=str)
@pytest.mark.parametrize("link", [False, True])
def test_a_source_directory_whose_names_could_be_ours(model: Path, link: bool, more: tuple[str, ...]) -> None:
    # Taken for an output directory, it would be emptied before it is read.
    (model / "model.safetensors").rename(model / "rank0.safetensors")
    output = model
    if link:
        output = model.parent / "link"
        output.symlink_to(model)
    assert str(output) in one(refused(model, *more, output=output))


@pytest.mark.parametrize("more", [(), ("--overwrite",)], ids=str)
def test_the_directory_of_a_source_file_whose_name_could_be_ours(tmp_path: Path, more: tuple[str, ...]) -> None:
    (tmp_path / "dir").mkdir()
    source = write_gguf(tmp_path / "dir" / "rank0.safetensors")
    before = tree(tmp_path)
    ran = convert(source, tmp_path / "dir", *more)
    assert ran.code == 2
    assert tree(tmp_path) == before


def test_an_output_inside_the_source_directory_is_fine(model: Path) -> None:
    before = tree(model)
    assert convert(model, model / "trt").code == 0
    assert {name: state for name, state in tree(model).items() if name in before and name != "."} == {
        name: state for name, state in before.items() if name != "."
    }


def with_files_of(limit_bytes: int, model: Path, output: Path) -> Ran:
    """Convert where no file may become larger than so many bytes: as on a full disk, the reserving of a file's space fails."""
    arguments = ("convert", "--model_dir", model, "--output_dir", output, "--scheduler", "threads")
    return limited({"RLIMIT_FSIZE": limit_bytes}, *arguments)


def test_no_room_for_the_files_leaves_nothing_behind(model: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    ran = with_files_of(100_000, model, tmp_path / "new" / "folder" / "out")
    assert ran.code == 2, ran
    assert "rank0.safetensors" in ran.err
    assert "Traceback" not in ran.err
    # Not even the folders above it, which the run had made.
    assert tree(tmp_path).keys() == before.keys()


def test_no_room_leaves_an_empty_directory_empty(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert with_files_of(100_000, model, tmp_path / "out").code == 2
    assert list((tmp_path / "out").iterdir()) == []


def test_room_enough_is_enough(model: Path, tmp_path: Path) -> None:
    assert with_files_of(1 << 30, model, tmp_path / "out").code == 0


def test_a_disk_without_room_is_refused_before_anything_is_written(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.sinks.output_checks.free_bytes", lambda _: 1000)
    problem = one(refused(model))
    assert problem.startswith(f"--output_dir {model.parent / 'out'}: found 1,000 bytes free; expected 28")
