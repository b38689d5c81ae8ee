"""A headless Chromium that opens pages, over its own debugging protocol: no driver is needed beside the browser."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tornado.ioloop import IOLoop
from tornado.websocket import WebSocketClientConnection, websocket_connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PROGRAM = next((path for name in NAMES if (path := shutil.which(name))), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1300,900", "--disable-dev-shm-usage")
WAIT_SECONDS = 60.0

needed = pytest.mark.skipif(PROGRAM is None, reason=f"no browser on PATH: {', '.join(NAMES)}")


class Browser:
    """One tab. `logged` are the errors and warnings of its console."""

    def __init__(self, socket: WebSocketClientConnection, loop: IOLoop) -> None:
        self._socket, self._loop, self._number = socket, loop, 0
        self.logged: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol; what happens until it has answered is taken in."""
        self._number += 1
        number = self._number

        async def ask() -> dict[str, Any]:
            await self._socket.write_message(json.dumps({"id": number, "method": method, "params": parameters}))
            while True:
                text = await self._socket.read_message()
                assert text is not None, "the browser has ended"
                message = json.loads(text)
                if message.get("id") == number:
                    assert "error" not in message, message
                    return dict(message["result"])
                self._event(message)

        return self._loop.run_sync(ask, timeout=WAIT_SECONDS)

    def _event(self, message: dict[str, Any]) -> None:
        parameters = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.logged.append(str(parameters["exceptionDetails"]))
        elif message.get("method") == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning"):
            self.logged.append(" ".join(str(part.get("value", part)) for part in parameters["args"]))
        elif message.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.logged.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)

    def text(self) -> str:
        """The page's text, that inside Bokeh's shadow roots included."""
        code = """(function walk(node) {
          let text = node.nodeType === 3 ? node.textContent + " " : "";
          if (node.nodeName === "STYLE" || node.nodeName === "SCRIPT") return "";
          if (node.shadowRoot) text += walk(node.shadowRoot);
          for (const child of node.childNodes) text += walk(child);
          return text;
        })(document.body)"""
        return re.sub(r"\s+", " ", str(self.evaluate(code)))

    def evaluate(self, code: str) -> Any:
        return self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)["result"].get("value")

    def wait(self, holds: Callable[[str], bool]) -> str:
        """The page's text, once something holds of it."""
        end = time.monotonic() + WAIT_SECONDS
        while not holds(text := self.text()):
            assert time.monotonic() < end, (text, self.logged)
            time.sleep(0.1)
        return text

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(picture["data"]))


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Start a browser with a profile of its own and end it afterwards."""
    assert PROGRAM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [PROGRAM, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        loop = IOLoop(make_current=False)
        try:
            yield Browser(_connect(Path(profile), process, loop), loop)
        finally:
            process.terminate()
            process.wait()
            loop.close()


def _connect(profile: Path, process: subprocess.Popen[bytes], loop: IOLoop) -> WebSocketClientConnection:
    from urllib.request import urlopen

    end = time.monotonic() + WAIT_SECONDS
    port_file = profile / "DevToolsActivePort"
    while not (port_file.exists() and len(lines := port_file.read_text().split("\n")) > 1):
        assert process.poll() is None, f"the browser ended with {process.returncode}"
        assert time.monotonic() < end, "the browser does not listen"
        time.sleep(0.1)
    with urlopen(f"http://127.0.0.1:{lines[0]}/json", timeout=WAIT_SECONDS) as answer:
        (tab,) = [tab for tab in json.load(answer) if tab["type"] == "page"]
    return loop.run_sync(lambda: websocket_connect(tab["webSocketDebuggerUrl"], max_message_size=64 << 20), timeout=WAIT_SECONDS)
