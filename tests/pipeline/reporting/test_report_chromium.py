"""Pages of `headrace report` in a real browser: Chromium, driven over its DevTools protocol.

They run where a `chromium` is on PATH.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tornado.websocket import WebSocketClientConnection, websocket_connect

from pipeline.reporting.html import render_report
from tests.pipeline.reporting.test_report import HOSTILE, attacked
from tests.support import report_pages

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: pages cannot be looked at in a browser")

DESKTOP, PHONE = (1280, 900), (390, 844)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--remote-debugging-port=0",
)


class Browser:
    """One page of a headless Chromium. Commands and events are those of the DevTools protocol."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM
        self.process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.loop = asyncio.new_event_loop()
        self.numbers = itertools.count(1)
        self.events: list[dict[str, Any]] = []
        port, path = self._endpoint(profile / "DevToolsActivePort")
        self.socket = self.loop.run_until_complete(self._connect(f"ws://127.0.0.1:{port}{path}"))
        self.session = ""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
            self.send(f"{domain}.enable")

    def _endpoint(self, file: Path) -> list[str]:
        for _ in range(600):
            if file.exists() and len(lines := file.read_text().split()) == 2:
                return lines
            assert self.process.poll() is None, "chromium ended before it could be spoken to"
            time.sleep(0.1)
        raise TimeoutError(file)

    async def _connect(self, address: str) -> WebSocketClientConnection:
        return await websocket_connect(address, max_message_size=1 << 28)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Give a command and wait for its answer; events that come before it are kept."""
        return self.loop.run_until_complete(asyncio.wait_for(self._send(method, params), 60))

    async def _send(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        number = next(self.numbers)
        session = {"sessionId": self.session} if self.session else {}
        await self.socket.write_message(json.dumps({"id": number, "method": method, "params": params, **session}))
        while True:
            message = json.loads(str(await self.socket.read_message()))
            if message.get("id") == number:
                assert "error" not in message, message
                return dict(message["result"])
            self.events.append(message)

    def open(self, page: Path, size: tuple[int, int], *, dark: bool = False, media: str = "screen") -> None:
        """Load a page at a size of the window, in light or dark, and wait until it is drawn."""
        width, height = size
        self.events.clear()
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 700)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.send("Page.navigate", url=page.as_uri())
        for _ in range(200):
            if self.run("document.readyState") == "complete" and self.run("location.href") == page.as_uri():
                break
            time.sleep(0.05)
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def said(self, method: str) -> list[dict[str, Any]]:
        """The parameters of every event of a kind since the page was opened."""
        return [event["params"] for event in self.events if event.get("method") == method]

    def screenshot(self, file: Path) -> None:
        """The whole page as a PNG."""
        file.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)
        self.loop.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        made = Browser(Path(profile))
        try:
            yield made
        finally:
            made.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of every kind."""
    folder = tmp_path_factory.mktemp("pages")
    texts = {
        "passed": render_report(report_pages.checkpoint(), report_pages.summary()),
        "failed": render_report(report_pages.checkpoint(cuts=("unpack",)), report_pages.failed()),
        "large": render_report(
            report_pages.checkpoint(80, tp=8, pp=4), report_pages.summary(80, 32, snr=19.0, storage="groupwise")
        ),
        "bare": render_report(report_pages.checkpoint(provenance=False)),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text)
    return {name: folder / f"{name}.html" for name in texts}


SIZES = pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
NAMES = pytest.mark.parametrize("name", ["passed", "failed", "large", "bare"])
# Elements that are wider than what they stand in, but for a map that may be scrolled.
WIDE = """[...document.querySelectorAll("section, section *")]
    .filter(e => !e.closest(".map, .hidden, details:not([open]) > :not(summary)"))
    .filter(e => e.getBoundingClientRect().right > e.closest("section").getBoundingClientRect().right + 1)
    .map(e => e.tagName + "." + e.className + " " + e.textContent.slice(0, 40))"""
