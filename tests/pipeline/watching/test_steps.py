"""The bar of a run: its step and its figures never go back, and what stands beside it keeps its place."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline import plan
from pipeline.run.execute import execute
from pipeline.watching.bar import ProgressBar
from pipeline.watching.listener import Silent
from pipeline.watching.nodes import LiveEngine, LiveNode
from pipeline.watching.state import RunWatch, Share, Snapshot
from pipeline.watching.steps import STEPS, files_words, step, whole_files
from pipeline.watching.units import part_of
from tests.pipeline.watching.held import several_blocks


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return several_blocks(tmp_path_factory.mktemp("source") / "model")


class Looking(Silent):
    """A listener that keeps a snapshot of each moment."""

    def __init__(self, watch: RunWatch) -> None:
        self.watch = watch
        self.seen: list[Snapshot] = []

    def started(self, *_: Any) -> None:
        self.seen.append(self.watch.snapshot())

    def advanced(self, *_: Any) -> None:
        self.seen.append(self.watch.snapshot())

    def finished(self) -> None:
        self.seen.append(self.watch.snapshot())


@pytest.mark.parametrize("after", ["none", "read"])
@pytest.mark.parametrize("scheduler", ["local", "synchronous"])
def test_nothing_goes_back(source: Path, tmp_path: Path, after: str, scheduler: str) -> None:
    targets = [{"output_dir": tmp_path / "one", "tp_size": 2}, {"output_dir": tmp_path / "two", "pp_size": 3}]
    watch = RunWatch()
    looking = Looking(watch)
    made = plan(
        model_dir=source,
        target=targets,
        scheduler=scheduler,
        scratch=tmp_path / "scratch",
        scratch_after=after,
        memory_limit="2GiB",
    )
    execute(made, looking, watch=watch)
    steps = [STEPS.index(step(now)) for now in looking.seen]
    assert steps == sorted(steps)
    names = [STEPS[number] for number in dict.fromkeys(steps)]
    assert names[0] == ("scratch" if after == "read" else "writing")
    assert names[-2:] == ["checking", "done"]
    for figures in ([now.done_bytes for now in looking.seen], [whole_files(now) for now in looking.seen]):
        assert figures == sorted(figures)
    # The number of files and of bytes is known from the first moment on: the bar is drawn with them.
    assert {(len(now.ranks), now.total_bytes) for now in looking.seen} == {(5, looking.seen[-1].done_bytes)}
    assert files_words(looking.seen[0]) == "0 of 5 rank files"
    assert files_words(looking.seen[-1]) == "5 of 5 rank files"


def test_engines_are_built_when_all_is_written() -> None:
    nodes = (LiveNode("write", 2, 2), LiveNode("finish", 1, 1), LiveNode("build", 2, 1))
    now = Snapshot(nodes=nodes, ranks=(Share("out", 0, 9, 9),), engines=(LiveEngine("e", 2, 1),))
    assert (step(now), files_words(now)) == ("building", "1 of 1 rank file, 0 of 1 engine")
    assert step(Snapshot()) == "starting"
    both = Snapshot(nodes=(LiveNode("scratch", 3, 2), LiveNode("write", 2, 1), LiveNode("finish", 1)))
    assert step(both) == "scratch+write"


@pytest.mark.parametrize("total", [7, 5_000, 276_900, 1 << 30, 5 << 40])
def test_a_part_is_as_wide_as_the_whole(total: int) -> None:
    widths = {len(part_of(total * n // 97, total)) for n in range(98)}
    assert len(widths) == 1
    assert re.fullmatch(r"([\d.]+) of \1 [KMGT]?i?B", part_of(total, total))


def test_what_stands_beside_the_bar_keeps_its_place(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    watch = RunWatch()
    stream = io.StringIO()
    bar = ProgressBar(stream, watch)
    made = plan(model_dir=source, output_dir=tmp_path / "out", tp_size=2, scratch=tmp_path / "s", scratch_after="read")

    class Drawn(Looking):
        """Draws the bar at each moment."""

        def started(self, *arguments: Any) -> None:
            bar.started(*arguments)

        def advanced(self, *_: Any) -> None:
            bar._progress.refresh()

        def finished(self) -> None:
            bar.finished()

    execute(made, Drawn(watch), watch=watch)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    lines = [line for line in re.split(r"[\r\n]+", text) if " MiB" in line and "━" in line]
    assert len(lines) > 5
    assert {len(line) for line in lines} == {80}
    for mark in (" of 2 rank files", "━", " MiB"):
        assert len({line.index(mark) for line in lines}) == 1, mark
    assert lines[-1].startswith("done ")
    assert lines[-1].endswith("2 of 2 rank files")
