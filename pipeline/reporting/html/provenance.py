"""Read where an output comes from: headrace.json and config.json, checked as far as the report needs them."""

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

# The model's facts in config.json: label and key; a dot leads to a key inside an object.
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


class _ProvenancePart(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class RecordedFile(_ProvenancePart):
    """A file of the source, as it was when it was read. `of`: the option that names it, where it is not in the source itself."""

    path: str = ""
    of: str = ""
    size_bytes: int = 0
    mtime_ns: int | None = None
    header_sha256: str = ""

    @property
    def amount(self) -> str:
        """The size in words."""
        return size(self.size_bytes)

    @property
    def changed(self) -> str:
        """The time at which it was last written, in UTC; "" where it is not known."""
        try:
            return f"{datetime.fromtimestamp((self.mtime_ns or 0) / 1e9, UTC):%Y-%m-%d %H:%M}" if self.mtime_ns else ""
        except (ValueError, OverflowError, OSError):
            return ""


class RecordedSource(_ProvenancePart):
    """The source that the conversion read. `quant_ckpt_path`: the place of a quantized checkpoint beside it; "" for none."""

    path: str = ""
    kind: str = ""
    quant_ckpt_path: str = ""
    files: tuple[RecordedFile, ...] = ()

    @property
    def size_bytes(self) -> int:
        """The size of all files."""
        return sum(file.size_bytes for file in self.files)

    @property
    def amount(self) -> str:
        """The number of files and their size in words; "" where no files are recorded."""
        return f"{count(len(self.files), 'file')}, {size(self.size_bytes)}" if self.files else ""


class Metered(_ProvenancePart):
    """The seconds of a stage, summed over workers, and the bytes that went through it."""

    seconds: float = 0.0
    bytes: float = 0.0


class Course(_ProvenancePart):
    """The run over time: at each of `seconds`, the bytes written until then, and the memory of a process (-1: not known)."""

    seconds: tuple[float, ...] = ()
    bytes: tuple[float, ...] = ()
    memory_bytes: tuple[float, ...] = ()
    memory_limit_bytes: float = 0.0


class Timings(_ProvenancePart):
    """The seconds of the run, of its stages and, where they are recorded, of its phases (a scratch cut is a phase).

    `scratch_after`: the stages behind which scratch was.
    """

    seconds: float | None = None
    scratch_after: tuple[str, ...] = ()
    course: Course = Course()
    stages: Mapping[str, Metered] = {}
    phases: Mapping[str, float] = {}


class Provenance(_ProvenancePart):
    """headrace.json, without the checksums."""

    headrace: str = ""
    id: str = ""
    source: RecordedSource = RecordedSource()
    options: Mapping[str, Any] = {}
    left_out: Mapping[str, str] = {}
    notes: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    timings: Timings = Timings()

    @property
    def left_out_by_reason(self) -> list[tuple[str, str]]:
        """Each reason, with the number of tensors that it left out and the first of their names."""
        reasons: dict[str, list[str]] = {}
        for name, reason in sorted(self.left_out.items()):
            reasons.setdefault(reason, []).append(name)
        return [
            (reason, f"{count(len(names), 'tensor')}: {', '.join(names[:4])}{', …' if len(names) > 4 else ''}")
            for reason, names in reasons.items()
        ]


@dataclass(frozen=True)
class RecordedOption:
    """An option of the conversion. `given`: its value is not the default."""

    name: str
    value: str
    given: bool

    @property
    def flag(self) -> str:
        """The option as on the command line."""
        switches = {"true": f"--{self.name}", "false": f"--no_{self.name}"}
        return switches.get(self.value, f"--{self.name} {self.value}")


def read_provenance(checkpoint: Checkpoint) -> tuple[Provenance | None, list[str]]:
    """Read headrace.json's facts, None where there is none, and list the entries that headrace does not write so."""
    values = dict(checkpoint.provenance)
    if not values:
        return None, []
    try:
        return Provenance.model_validate(values), []
    except ValidationError as error:
        wrong = sorted({str(detail["loc"][0]) for detail in error.errors()})
        return Provenance.model_validate({key: value for key, value in values.items() if key not in wrong}), wrong


def recorded_source(checkpoint: Checkpoint) -> tuple[Path, Path | None] | None:
    """The source that headrace.json names, and the quantized checkpoint beside it; None unless all is there with the same sizes.

    What activations were measured on is not looked at: values are compared without it.
    """
    provenance, _ = read_provenance(checkpoint)
    if not provenance or not provenance.source.path or not provenance.source.files:
        return None
    source = provenance.source
    beside = Path(source.quant_ckpt_path) if source.quant_ckpt_path else None
    places = {"": Path(source.path), **({"quant_ckpt_path": beside} if beside else {})}
    try:
        folders = {of: path if path.is_dir() else path.parent for of, path in places.items()}
        looked = [(folders[file.of] / file.path, file.size_bytes) for file in source.files if file.of in folders]
        there = all(path.stat().st_size == nbytes for path, nbytes in looked)
    except (OSError, ValueError):
        return None
    return (places[""], beside) if there else None


def options(provenance: Provenance) -> list[RecordedOption]:
    """List the options that decided what was written, first those that are not the defaults."""
    defaults = {name: field.default for name, field in Job.model_fields.items()}
    made = [RecordedOption(name, shown(value), value != defaults.get(name)) for name, value in provenance.options.items()]
    return sorted(made, key=lambda option: not option.given)


def model_facts(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """List config.json's facts of the model as (label, value); missing ones are left out."""
    values = ((label, look_up(checkpoint.config, key)) for label, key in _MODEL)
    return [(label, shown(value)) for label, value in values if value not in (None, 0, "")]


def number_format(checkpoint: Checkpoint) -> tuple[str, str]:
    """The format of the weights, and a remark on it."""
    algorithm, dtype = (look_up(checkpoint.config, key) for key in ("quantization.quant_algo", "dtype"))
    if algorithm:
        return shown(algorithm), f"quantized; the rest {shown(dtype)}" if dtype else "quantized"
    return shown(dtype or "unknown"), "not quantized"


def mapping_words(checkpoint: Checkpoint) -> str:
    """The parallel sizes in words: `TP 8 x PP 2`, with those of experts where experts are split otherwise."""
    sizes = {key: look_up(checkpoint.config, f"mapping.{key}_size") for key in ("tp", "pp", "cp", "moe_tp", "moe_ep")}
    parts = [f"TP {shown(sizes['tp'] or 1)}"]
    parts += [f"{key.upper()} {shown(sizes[key])}" for key in ("pp", "cp") if sizes[key] not in (None, 1)]
    if sizes["moe_ep"] not in (None, 1):
        parts.append(f"experts TP {shown(sizes['moe_tp'])} {TIMES} EP {shown(sizes['moe_ep'])}")
    return f" {TIMES} ".join(parts)


def look_up(values: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path; None where there is none."""
    value: Any = values
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def shown(value: Any) -> str:
    """A value of a JSON file as text; texts stay as they are."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
