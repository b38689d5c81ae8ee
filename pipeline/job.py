"""Job: what the user asks for, from Python, the command line (NVIDIA's flag names) or a TOML file; validated in one place.

A field here is a keyword of `convert` and `plan`, a key of a job file, and a flag of the command line.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.types import ByteSize

from pipeline.errors import BadInput, Problem


def _absolute(value: Any) -> Any:
    return Path(value).expanduser().absolute() if isinstance(value, str | Path) and str(value) else value


AbsolutePath = Annotated[Path, BeforeValidator(_absolute)]
Size = Annotated[int, Field(ge=1)]
ExpertSize = Annotated[int, Field(ge=-1)]


class Job(BaseModel):
    """One conversion. Every field but the two paths has the default of NVIDIA's converter or one that is safe."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_dir: AbsolutePath = Field(description="Hugging Face checkpoint directory, or GGUF file, to read.")
    output_dir: AbsolutePath = Field(description="Directory for config.json and rank{N}.safetensors.")
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        "auto", description="Type of the weights; auto: the source's (float32 becomes float16)."
    )
    tp_size: Size = Field(1, description="Tensor-parallel ranks.")
    pp_size: Size = Field(1, description="Pipeline stages.")
    cp_size: Size = Field(1, description="Context-parallel ranks (recorded; they share files).")
    moe_tp_size: ExpertSize = Field(-1, description="Tensor-parallel size inside experts; -1: all that moe_ep_size leaves.")
    moe_ep_size: ExpertSize = Field(-1, description="Expert-parallel size; -1: 1.")
    use_parallel_embedding: bool = Field(False, description="Split the embedding over the tensor-parallel ranks.")
    embedding_sharding_dim: Literal[0, 1] = Field(0, description="Axis of that split: 0 vocabulary, 1 hidden.")
    mlp_bias: Literal["omit", "keep", "refuse"] = Field(
        "omit", description="Biases of the MLP in the source: omit as NVIDIA does, keep, or refuse the model."
    )
    write_rope_buffers: bool = Field(False, description="Write the rotary position buffers, which the loader computes itself.")
    disable_weight_only_quant_plugin: bool = Field(False, description="Recorded in config.json, as NVIDIA's flag.")
    remove_duplicated_kv_heads: bool = Field(False, description="Recorded in config.json, as NVIDIA's flag.")
    load_by_shard: bool = Field(False, description="Accepted for NVIDIA's sake: reading is always piece by piece.")
    load_model_on_cpu: bool = Field(False, description="Accepted for NVIDIA's sake: no GPU is ever used.")
    workers: Annotated[int, Field(ge=0)] = Field(0, description="Threads that work at once; 0: one a core, at most 8.")
    memory_limit: ByteSize = Field(ByteSize(2 << 30), description="Most memory that the process may use, such as 2GiB.")
    scheduler: str = Field("local", description="local (with dashboard), threads, synchronous, or tcp://host:port.")
    overwrite: bool = Field(False, description="Start afresh where the output directory holds a finished conversion.")

    @property
    def threads(self) -> int:
        """The number of worker threads that the job runs on."""
        return self.workers or min(os.cpu_count() or 1, 8)

    def options(self) -> dict[str, Any]:
        """The fields that decide what is written, as plain values."""
        ignored = {
            "model_dir",
            "output_dir",
            "workers",
            "memory_limit",
            "scheduler",
            "overwrite",
            "load_by_shard",
            "load_model_on_cpu",
        }
        return self.model_dump(mode="json", exclude=ignored)


def make_job(options: Mapping[str, Any], file: Path | None = None) -> Job:
    """A job from a TOML file, where given, with `options` laid over it. Raises BadInput naming each option that is wrong."""
    values = {**(_load(file) if file else {}), **options}
    try:
        job = Job(**values)
    except ValidationError as error:
        raise BadInput([_problem(dict(detail), file, options) for detail in error.errors()]) from None
    if not job.scheduler.startswith(("tcp://", "tls://")) and job.scheduler not in ("local", "threads", "synchronous"):
        raise BadInput([Problem("--scheduler", job.scheduler, "local, threads, synchronous or tcp://host:port")])
    return job


def _load(file: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(file.read_text())
    except OSError as error:
        raise BadInput([Problem(str(file), error.strerror or "an error", "a job file")]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput([Problem(str(file), f"text that is not TOML ({error})", "a job file")]) from None
    # Paths in a job file are relative to the file, so that it means the same from everywhere.
    for key in ("model_dir", "output_dir"):
        if isinstance(values.get(key), str):
            values[key] = file.absolute().parent / Path(values[key]).expanduser()
    return values


def _problem(detail: Mapping[str, Any], file: Path | None, options: Mapping[str, Any]) -> Problem:
    name = ".".join(map(str, detail["loc"])) or "job"
    subject = f"--{name}" if name in options or file is None else f"{file}: {name}"
    if detail["type"] == "missing":
        return Problem(f"--{name}", "nothing", f"a value: {Job.model_fields[name].description}")
    if detail["type"] == "extra_forbidden":
        return Problem(subject, "an option that headrace does not have", f"one of {', '.join(Job.model_fields)}")
    return Problem(subject, repr(detail.get("input")), str(detail["msg"]).lower())
