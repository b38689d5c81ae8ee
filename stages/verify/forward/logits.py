"""Compare the logits that the ranks compute with those of transformers running the source."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import Problem
from pipeline.tensor.checkpoint import Checkpoint
from stages.verify.forward.agreement import agreement
from stages.verify.forward.decoder import Decoder
from stages.verify.forward.joined import JoinedWeights
from stages.verify.forward.reference import Reference
from stages.verify.forward.transformers_model import build_model, quiet
from stages.verify.roundtrip.origin import Origin
from stages.verify.roundtrip.original import Original

# Of the largest logit: float32 sums in another order, over as many layers as models have.
ROUNDING = 1e-3


def compare_logits(
    checkpoint: Checkpoint,
    original: Original,
    origins: Sequence[Origin],
    lossless: bool,
    prompt: Sequence[int] | None,
    count: int,
    advance: Callable[[str, int, int], None],
) -> tuple[list[Problem], dict[str, Any]]:
    """Run a checkpoint and its source on the same tokens and compare their logits.

    Where quantization or rounding changed values, the source's logits may differ by any amount: then transformers runs the ranks'
    own weights, joined, too, and these logits must agree. TensorRT-LLM's classes have an epsilon of their own in the norms of q and
    k (docs/format/runtime-1.2.md, section f3); transformers runs with that one, so that it hides nothing else.

    `original`: the source's weights as numbers. `origins`: of the ranks' tensors. `lossless`: every value of the ranks is the
    source's own. `prompt`: the tokens of a text; None for `count` random ones, the same every time. `advance`: called with
    ("logits", runs done, runs in all). Returns the problems, and the facts of the level as plain values.
    """
    started = time.perf_counter()
    ids = _tokens(checkpoint, prompt, count)
    steps = 2 if lossless else 3
    decoder = Decoder(checkpoint)
    actual = decoder.logits(ids)
    advance("logits", 1, steps)
    expected = Reference(original.config, original, decoder.settings.head_epsilon).logits(ids)
    advance("logits", 2, steps)
    comparisons = [{"against": "source", **agreement(actual, expected), "bound": ROUNDING if lossless else None}]
    if not lossless:
        shapes = {name: original.shape(name) for name in original.names()}
        joined = JoinedWeights(checkpoint, origins, shapes)
        expected = Reference(original.config, joined, decoder.settings.head_epsilon).logits(ids)
        if decoder.int8_activations:  # which transformers has not: what the ranks compute without is what must agree
            actual = Decoder(checkpoint, int8_activations=False).logits(ids)
        comparisons.append({"against": "joined ranks", **agreement(actual, expected), "bound": ROUNDING})
        advance("logits", 3, steps)
    problems = [
        Problem(str(checkpoint.directory), _difference(each), f"at most {each['bound']:g} of the largest logit")
        for each in comparisons
        if each["bound"] is not None and not each["max_relative"] <= each["bound"]
    ]
    problems += [Problem(name, "a tensor that the model's computation does not use", "none") for name in decoder.unused()]
    return problems, {"tokens": len(ids), "seconds": round(time.perf_counter() - started, 3), "comparisons": comparisons}


def check_runnable(checkpoint: Checkpoint, original: Original, prompt: Sequence[int] | None, count: int) -> None:
    """Raise BadInput where logits cannot be computed, as far as configurations say: no tensor is read.

    Where transformers is not installed or has no class for the source, config.json asks for what is not computed here, and there
    are no tokens, or some that are not in the vocabulary.
    """
    with quiet():
        build_model(original.config)
    Decoder(checkpoint).check_tokens(_tokens(checkpoint, prompt, count))


def _difference(figures: Mapping[str, Any]) -> str:
    return (
        f"logits that differ by {figures['max_relative']:.2g} of the largest from those of transformers "
        f"running the {figures['against']}"
    )


def _tokens(checkpoint: Checkpoint, prompt: Sequence[int] | None, count: int) -> Tensor:
    """The tokens of a text, or `count` random ones, the same every time: int64 [count]."""
    if prompt is not None:
        return torch.tensor(prompt, dtype=torch.int64)
    return torch.randint(checkpoint.config["vocab_size"], (max(count, 0),), generator=torch.Generator().manual_seed(0))
