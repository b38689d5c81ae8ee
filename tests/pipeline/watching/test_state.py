"""What a RunWatch says of a run: totals, shares of ranks, throughput, time left."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import Interrupted, convert, plan
from pipeline.run.execute import execute
from pipeline.tensor.process import memory_bytes, peak_memory_bytes
from pipeline.watching import state
from pipeline.watching.listener import Silent
from pipeline.watching.state import RunWatch
from stages.write import Checksum, Written
from tests.pipeline.watching.held import several_blocks


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def written(number: int, nbytes: int, rank: int = 0) -> Written:
    metrics = {("read", "bytes"): float(nbytes), ("read", "seconds"): 0.5}
    return Written(number, "transformer.layers.0.x", nbytes, nbytes, metrics, (), (Checksum(0, rank, 0, nbytes, ""),))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return several_blocks(tmp_path_factory.mktemp("source") / "model")


def test_before_the_start() -> None:
    now = RunWatch().snapshot()
    assert (now.state, now.tasks, now.eta_seconds, now.samples) == ("starting", 0, None, ())


def test_throughput_is_the_recent_one(source: Path, tmp_path: Path) -> None:
    clock = Clock()
    watch = RunWatch(clock)
    watch.started(plan(model_dir=source, output_dir=tmp_path / "out"), "", 10_000, 1_000, 1)
    assert watch.snapshot().bytes_per_second is None
    clock.now += 100
    watch.advanced(written(1, 1_000))
    for _ in range(40):  # four times as fast from here on
        clock.now += 1
        watch.advanced(written(2, 40))
    now = watch.snapshot()
    assert now.bytes_per_second == pytest.approx(40)
    assert now.eta_seconds == pytest.approx((10_000 - 1_000 - 1_000 - 1_600) / 40)
    assert (now.done_bytes, now.resumed_bytes, now.done_tasks) == (3_600, 1_000, 42)
    assert now.stages == {"read": {"bytes": 2_600.0, "seconds": 20.5}}
    clock.now += 31
    idle = watch.snapshot()
    assert (idle.bytes_per_second, idle.eta_seconds, idle.idle_seconds) == (0, None, 31)


def test_samples_are_few_however_long_it_takes(source: Path, tmp_path: Path) -> None:
    clock = Clock()
    watch = RunWatch(clock)
    watch.started(plan(model_dir=source, output_dir=tmp_path / "out"), "", 10**9, 0, 0)
    for _ in range(5 * state.MAX_SAMPLES):
        clock.now += 1
        watch.advanced(written(0, 7))
    samples = watch.snapshot().samples
    assert state.MAX_SAMPLES / 2 <= len(samples) <= state.MAX_SAMPLES
    assert samples[0].seconds == 0
    assert samples[-1].seconds > 5 * state.MAX_SAMPLES - 2
    assert all(sample.done_bytes == pytest.approx(7 * sample.seconds) for sample in samples)


def test_a_sample_a_second_at_most(source: Path, tmp_path: Path) -> None:
    clock = Clock()
    watch = RunWatch(clock)
    watch.started(plan(model_dir=source, output_dir=tmp_path / "out"), "", 10**9, 0, 0)
    for _ in range(100):
        clock.now += 0.1
        watch.advanced(written(0, 1))
    assert len(watch.snapshot().samples) <= 11


class Looking(Silent):
    """Keeps what a run's own RunWatch says after each task, and interrupts it after some."""

    def __init__(self, watch: RunWatch, stop_after: int = -1) -> None:
        self.watch, self.left = watch, stop_after
        self.seen: list[state.Snapshot] = []

    def advanced(self, _: Written) -> None:
        self.seen.append(self.watch.snapshot())
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def run(stop_after: int = -1, **options: object) -> Looking:
    """Convert while looking at it."""
    looking = Looking(RunWatch(), stop_after)
    if stop_after < 0:
        execute(plan(**options), looking, watch=looking.watch)
    else:
        with pytest.raises(Interrupted):
            execute(plan(**options), looking, watch=looking.watch)
    return looking


