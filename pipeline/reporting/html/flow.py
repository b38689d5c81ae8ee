"""The conversion as a picture: its stages in order, what each did, its seconds and bytes, and cuts through scratch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.reporting.html.provenance import Metered, Provenance, look_up, mapping_words, shown
from pipeline.reporting.html.words import count, duration, rate, size
from pipeline.tensor.checkpoint import Checkpoint

# In the order of use; those of MAIN are always shown.
ORDER = ("read", "rename", "unpack", "dequantize", "cast", "quantize", "shard", "rope", "checksum", "write")
MAIN = ("read", "rename", "unpack", "cast", "quantize", "shard", "write")
CUT = "scratch after "
WIDE, NARROW = 10, 6  # boxes in a row of the picture, at most


@dataclass(frozen=True)
class Step:
    """A box of the picture, or a bar of the timings. `share` of all stages' seconds, of 1; `idle`: no byte had work there.

    `cut`: it is not a stage but a cut through Zarr scratch.
    """

    name: str
    does: str
    seconds: str
    size: str
    rate: str
    share: float
    idle: bool = False
    cut: bool = False

    @property
    def percent(self) -> str:
        return f"{self.share:.0%}" if self.share >= 0.01 or not self.share else "< 1%"

    @property
    def width(self) -> str:
        """The bar's length as CSS has it: a number of ours, never a file's text."""
        return f"{max(self.share * 100, 0.5 if self.share else 0):.2f}%"


def steps(checkpoint: Checkpoint, provenance: Provenance) -> list[Step]:
    """The boxes in order. Stages that headrace.json has no seconds for are idle."""
    stages, phases = provenance.timings.stages, provenance.timings.phases
    total = sum(metered.seconds for metered in stages.values())
    does = _what_they_do(checkpoint, provenance)
    named = [name for name in ORDER if name in stages or name in MAIN]
    made: list[Step] = []
    for name in named + sorted(stages.keys() - set(ORDER)):
        made.append(_step(name, does.get(name, ""), stages.get(name), total))
        if CUT + name in phases:
            made.append(_cut(phases[CUT + name]))
    return made


def columns(boxes: Sequence[Step], most: int) -> int:
    """Boxes in a row of the picture, the source's and the output's too: all in one, or in rows of about one length."""
    held = len(boxes) + 2
    return -(-held // -(-held // most))


def timed(boxes: Sequence[Step]) -> list[Step]:
    """The stages that took time, the longest first."""
    return sorted((step for step in boxes if not step.idle and not step.cut), key=lambda step: -step.share)


def _step(name: str, does: str, metered: Metered | None, total: float) -> Step:
    if metered is None:
        return Step(name, does, "", "", "", 0.0, idle=True)
    share = metered.seconds / total if total > 0 else 0.0
    speed = rate(metered.bytes, metered.seconds)
    return Step(name, does, duration(metered.seconds), size(metered.bytes), speed, share)


def _cut(seconds: float) -> Step:
    return Step("scratch", "a cut: written to Zarr and read back", duration(seconds), "", "", 0.0, cut=True)


def _what_they_do(checkpoint: Checkpoint, provenance: Provenance) -> Mapping[str, str]:
    """A few words a stage, of this conversion where there is something to say."""
    algorithm = look_up(checkpoint.config, "quantization.quant_algo")
    dtype = look_up(checkpoint.config, "dtype")
    return {
        "read": "the source's files, mapped",
        "rename": f"to TensorRT-LLM's names{'' if 'rename' in provenance.timings.stages else '; no byte moves'}",
        "unpack": "packed weights to codes and scales",
        "dequantize": "codes to numbers",
        "cast": f"to {shown(dtype)}" if dtype else "to the target's type",
        "quantize": f"to {shown(algorithm)}" if algorithm else "not asked for",
        "shard": f"for {count(len(checkpoint.ranks), 'rank')}: {mapping_words(checkpoint)}"
        if checkpoint.ranks
        else "for each rank",
        "rope": "rotary buffers, computed",
        "checksum": "xxh3 of every tensor",
        "write": count(len(checkpoint.ranks), "rank file") if checkpoint.ranks else "rank files",
    }
