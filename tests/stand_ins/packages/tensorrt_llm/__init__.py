"""TensorRT-LLM's package, as far as building needs it."""

from __future__ import annotations

__version__ = "1.2.1"

print(f"[TensorRT-LLM] TensorRT LLM version: {__version__}", flush=True)
