"""tensorrt_llm.logger: lines on standard output."""

from __future__ import annotations

import time

severity_map = dict.fromkeys(("internal_error", "error", "warning", "info", "verbose", "debug", "trace"))


class Logger:
    level = "error"

    def set_level(self, level: str) -> None:
        assert level in severity_map
        self.level = level

    def _say(self, letter: str, text: str) -> None:
        print(f"[{time.strftime('%m/%d/%Y-%H:%M:%S')}] [TRT-LLM] [{letter}] {text}", flush=True)

    def info(self, text: str) -> None:
        self._say("I", text)

    def warning(self, text: str) -> None:
        self._say("W", text)

    def error(self, text: str) -> None:
        self._say("E", text)


logger = Logger()