CONTRAST = """(() => {
    const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const light = color => {
        canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
        if (a < 255) return null;
        const [x, y, z] = [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * x + 0.7152 * y + 0.0722 * z;
    };
    const behind = e => e ? light(getComputedStyle(e).backgroundColor) ?? behind(e.parentElement) : 1;
    const found = [];
    for (const e of document.querySelectorAll("body *")) {
        if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
        const [a, b] = [light(getComputedStyle(e).color), behind(e)].sort((x, y) => y - x);
        if ((a + 0.05) / (b + 0.05) < 4.5) found.push(e.className + " " + e.textContent.slice(0, 30));
    }
    return [...new Set(found)];
})()"""


@NAMES
@SIZES
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_fails_is_fetched_or_sticks_out(
    browser: Browser, pages: dict[str, Path], name: str, size: tuple[int, int], dark: bool
) -> None:
    browser.open(pages[name], size, dark=dark)
    assert [sent["request"]["url"] for sent in browser.said("Network.requestWillBeSent")] == [pages[name].as_uri()]
    for event in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Audits.issueAdded"):
        assert browser.said(event) == []
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.run(WIDE) == []
    assert browser.run(CONTRAST) == []


@SIZES
def test_what_is_said_can_be_read(browser: Browser, pages: dict[str, Path], size: tuple[int, int]) -> None:
    browser.open(pages["failed"], size)
    seen = browser.run("document.body.innerText").replace("\N{NO-BREAK SPACE}", " ")
    words = ["Something is wrong: 3 findings", report_pages.FINDING["found"], report_pages.FINDING["remedy"], "2.7 dB"]
    words += ["/models/Llama-3.1-8B-Instruct", "W8A16", "quantize", "21.9 s", "a cut: written to Zarr and read back", "rank 1"]
    words += ["98.4 %", "too much", "transformer.layers.3.mlp.fc.weight", "19301a808b49"]
    assert [each for each in words if each not in seen] == []
    # What is wrong comes first.
    assert seen.index("Something is wrong") < seen.index("What was done")


def test_every_cell_of_the_map_has_its_number_and_its_words(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["large"], DESKTOP)
    cells = browser.run("[...document.querySelectorAll('.map td')].map(e => [e.innerText, e.title])")
    assert len(cells) == 80 * 7
    assert all(text and title.startswith("transformer.layers.") for text, title in cells)
    rows = browser.run("[...document.querySelectorAll('.map tbody th')].map(e => Number(e.innerText))")
    assert rows == list(range(80))


def test_it_is_dark_where_that_is_asked_for_and_light_on_paper(browser: Browser, pages: dict[str, Path]) -> None:
    paper = "getComputedStyle(document.querySelector('section.facts')).backgroundColor"
    shades = []
    for dark, media in ((False, "screen"), (True, "screen"), (True, "print")):
        browser.open(pages["passed"], DESKTOP, dark=dark, media=media)
        shades.append(browser.run(paper))
    light, dark_shade, printed = shades
    assert light == printed != dark_shade


def test_it_prints(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["large"], DESKTOP, media="")
    printed = base64.b64decode(browser.send("Page.printToPDF", preferCSSPageSize=True)["data"])
    assert printed.startswith(b"%PDF")
    # The folded lists are left out.
    assert printed.count(b"/Type /Page\n") + printed.count(b"/Type /Page ") <= 8


def test_text_of_files_runs_nothing(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(render_report(*attacked(HOSTILE)))
    browser.open(tmp_path / "page.html", PHONE)
    assert len(browser.said("Network.requestWillBeSent")) == 1
    for event in ("Runtime.consoleAPICalled", "Log.entryAdded", "Page.javascriptDialogOpening"):
        assert browser.said(event) == []
    assert browser.run("document.querySelectorAll('script, img').length") == 0
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")
