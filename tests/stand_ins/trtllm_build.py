"""The command `trtllm-build`, as the real one is installed: the package's own main."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent / "torch_alone"), str(Path(__file__).parent / "packages")]

from tensorrt_llm.commands.build import main  # noqa: E402

if __name__ == "__main__":
    main()
