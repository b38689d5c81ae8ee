"""Notes of who is at work: on one host, after an earlier boot, on another host, without locks or links, and in races."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import BadInput
from pipeline.sinks import hold
from pipeline.sinks.hold import Holder, birth, boot_id, holder, leave, place, take
from pipeline.sinks.journal import Journal
from tests.support import checkpoints
from tests.support.commands import COMMAND, Ran, convert, headrace
from tests.support.examples import examples

NOTE = "headrace.json.lock"


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "headrace.json.partial"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    return tmp_path / "model"


@contextlib.contextmanager
def another() -> Iterator[Holder]:
    """A process that lives for as long as the context."""
    with subprocess.Popen(["sleep", "60"]) as started:
        yield replace(Holder.me(), pid=started.pid, birth=birth(started.pid))
        started.kill()


def of(found: Holder, journal: Path, link: bool = True) -> Path:
    """Leave somebody's note."""
    note = place(journal)
    if link:
        note.symlink_to(json.dumps(asdict(found)))
    else:
        note.write_text(json.dumps(asdict(found)))
    return note


def dead() -> Holder:
    with another() as found:
        pass
    return found


@pytest.fixture
def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def symlink_to(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", symlink_to)


def test_a_birth_is_one_process_and_a_zombie_is_none() -> None:
    with subprocess.Popen(["sleep", "60"]) as started:
        assert birth(started.pid) == birth(started.pid) not in ("", birth(os.getpid()))
        started.kill()
        os.waitid(os.P_PID, started.pid, os.WEXITED | os.WNOWAIT)
        assert birth(started.pid) == ""
    assert birth(started.pid) == ""


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_it_is_there_while_the_process_is_at_work(journal: Path, links: bool, request: pytest.FixtureRequest) -> None:
    if not links:
        request.getfixturevalue("without_links")
    take(journal, locked=False)
    assert (holder(place(journal)), place(journal).is_symlink()) == (Holder.me(), links)
    with pytest.raises(BadInput, match=f"process {os.getpid()} on"):  # also to another thread of this process
        take(journal, locked=False)
    leave(journal)
    assert list(journal.parent.iterdir()) == []


@pytest.mark.parametrize("link", [True, False], ids=["link", "file"])
@pytest.mark.parametrize("locked", [False, True])
def test_whoever_is_known_to_be_gone_is_passed_over(journal: Path, locked: bool, link: bool) -> None:
    gone = dead()
    numbered_again = replace(Holder.me(), birth="of another of this number")
    namespace = Holder.me().birth.partition(" ")[0]
    for found in (gone, replace(numbered_again, birth=f"{namespace} 1"), replace(Holder.me(), boot="an earlier one")):
        of(found, journal, link)
        take(journal, locked)
        assert holder(place(journal)) == Holder.me()
        leave(journal)
        assert list(journal.parent.iterdir()) == []


def test_who_lives_is_not_but_where_the_systems_lock_says_that_nobody_is_at_work(journal: Path) -> None:
    with another() as found:
        note = of(found, journal)
        with pytest.raises(BadInput, match=f"process {found.pid} on {found.host}; .*Wait for it") as refusal:
            take(journal, locked=False)
        assert refusal.value.problems[0].passing
        assert "unlock" not in str(refusal.value)
        take(journal, locked=True)
        leave(journal)
        # Another container's process of this boot cannot be seen from here.
        of(replace(dead(), birth="pid:[1] 5"), journal)
        with pytest.raises(BadInput, match="unlock"):
            take(journal, locked=False)
        take(journal, locked=True)
    assert holder(note) == Holder.me()


@pytest.mark.parametrize("locked", [False, True])
def test_another_host_is_never_guessed_to_be_gone(journal: Path, locked: bool) -> None:
    there = Holder("elsewhere", "its boot", 7, "x 1")
    note = of(there, journal)
    with pytest.raises(BadInput, match=f"process 7 on elsewhere.*run headrace unlock {journal.parent}"):
        take(journal, locked)
    assert holder(note) == there
    ran = headrace("unlock", journal.parent)
    assert (ran.code, ran.out) == (0, f"{journal.parent}: released, it was held by process 7 on elsewhere\n")
    take(journal, locked)


def test_unlock_leaves_who_lives_and_says_where_nobody_is(journal: Path, tmp_path: Path) -> None:
    with another() as found:
        note = of(found, journal)
        ran = headrace("unlock", tmp_path)
        assert (ran.code, f"process {found.pid} of this machine at work on it" in ran.err) == (2, True)
        assert holder(note) == found
    assert f"held by process {found.pid}" in headrace("unlock", tmp_path).out
    assert headrace("unlock", tmp_path).out == f"{tmp_path}: nobody is at work there\n"
    assert headrace("unlock", tmp_path / "gone").code == 2


@pytest.mark.parametrize("name", ["history.db.serve.lock", "headrace-0123456789abcdef.journal.lock"])
def test_unlock_releases_histories_and_journals_of_buckets_too(tmp_path: Path, name: str) -> None:
    others = tmp_path / "package.lock", tmp_path / "poetry.lock.json"
    for other in others:
        other.write_text('{"host": "theirs"}')
    (tmp_path / name).symlink_to(json.dumps(asdict(Holder("elsewhere", "boot", 7, "-"))))
    assert headrace("unlock", tmp_path).out == f"{tmp_path}: released, it was held by process 7 on elsewhere\n"
    assert sorted(tmp_path.iterdir()) == sorted(others)


@pytest.mark.parametrize("words", ["", "{", "[]", '{"host": 1}', '{"host": "a", "boot": "b", "pid": "x", "birth": ""}'])
def test_a_note_without_words_was_left_by_a_crash(journal: Path, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hold, "WORDS_SECONDS", 0.05)
    place(journal).write_text(words)
    take(journal, locked=False)
    assert holder(place(journal)) == Holder.me()


def test_a_note_that_is_being_written_is_waited_for(journal: Path) -> None:
    there = Holder("elsewhere", "its boot", 7, "x 1")
    place(journal).touch()
    writing = threading.Timer(0.2, lambda: place(journal).write_text(json.dumps(asdict(there))))
    writing.start()
    with pytest.raises(BadInput, match="process 7 on elsewhere"):
        take(journal, locked=False)
    writing.join()


@pytest.mark.usefixtures("without_links")
def test_who_is_slow_to_write_its_words_does_not_hold_what_was_taken(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no links: another finds the note without words for too long, and takes its place."""
    there, real = Holder("elsewhere", "its boot", 7, "x 1"), Path.open

    def slow(path: Path, mode: str = "r", *more: Any, **options: Any) -> Any:
        stream = real(path, mode, *more, **options)
        if mode == "x":
            new = path.with_name("new")
            new.write_text(json.dumps(asdict(there)))
            new.rename(path)
        return stream

    monkeypatch.setattr(Path, "open", slow)
    with pytest.raises(BadInput, match="process 7 on elsewhere"):
        take(journal, locked=False)


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_of_three_that_find_it_gone_none_takes_anothers_place(
    journal: Path, links: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One has found the note of a process that is gone; before it does anything about it, another has taken its place."""
    if not links:
        request.getfixturevalue("without_links")
    of(gone := dead(), journal, link=links)
    with another() as second:
        real, looks = hold.holder, []

        def late(note: Path) -> Holder | None:
            looks.append(note)
            found = real(note)
            if len(looks) == 1:
                assert found == gone
                place(journal).unlink()
                place(journal).write_text(json.dumps(asdict(second)))
            return found

        monkeypatch.setattr(hold, "holder", late)
        with pytest.raises(BadInput, match=f"process {second.pid} on"):
            take(journal, locked=False)
        assert real(place(journal)) == second
    assert [path.name for path in journal.parent.iterdir()] == [NOTE]


@pytest.mark.parametrize("beside", [None, *range(2)])
def test_who_ended_while_it_took_a_place_is_passed_over_too(journal: Path, beside: int | None) -> None:
    note = of(dead(), journal)
    for count in range(0 if beside is None else beside + 1):
        note.with_name(note.name + ".next" * (count + 1)).symlink_to(json.dumps(asdict(dead())))
    take(journal, locked=False)
    leave(journal)
    assert list(journal.parent.iterdir()) == []


def _contend(journal: Path, links: bool, start: Any, tried: Any, results: Any) -> None:
    if not links:
        Path.symlink_to = lambda *_: (_ for _ in ()).throw(PermissionError(1, "no links"))  # type: ignore[method-assign]
    start.wait(30)
    try:
        take(journal, locked=False)
        results.put(os.getpid())
    except BadInput:
        results.put(0)
    tried.wait(30)  # nobody ends before all have tried


def contend(journal: Path, links: bool, contenders: int) -> list[int]:
    """The processes, of so many at once, that hold it."""
    forks = multiprocessing.get_context("fork")
    start, tried, results = forks.Barrier(contenders), forks.Barrier(contenders), forks.SimpleQueue()
    started = [forks.Process(target=_contend, args=(journal, links, start, tried, results)) for _ in range(contenders)]
    for each in started:
        each.start()
    said = [results.get() for _ in started]
    for each in started:
        each.join()
        assert each.exitcode == 0
    return [pid for pid in said if pid]


@examples(20)
@given(
    st.integers(2, 6),
    st.booleans(),
    st.sampled_from(["nobody", "gone", "an earlier boot", "no words", "two that are gone"]),
)
def test_of_any_number_exactly_one_holds(
    tmp_path_factory: pytest.TempPathFactory, contenders: int, links: bool, before: str
) -> None:
    journal = tmp_path_factory.mktemp("raced") / "headrace.json.partial"
    if before in ("gone", "two that are gone"):
        of(dead(), journal)
    elif before == "an earlier boot":
        of(replace(Holder.me(), boot="earlier"), journal)
    elif before == "no words":
        place(journal).touch()
    if before == "two that are gone":
        place(journal).with_name(f"{NOTE}.next").symlink_to(json.dumps(asdict(dead())))
    found = contend(journal, links, contenders)
    last = holder(place(journal))
    assert last
    # A contender may be refused as another is just about to hold it, or, all but surely not, each as another is.
    assert found == [last.pid]
    assert [path.name for path in journal.parent.iterdir()] == [NOTE]


def test_without_locks_the_note_alone_keeps_two_conversions_apart(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.sinks.journal.try_lock", lambda *_, **__: False)
    (tmp_path / "out").mkdir()
    held = Journal(tmp_path / "out/headrace.json.partial")
    for _ in range(2):  # a refusal takes nobody's note away
        ran = convert(model, tmp_path / "out")
        assert (ran.code, f"process {os.getpid()} on" in ran.err) == (2, True)
        assert holder(tmp_path / "out" / NOTE) == Holder.me()
    held.remove()
    assert convert(model, tmp_path / "out").code == 0
    assert not (tmp_path / "out" / NOTE).exists()


def test_it_is_gone_after_success_after_refusal_and_after_an_interruption(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert convert(model, tmp_path / "out").code == 0
    assert not list(tmp_path.rglob("*.lock*"))

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    again = ("convert", "--model_dir", model, "--output_dir", tmp_path / "two", "--scheduler", "synchronous")
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.run.execute.Committer.add", interrupted)
        assert headrace(*again).code == 3
    assert (tmp_path / "two/headrace.json.partial").exists()
    assert not list(tmp_path.rglob("*.lock*"))
    there = Holder("elsewhere", "its boot", 7, "x 1")
    of(there, tmp_path / "two/headrace.json.partial")
    assert headrace(*again).code == 2
    assert holder(tmp_path / "two" / NOTE) == there
    headrace("unlock", tmp_path / "two")
    assert headrace(*again).code == 0
    assert not list(tmp_path.rglob("*.lock*"))


# Ends a conversion at once when its first rank file has its place.
KILLING = """
import os, signal, sys
def hook(event, arguments):
    if event == "open" and str(arguments[0]).endswith("rank0.safetensors.partial"):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
"""


def test_after_a_kill_the_note_is_there_and_in_nobodys_way(model: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(KILLING)
    command = [*COMMAND, "convert", "--model_dir", str(model), "--output_dir", str(tmp_path / "out"), "--scheduler", "threads"]
    path = os.pathsep.join(filter(None, (str(tmp_path), *sys.path)))
    ran = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False, capture_output=True)
    assert ran.returncode == -signal.SIGKILL, ran
    killed = holder(tmp_path / "out" / NOTE)
    assert killed
    assert killed.gone
    assert (killed.host, killed.boot) == (Holder.me().host, boot_id())
    again: Ran = convert(model, tmp_path / "out")
    assert (again.code, (tmp_path / "out/config.json").exists()) == (0, True)
    assert not (tmp_path / "out" / NOTE).exists()
