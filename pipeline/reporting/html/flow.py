"""Draw the conversion: its stages in order, with their task, seconds and bytes, and its cuts through scratch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.reporting.html.provenance import Metered, Provenance, look_up, mapping_words, shown
from pipeline.reporting.html.words import count, duration, rate, size
from pipeline.tensor.checkpoint import Checkpoint

# Stages in the order of use; those of MAIN are always shown.
ORDER = (
    *("read", "read_scratch", "rename", "unpack", "dequantize", "cast", "quantize"),
    *("shard", "rope", "checksum", "write_scratch", "write"),
)
MAIN = ("read", "rename", "unpack", "cast", "quantize", "shard", "write")
CUT = "scratch after "
SCRATCH = ("write_scratch", "read_scratch")
WIDE, NARROW = 10, 6  # boxes in a row of the picture, at most


@dataclass(frozen=True)
class FlowStep:
    """A box of the picture, and a bar of the timings.

    `share`: of all stages' seconds, of 1. `idle`: headrace.json has no seconds for the stage. `cut`: not a stage, but a cut through
    Zarr scratch.
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
        """The share as a percentage."""
        return f"{self.share:.0%}" if self.share >= 0.01 or not self.share else "< 1%"

    @property
    def width(self) -> str:
        """The bar's length in CSS. It is computed here, and no text of a file."""
        return f"{max(self.share * 100, 0.5 if self.share else 0):.2f}%"


def steps(checkpoint: Checkpoint, provenance: Provenance) -> list[FlowStep]:
    """List the boxes in order."""
    stages, phases = provenance.timings.stages, provenance.timings.phases
    total = sum(metered.seconds for metered in stages.values())
    does = _stage_tasks(checkpoint, provenance)
    named = _ordered([name for name in ORDER if name in stages or name in MAIN], provenance.timings.scratch_after)
    made: list[FlowStep] = []
    for name in named + sorted(stages.keys() - set(ORDER)):
        made.append(_step(name, does.get(name, ""), stages.get(name), total))
        if CUT + name in phases:
            made.append(_cut(phases[CUT + name]))
    return made


def _ordered(names: list[str], cuts: Sequence[str]) -> list[str]:
    """Stages in their order, with what writes and reads scratch behind the first stage that is cut after, where that is known."""
    cut = next((names.index(stage) + 1 for stage in cuts if stage in names), None)
    if cut is None or not set(SCRATCH) & set(names):
        return names
    through = [name for name in SCRATCH if name in names]
    return [name for name in names[:cut] if name not in SCRATCH] + through + [name for name in names[cut:] if name not in SCRATCH]


def columns(boxes: Sequence[FlowStep], most: int) -> int:
    """The number of boxes in a row, at most `most`: those of the stages, the source and the output, in rows of about one length."""
    total = len(boxes) + 2
    return -(-total // -(-total // most))


def timed(boxes: Sequence[FlowStep]) -> list[FlowStep]:
    """The stages that have a bar of the timings, the longest first."""
    return sorted((step for step in boxes if not step.idle and not step.cut), key=lambda step: -step.share)


def _step(name: str, does: str, metered: Metered | None, total: float) -> FlowStep:
    if metered is None:
        return FlowStep(name, does, "", "", "", 0.0, idle=True)
    share = metered.seconds / total if total > 0 else 0.0
    speed = rate(metered.bytes, metered.seconds)
    return FlowStep(name, does, duration(metered.seconds), size(metered.bytes), speed, share)


def _cut(seconds: float) -> FlowStep:
    return FlowStep("scratch", "a cut: written to Zarr and read back", duration(seconds), "", "", 0.0, cut=True)


def _stage_tasks(checkpoint: Checkpoint, provenance: Provenance) -> Mapping[str, str]:
    """A few words on each stage's task in this conversion."""
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
        "read_scratch": "chunks of scratch, mapped",
        "write_scratch": "chunks of scratch",
        "rope": "rotary buffers, computed",
        "checksum": "xxh3 of every tensor",
        "write": count(len(checkpoint.ranks), "rank file") if checkpoint.ranks else "rank files",
    }
