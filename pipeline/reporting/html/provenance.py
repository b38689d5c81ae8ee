"""Where an output comes from: headrace.json and config.json, checked as far as the page needs them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.planning.job import Job
from pipeline.reporting.html.words import TIMES, count, size
from pipeline.tensor.checkpoint import Checkpoint

# What config.json says of the model: label and key, a dot for a key inside.
_MODEL = (
    ("architecture", "architecture"),
    ("dtype", "dtype"),
    ("quantization", "quantization.quant_algo"),
    ("KV cache", "quantization.kv_cache_quant_algo"),
    ("layers", "num_hidden_layers"),
    ("hidden size", "hidden_size"),
    ("intermediate size", "intermediate_size"),
    ("attention heads", "num_attention_heads"),
    ("key-value heads", "num_key_value_heads"),
    ("head size", "head_size"),
    ("experts", "moe.num_experts"),
    ("vocabulary", "vocab_size"),
    ("positions", "max_position_embeddings"),
)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class SourceFile(_Part):
    """A file that was read, as it was then."""

    path: str = ""
    size_bytes: int = 0
    mtime_ns: int | None = None
    header_sha256: str = ""

    @property
    def held(self) -> str:
        return size(self.size_bytes)

    @property
    def changed(self) -> str:
        """When it was last written, UTC."""
        try:
            return f"{datetime.fromtimestamp((self.mtime_ns or 0) / 1e9, UTC):%Y-%m-%d %H:%M}" if self.mtime_ns else ""
        except (ValueError, OverflowError, OSError):
            return ""


class Source(_Part):
    """What was read."""

    path: str = ""
    kind: str = ""
    files: tuple[SourceFile, ...] = ()

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def held(self) -> str:
        return f"{count(len(self.files), 'file')}, {size(self.size_bytes)}" if self.files else ""


class Metered(_Part):
    """What a stage took, summed over workers, and the bytes that went through it."""

    seconds: float = 0.0
    bytes: float = 0.0


class Timings(_Part):
    """The run's own seconds, those of its stages and, where they are recorded, of its phases (a scratch cut is one)."""

    seconds: float | None = None
    stages: Mapping[str, Metered] = {}
    phases: Mapping[str, float] = {}


class Provenance(_Part):
    """headrace.json, without the checksums."""

    headrace: str = ""
    id: str = ""
    source: Source = Source()
    options: Mapping[str, Any] = {}
    left_out: Mapping[str, str] = {}
    notes: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    timings: Timings = Timings()

    @property
    def left_out_by_reason(self) -> list[tuple[str, str]]:
        """A reason, and how many tensors it is for with the first of them."""
        reasons: dict[str, list[str]] = {}
        for name, reason in sorted(self.left_out.items()):
            reasons.setdefault(reason, []).append(name)
        return [
            (reason, f"{count(len(names), 'tensor')}: {', '.join(names[:4])}{', …' if len(names) > 4 else ''}")
            for reason, names in reasons.items()
        ]


@dataclass(frozen=True)
class Option:
    """An option as it was: `given` where it is not the default."""

    name: str
    value: str
    given: bool

    @property
    def flag(self) -> str:
        """As the command line has it."""
        switches = {"true": f"--{self.name}", "false": f"--no_{self.name}"}
        return switches.get(self.value, f"--{self.name} {self.value}")


def read_provenance(checkpoint: Checkpoint) -> tuple[Provenance | None, list[str]]:
    """headrace.json's facts, None where there is none, and the names of entries that are not what headrace writes."""
    values = dict(checkpoint.provenance)
    if not values:
        return None, []
    try:
        return Provenance.model_validate(values), []
    except ValidationError as error:
        wrong = sorted({str(detail["loc"][0]) for detail in error.errors()})
        return Provenance.model_validate({key: value for key, value in values.items() if key not in wrong}), wrong


def recorded_source(checkpoint: Checkpoint) -> str | None:
    """The source that headrace.json names, where all of its files are still there and of the same size."""
    provenance, _ = read_provenance(checkpoint)
    if not provenance or not provenance.source.path or not provenance.source.files:
        return None
    path = Path(provenance.source.path)
    try:
        folder = path if path.is_dir() else path.parent
        there = all((folder / file.path).stat().st_size == file.size_bytes for file in provenance.source.files)
    except (OSError, ValueError):
        return None
    return str(path) if there else None


def options(provenance: Provenance) -> list[Option]:
    """The options that decided what was written, those that are not the defaults first."""
    defaults = {name: field.default for name, field in Job.model_fields.items()}
    made = [Option(name, shown(value), value != defaults.get(name)) for name, value in provenance.options.items()]
    return sorted(made, key=lambda option: not option.given)


def model_facts(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """What config.json says of the model, as label and value; what it does not say is left out."""
    found = ((label, look_up(checkpoint.config, key)) for label, key in _MODEL)
    return [(label, shown(value)) for label, value in found if value not in (None, 0, "")]


def number_format(checkpoint: Checkpoint) -> tuple[str, str]:
    """What the weights are stored as, and a word beside it."""
    algorithm, dtype = (look_up(checkpoint.config, key) for key in ("quantization.quant_algo", "dtype"))
    if algorithm:
        return shown(algorithm), f"quantized; the rest {shown(dtype)}" if dtype else "quantized"
    return shown(dtype or "unknown"), "not quantized"


def mapping_words(checkpoint: Checkpoint) -> str:
    """`TP 8 x PP 2`, with the sizes of experts where they differ."""
    sizes = {key: look_up(checkpoint.config, f"mapping.{key}_size") for key in ("tp", "pp", "cp", "moe_tp", "moe_ep")}
    parts = [f"TP {shown(sizes['tp'] or 1)}"]
    parts += [f"{key.upper()} {shown(sizes[key])}" for key in ("pp", "cp") if sizes[key] not in (None, 1)]
    if sizes["moe_ep"] not in (None, 1):
        parts.append(f"experts TP {shown(sizes['moe_tp'])} {TIMES} EP {shown(sizes['moe_ep'])}")
    return f" {TIMES} ".join(parts)


def look_up(values: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path; None where there is none."""
    found: Any = values
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def shown(value: Any) -> str:
    """A value of a JSON file as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
