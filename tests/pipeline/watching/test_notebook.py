"""Progress that a program asks for: a line of HTML in a notebook, a bar on a terminal, lines elsewhere, nothing unless asked."""

from __future__ import annotations

import io
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from pipeline import convert
from pipeline.watching.bar import ProgressBar
from pipeline.watching.listener import Silent
from pipeline.watching.notebook import NotebookBar, in_notebook, progress_line
from pipeline.watching.progress import ProgressLines
from pipeline.watching.shown import Several, shown
from pipeline.watching.state import RunWatch, Share, Snapshot
from tests.support import checkpoints


class ZMQInteractiveShell:
    """Named as the shell of Jupyter's kernel."""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Display:
    """The part of IPython.display that is used, which keeps what it is given."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def module(self) -> types.ModuleType:
        module: Any = types.ModuleType("IPython.display")
        module.HTML = str
        module.display = self.display
        return module  # type: ignore[no-any-return]

    def display(self, value: str, display_id: bool) -> Display:
        assert display_id
        self.shown.append(value)
        return self

    def update(self, value: str) -> None:
        self.shown.append(value)


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Display:
    """This process as a notebook's."""
    display = Display()
    package: Any = types.ModuleType("IPython")
    package.get_ipython = type("Colab", (ZMQInteractiveShell,), {})
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", display.module())
    return display


@pytest.fixture
def model(tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    return tmp_path / "model"


def test_a_notebook_shows_the_run_and_links_its_page(notebook: Display, model: Path, tmp_path: Path) -> None:
    convert(model_dir=model, output_dir=tmp_path / "out", tp_size=2)
    first, last = notebook.shown[0], notebook.shown[-1]
    assert "writing</span>" in first
    assert 'href="http://127.0.0.1:' in first
    assert "/headrace" in first
    assert "0 of 2 rank files" in first
    assert "done</span>" in last
    assert "2 of 2 rank files" in last
    notebook.shown.clear()
    convert(model_dir=model, output_dir=tmp_path / "quiet", progress=False)
    convert(model_dir=model, output_dir=tmp_path / "told", listener=Silent())
    assert notebook.shown == []


def test_elsewhere_nothing_is_said_unless_asked(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert not in_notebook()
    convert(model_dir=model, output_dir=tmp_path / "silent")
    assert capfd.readouterr() == ("", "")
    convert(model_dir=model, output_dir=tmp_path / "lines", progress=True)
    said = capfd.readouterr()
    assert said.out == ""
    assert "page http://127.0.0.1:" in said.err
    assert "checking: " in said.err


def test_which_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, own = RunWatch(), Silent()
    assert shown(None, None, watch) is None
    assert shown(False, own, watch) is own
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(shown(True, None, watch), ProgressLines)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert isinstance(shown(True, None, watch), ProgressBar)
    assert isinstance(shown(True, own, watch), Several)


@pytest.mark.usefixtures("notebook")
def test_which_is_shown_in_a_notebook() -> None:
    watch, own = RunWatch(), Silent()
    assert isinstance(shown(None, None, watch), NotebookBar)
    assert shown(None, own, watch) is own
    assert shown(False, None, watch) is None
    assert isinstance(shown(True, own, watch), Several)


def test_a_bar_leaves_the_streams_of_its_host(monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path) -> None:
    """Also while it is drawn."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    seen = []

    class Host(Silent):
        def advanced(self, *_: Any) -> None:
            seen.append((sys.stdout, sys.stderr))

    before = sys.stdout
    convert(model_dir=model, output_dir=tmp_path / "out", progress=True, listener=Host())
    assert set(seen) == {(before, stream)}
    assert "1 of 1 rank file" in stream.getvalue()


def test_a_line_of_html() -> None:
    ranks = (Share("a", 0, 50, 50), Share("a", 1, 0, 50))
    now = Snapshot(done_bytes=50 << 20, total_bytes=100 << 20, bytes_per_second=1e9, eta_seconds=65.0, ranks=ranks)
    line = progress_line(now, "<a>page</a>")
    assert f'<progress value="{50 << 20}" max="{100 << 20}"' in line
    assert "50.0 of 100.0 MiB · 1.00 GB/s · 1:05 min left · 1 of 2 rank files · <a>page</a>" in line
