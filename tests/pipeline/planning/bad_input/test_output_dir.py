"""Output directories that are not ours, cannot be written, or have no room: refused, and left as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipeline.planning.bad_input.gguf_files import write as write_gguf
from tests.support import checkpoints
from tests.support.commands import Ran, convert, headrace, limited, one, refused, tree


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


def test_beside_a_source_that_is_a_file_is_fine(tmp_path: Path) -> None:
    assert convert(write_gguf(tmp_path / "model.gguf"), tmp_path / "out").code == 0


def test_an_output_inside_another_of_the_job(model: Path) -> None:
    job = model.parent / "job.toml"
    job.write_text(f'model_dir = "{model}"\n[[target]]\noutput_dir = "out"\n[[target]]\noutput_dir = "out/two"\n')
    before = tree(model.parent)
    ran = headrace("convert", job)
    assert ran.code == 2
    assert f"{model.parent / 'out' / 'two'}: found a place inside the output {model.parent / 'out'}" in ran.err
    assert tree(model.parent) == before


@pytest.mark.parametrize("name", ["headrace.json", "headrace.json.partial"])
def test_an_output_inside_one_of_another_job(model: Path, name: str) -> None:
    (model.parent / "out").mkdir()
    (model.parent / "out" / name).write_text("{}")
    problem = one(refused(model, output=model.parent / "out" / "a" / "b"))
    assert f"found a place inside the output {model.parent / 'out'}" in problem


@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"[]", b"\xff\xfe"], ids=["nothing", "zeros", "a list", "no text"])
@pytest.mark.parametrize("name", ["config.json", "headrace.json", "both"])
def test_files_that_a_power_cut_left_empty(model: Path, name: str, content: bytes) -> None:
    """The output is not complete: it is planned and made again, and looking at it is a report, never a traceback."""
    output = model.parent / "out"
    assert convert(model, output).code == 0
    sound, blank = {path.name: path.read_bytes() for path in output.iterdir()}, not content.strip(b"\0")
    for each in ("config.json", "headrace.json") if name == "both" else (name,):
        (output / each).write_bytes(content)
    for looking in (("verify", output), ("report", output, "--output", model.parent / "page.html"), ("inspect", output)):
        ran = headrace(*looking)
        assert ran.code in (2, 5), (looking, ran)
        assert "Traceback" not in ran.err
        if blank and looking[0] != "inspect":
            assert "The checkpoint is not complete: convert it again" in ran.err
    again = () if blank else ("--overwrite",)  # other contents may be somebody's
    if not blank:
        assert "--overwrite" in one(refused(model))
    assert headrace("plan", "--model_dir", model, "--output_dir", output, *again).code == 0
    assert convert(model, output, *again).code == 0
    assert {path.name: path.read_bytes() for path in output.iterdir() if path.name != "headrace.json"} == {
        each: data for each, data in sound.items() if each != "headrace.json"
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
    assert problem.startswith(f"--output_dir {model.parent / 'out'}: found 1000 B free; expected room for 2")


@pytest.mark.parametrize("name", ["out", "out/scratch", "link/scratch"])
def test_scratch_among_the_files_of_an_output(model: Path, name: str) -> None:
    (model.parent / "link").symlink_to(model.parent / "out")
    scratch = model.parent / name
    problem = one(refused(model, "--scratch", scratch, "--scratch_after", "unpack"))
    assert problem.startswith(
        f"--scratch {scratch}: found a place in the output {model.parent / 'out'}; expected a directory apart"
    )
    assert str(model.parent / ".headrace-scratch") in problem