def test_ranks_fill_up_to_their_files_bytes(source: Path, tmp_path: Path) -> None:
    targets = [
        {"output_dir": tmp_path / "two", "tp_size": 2},
        {"output_dir": tmp_path / "stages", "pp_size": 3, "dtype": "float32"},
    ]
    looking = run(model_dir=source, target=targets, scheduler="threads", scratch_after="rename")
    assert looking.seen[0].phase == "scratch after rename"
    assert all(share.done_bytes == 0 < share.total_bytes for share in looking.seen[0].ranks)
    last = looking.watch.snapshot()
    assert (last.state, last.phase, last.done_tasks) == ("done", "write", last.tasks)
    assert last.done_bytes == last.total_bytes
    assert [(share.target, share.rank) for share in last.ranks] == [("two", 0), ("two", 1)] + [("stages", n) for n in range(3)]
    for share in last.ranks:
        header = 8 + int.from_bytes((tmp_path / share.target / f"rank{share.rank}.safetensors").read_bytes()[:8], "little")
        assert share.done_bytes == share.total_bytes
        assert header + share.total_bytes == (tmp_path / share.target / f"rank{share.rank}.safetensors").stat().st_size
    halfway = next(now for now in looking.seen if any(share.done_bytes for share in now.ranks))
    assert 0 < sum(share.done_bytes for share in halfway.ranks) < sum(share.total_bytes for share in halfway.ranks)


def test_a_resumed_run_counts_what_was_done(source: Path, tmp_path: Path) -> None:
    options = {"model_dir": source, "output_dir": tmp_path / "out", "tp_size": 2, "scheduler": "synchronous"}
    before = run(3, **options).seen[-1]
    looking = run(**options)
    first, last = looking.seen[0], looking.watch.snapshot()
    assert first.done_tasks == 4
    assert first.resumed_bytes > 0
    assert all(then.done_bytes > share.done_bytes > 0 for then, share in zip(first.ranks, before.ranks, strict=True))
    assert all(share.done_bytes == share.total_bytes for share in last.ranks)


def test_a_target_that_is_whole_is_not_watched(source: Path, tmp_path: Path) -> None:
    targets = [{"output_dir": tmp_path / "a", "tp_size": 2}, {"output_dir": tmp_path / "b", "tp_size": 4}]
    convert(model_dir=source, scheduler="threads", **targets[0])
    last = run(model_dir=source, target=targets, scheduler="threads").watch.snapshot()
    assert [(share.target, share.rank) for share in last.ranks] == [("b", n) for n in range(4)]
    assert all(share.done_bytes == share.total_bytes > 0 for share in last.ranks)


def test_directories_of_one_name_are_told_apart(source: Path, tmp_path: Path) -> None:
    targets = [{"output_dir": tmp_path / "a/ranks"}, {"output_dir": tmp_path / "b/ranks", "tp_size": 2}]
    last = run(model_dir=source, target=targets, scheduler="threads").watch.snapshot()
    assert {share.target for share in last.ranks} == {str(tmp_path / "a/ranks"), str(tmp_path / "b/ranks")}


def test_the_memory_of_a_process() -> None:
    assert 10 << 20 < memory_bytes() <= peak_memory_bytes()
    assert memory_bytes(1 << 30) == -1


def test_a_run_that_is_over_stands_still(source: Path, tmp_path: Path) -> None:
    clock = Clock()
    watch = RunWatch(clock)
    watch.started(plan(model_dir=source, output_dir=tmp_path / "out"), "", 1_000, 0, 0)
    clock.now += 4
    watch.advanced(written(0, 1_000))
    watch.end("done")
    clock.now += 100
    watch.end("failed")  # what was said first stays
    now = watch.snapshot()
    assert (now.state, now.ended, now.seconds, now.bytes_per_second, now.eta_seconds) == ("done", True, 4, 250, 0)
    assert now.samples[-1].seconds == 4
    assert now == watch.snapshot()


@pytest.mark.parametrize(("written_bytes", "state"), [(1_000, "done"), (900, "failed")])
def test_how_a_run_ended_shows_in_its_bytes_where_nobody_says(source: Path, tmp_path: Path, written_bytes: int, state: str) -> None:
    watch = RunWatch()
    watch.started(plan(model_dir=source, output_dir=tmp_path / "out"), "", 1_000, 0, 0)
    watch.advanced(written(0, written_bytes))
    watch.finished()
    assert watch.snapshot().state == state


def test_an_interrupted_run_says_so(source: Path, tmp_path: Path) -> None:
    looking = run(3, model_dir=source, output_dir=tmp_path / "out", scheduler="threads")
    assert looking.watch.snapshot().state == "interrupted"
