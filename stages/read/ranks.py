"""A TensorRT-LLM checkpoint's directory: config.json, rank{N}.safetensors and, where headrace wrote it, headrace.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import BadInput, Problem
from pipeline.tensor.checkpoint import Checkpoint
from stages.read.safetensors import open_file


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read a checkpoint's headers. Raises BadInput naming what is missing or cannot be read; what it says is not checked.

    Context-parallel ranks share files, as in the loader of TensorRT-LLM (PretrainedModel.from_checkpoint).
    """
    config = _object(directory / "config.json", "a finished TensorRT-LLM checkpoint")
    provenance = _object(directory / "headrace.json", "") if (directory / "headrace.json").exists() else {}
    mapping = config["mapping"] if isinstance(config.get("mapping"), Mapping) else {}
    count = mapping.get("world_size")
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= 1 << 16:
        raise BadInput([Problem(f"{directory / 'config.json'}: mapping.world_size", repr(count), "the number of ranks")])
    sharing = mapping.get("cp_size", 1)
    if isinstance(sharing, int) and sharing > 1 and count % sharing == 0:  # else it is for the verifier to say
        count //= sharing
    problems, ranks = [], []
    for number in range(count):
        path = directory / f"rank{number}.safetensors"
        try:
            ranks.append(open_file(path)[1])
        except OSError as error:
            problems.append(Problem(str(path), error.strerror or str(error), f"the file of rank {number} of {count}"))
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)
    return Checkpoint(directory, config, tuple(ranks), provenance)


def _object(path: Path, what: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise BadInput([Problem(str(path), error.strerror or str(error), what or "a readable file")]) from None
    except (ValueError, RecursionError) as error:
        raise BadInput([Problem(str(path), f"no JSON ({error})", "a JSON object")]) from None
    if not isinstance(value, dict):
        raise BadInput([Problem(str(path), f"a JSON {type(value).__name__}", "a JSON object")])
    return value
