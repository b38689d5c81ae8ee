"""Open a checkpoint's tokenizer: the files beside a Hugging Face model or beside ranks, or the vocabulary inside a GGUF file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import BadInput, Problem


class Tokenizer(Protocol):
    """The methods of a transformers tokenizer that headrace uses."""

    eos_token_id: int | None

    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: Sequence[int]) -> str: ...


def open_tokenizer(location: Path) -> Tokenizer:
    """Open the tokenizer of a directory or of a GGUF file. Nothing is downloaded, and no code of the checkpoint is run.

    Raises BadInput where there is no tokenizer, or transformers is not installed.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        remedy = "pip install 'headrace[verify]'"
        raise BadInput(
            [Problem("transformers", f"not installed ({error.name})", "the package that has tokenizers", remedy)]
        ) from None
    arguments: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    directory = location
    if location.is_file():
        directory, arguments["gguf_file"] = location.parent, location.name
    with _quiet():
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(str(directory), **arguments)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            # transformers passes on whatever its many readers raise; a panic of the package tokenizers is no Exception.
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            found = f"no tokenizer that transformers can open ({reason[:200]})"
            raise BadInput([Problem(str(location), found, "tokenizer.json or its like", "Give --tokenizer DIR")]) from None
    opened: Tokenizer = tokenizer
    return opened


class _quiet:  # noqa: N801
    """A context manager that keeps transformers' progress bars and warnings off the terminal."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.level, self.bars = logging.get_verbosity(), os.environ.get("TQDM_DISABLE")
        os.environ["TQDM_DISABLE"] = "1"
        logging.set_verbosity(40)  # errors

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self.level)
        if self.bars is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = self.bars
