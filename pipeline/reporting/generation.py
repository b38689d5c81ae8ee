"""Continue a text with the ranks of an output, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from pipeline.errors import BadInput
from pipeline.reporting.tasks import Advance
from pipeline.tensor.remote_path import is_remote
from stages.read.ranks import open_checkpoint
from stages.read.remote import image_of
from stages.read.tokenizer import open_tokenizer
from stages.verify.contract.settings import read_settings
from stages.verify.forward.decoder import Decoder
from stages.verify.forward.generation import generate

CACHE_BYTES = 2 << 30  # of weights as numbers that are kept: a small model need not be read for each token


def generate_text(
    directory: Path,
    prompt: str,
    tokenizer: Path | None = None,
    count: int = 24,
    temperature: float = 0.0,
    seed: int = 0,
    advance: Advance | None = None,
) -> Iterator[str]:
    """Yield the prompt, then the text that the ranks continue it with, piece by piece.

    Parameters
    ----------
    directory
        The output: config.json and its rank files.
    prompt
        The text to continue.
    tokenizer
        A directory or a GGUF file with the tokenizer. By default the output, then the source that its headrace.json names.
    count
        The largest number of tokens.
    temperature
        0 for the likeliest token each time; above 0, tokens are drawn by their shares.
    seed
        Of the drawn tokens.
    advance
        Called with "tokens", how many there are, and how many there may be.

    Raises
    ------
    BadInput
        Where there is no checkpoint, no tokenizer, or config.json is none that TensorRT-LLM loads or asks for a model that is
        not computed here.
    VerificationFailed
        Where a tensor is missing or has a wrong shape.
    """
    checkpoint = open_checkpoint(directory)
    _, problems = read_settings(checkpoint.config)
    if problems:
        raise BadInput(problems)
    here = image_of(str(directory))[0] if is_remote(directory) else directory
    beside = here / "tokenizer.json"
    source = checkpoint.provenance.get("source")
    recorded = source.get("path") if isinstance(source, Mapping) else None
    own = beside.exists() or not isinstance(recorded, str) or not recorded
    words = open_tokenizer(tokenizer or (here if own else Path(str(recorded))))
    tokens = words.encode(prompt)
    decoder = Decoder(checkpoint, cache_bytes=CACHE_BYTES)
    stop = () if words.eos_token_id is None else (words.eos_token_id,)
    shown = words.decode(tokens)
    yield shown
    say = advance or (lambda *_: None)
    say("tokens", 0, count)
    new = generate(decoder, tokens, count, temperature=temperature, seed=seed, stop=stop)
    for number, token in enumerate(new, 1):
        say("tokens", number, count)
        tokens.append(token)
        # A token may be a part of a character, so the whole text is decoded each time, and its new end is yielded.
        text = words.decode(tokens)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
