"""A power cut at any moment of a run, whatever the disk makes of it: the run after it ends with the right bytes, or says why not.

Runs are recorded call by call (tests/support/moments.py). By day a few moments are tried, by night 50 of each kind in each way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import pytest

from pipeline import HeadraceError, Interrupted, convert, plan, verify
from pipeline.run.execute import execute
from pipeline.sinks.journal import Committer
from stages.write import Written
from tests.support import checkpoints
from tests.support.directories import contents
from tests.support.moments import LEFT, Held, record
from tests.support.power import Stop

CONFIG = checkpoints.LLAMA | {"num_hidden_layers": 2}


@dataclass(frozen=True)
class Kind:
    """A run whose moments are tried. `stops`: after how many groups earlier runs of it were stopped."""

    options: dict[str, Any] = field(default_factory=dict)
    stops: tuple[int, ...] = ()
    kept: bool = False


KINDS = {
    "dense": Kind(),
    "dense, synced": Kind({"sync": True}),
    "cut": Kind({"scratch_after": "unpack", "keep_scratch": True}, kept=True),
    "cut twice, not kept": Kind({"scratch_after": "read,shard"}),
    "resumed": Kind({"sync": True}, stops=(3, 3)),
    "resumed cut": Kind({"scratch_after": "unpack", "keep_scratch": True}, stops=(4,), kept=True),
    "pipeline": Kind({"pp_size": 2, "tp_size": 1}),
    "made again": Kind({"overwrite": True}, stops=(99,)),
    "started over": Kind({"overwrite": True}, stops=(5,)),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tmp_path_factory.mktemp("source") / "model"
    checkpoints.write(model, CONFIG)
    (model / "tokenizer.json").write_text("{}")
    return model


def options(kind: Kind, model: Path, place: Path, **more: Any) -> dict[str, Any]:
    usual = {"model_dir": model, "output_dir": place / "new" / "out", "scratch": place / "scratch", "tp_size": 2}
    return usual | {"scheduler": "synchronous", "copy_tokenizer": True} | kind.options | more


@contextlib.contextmanager
def quick_commits() -> Iterator[None]:
    """Commits after each second group and flushes after each fourth, in the place of seconds."""
    real, counts = Committer.add, dict[int, int]()

    def add(self: Committer, written: Written) -> None:
        real(self, written)
        count = counts[id(self)] = counts.get(id(self), 0) + 1
        if not count % 2:
            self.commit()
        if not count % 4:
            self.sync()

    with (
        mock.patch.object(Committer, "add", add),
        mock.patch("pipeline.sinks.journal.COMMIT_SECONDS", 3600),
        mock.patch("pipeline.planning.make_plan.block_bytes", return_value=20_000),
    ):
        yield


def moments(kind: Kind, model: Path, place: Path, wanted: int) -> list[Held]:
    asked = options(kind, model, place)

    def prepare() -> None:
        for stop in kind.stops:
            with contextlib.suppress(Interrupted):
                execute(plan(**asked), Stop(stop))

    with quick_commits():
        return record(place, prepare, lambda: convert(**asked) and None, wanted, seed=0)


def again(kind: Kind, model: Path, place: Path, plain: dict[str, bytes]) -> list[int]:
    """Run it in another boot until it ends well; returns the exit codes. Wrong bytes and other exceptions fail the test."""
    asked = options(kind, model, place) | {"overwrite": False}
    refusing = "Give --overwrite to start afresh"
    codes: list[int] = []
    said = ""
    with quick_commits(), mock.patch("pipeline.sinks.journal.boot_id", return_value="another boot"):
        while codes[-1:] != [0]:
            assert len(codes) < 3, said
            try:
                convert(**asked)
            except HeadraceError as error:
                codes, said = [*codes, error.exit_code], str(error)
                asked["overwrite"] = refusing in str(error)
            else:
                codes.append(0)
                found = {name: data for name, data in contents(asked["output_dir"]).items() if name != "headrace.json.partial"}
                assert found == plain
                verify(asked["output_dir"]).check()
        if kind.kept:  # what it calls whole serves another job
            convert(**options(kind, model, place, output_dir=place / "second"))
            assert contents(place / "second") == plain
    return codes


def try_moments(kind: Kind, model: Path, tmp_path: Path, wanted: int, lefts: Callable[[int], tuple[str, ...]]) -> None:
    convert(**options(Kind({k: v for k, v in kind.options.items() if k.endswith("size")}), model, tmp_path / "plain"))
    plain = contents(tmp_path / "plain" / "new" / "out")
    place = tmp_path / "disk"
    held = moments(kind, model, place, wanted)
    assert len(held) >= wanted
    ended = []
    for number, moment in enumerate(held):
        for left in lefts(number):
            moment.restore(place, left, Random(number))
            try:
                ended.append(again(kind, model, place, plain))
            except BaseException as error:
                error.add_note(f"the power was cut before {moment.before!r}, and left {left}, at moment {number}")
                raise
    assert {code for codes in ended for code in codes} <= {0, 2, 3}
    print(f"{len(ended)} power cuts: {sum(len(codes) == 1 for codes in ended)} ended well at once, the others said why not")


@pytest.mark.parametrize("name", KINDS)
def test_a_few_moments(name: str, model: Path, tmp_path: Path) -> None:
    number = list(KINDS).index(name)
    try_moments(KINDS[name], model, tmp_path, 3, lambda moment: (LEFT[(number + moment) % len(LEFT)],))


@pytest.mark.nightly
@pytest.mark.parametrize("name", KINDS)
def test_fifty_moments_in_each_way(name: str, model: Path, tmp_path: Path) -> None:
    try_moments(KINDS[name], model, tmp_path, 50, lambda _: LEFT)
