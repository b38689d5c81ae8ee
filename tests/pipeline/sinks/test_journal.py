"""The journal: what counts after a kill, a torn line, and a power cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

import pipeline.sinks.journal
from pipeline import BadInput
from pipeline.sinks.journal import Journal

OWNER = {"headrace": "journal", "id": "x"}


def line(*numbers: int) -> dict[str, Any]:
    return {"done": list(numbers), "sums": []}


def reopened(path: Path) -> list[int]:
    journal = Journal(path)
    assert journal.owner == OWNER
    journal.close()
    return [number for entry in journal.entries for number in entry["done"]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    journal = Journal(tmp_path / "journal")
    assert journal.owner is None
    journal.start(OWNER)
    for number in range(3):
        journal.append(line(number))
    journal.synced()
    journal.append(line(3, 4))
    journal.close()
    return tmp_path / "journal"


def test_a_killed_process_loses_nothing(path: Path) -> None:
    assert reopened(path) == [0, 1, 2, 3, 4]


def test_after_another_boot_only_what_was_brought_to_disk_counts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.sinks.journal, "boot_id", lambda: "another")
    assert reopened(path) == [0, 1, 2]
    # What is added then counts, and what did not is gone for good.
    journal = Journal(path)
    journal.append(line(7))
    journal.close()
    assert reopened(path) == [0, 1, 2, 7]


@given(cut=st.integers(1, 400), garbage=st.binary(max_size=30))
def test_a_torn_end_is_dropped(cut: int, garbage: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("torn") / "journal"
    journal = Journal(path)
    journal.start(OWNER)
    for number in range(8):
        journal.append(line(number))
    journal.close()
    content = path.read_bytes()
    first = content.index(b"\n") + 1
    kept = content[: max(len(content) - cut, first)]
    path.write_bytes(kept + garbage.replace(b"\n", b""))
    whole = kept.count(b"\n") - 1
    assert reopened(path) == list(range(whole))
    assert path.read_bytes() == content[: len(b"".join(content.splitlines(keepends=True)[: whole + 1]))]


def test_one_holder_at_a_time(path: Path) -> None:
    journal = Journal(path)
    with pytest.raises(BadInput, match="another job at work"):
        Journal(path)
    journal.close()
    Journal(path).remove()
    assert not path.exists()


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5_000 + "]" * 5_000,
        "9" * 400,
        "[]",
        "null",
        '{"done": [5], "sums": []}',
        '{"sums": [], "boot": "b"}',
        '{"done": [5], "boot": "b"}',
        '{"done": 5, "sums": [], "boot": "b"}',
        '{"done": [true], "sums": [], "boot": "b"}',
        '{"done": [-1], "sums": [], "boot": "b"}',
        '{"done": [], "sums": [[0, 0, 0]], "boot": "b"}',
        '{"done": [], "sums": [[0, 0, "x", "y"]], "boot": "b"}',
        '{"done": [], "sums": [], "boot": 5}',
    ],
    ids=lambda text: text[:50],
)
def test_a_line_that_no_journal_has_ends_it(path: Path, text: str) -> None:
    """Though its checksum is right: what stands before it counts, and it is cut off."""
    before = path.read_bytes()
    path.write_bytes(before + f"{xxhash.xxh3_64_hexdigest(text.encode())} {text}\n".encode())
    assert reopened(path) == [0, 1, 2, 3, 4]
    assert path.read_bytes() == before
