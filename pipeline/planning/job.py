"""Job: a validated request for one conversion, from Python, the command line (NVIDIA's flag names) or a TOML file.

Each field is a keyword of `convert` and `plan`, a key of a job file, and a flag of the command line.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Unpack

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic.types import ByteSize

from pipeline.errors import BadInput, Problem
from pipeline.planning.cluster_table import cluster_problems
from pipeline.planning.engine_options import job_requests
from pipeline.planning.job_file import model_name, read_job_file, revision_problems, scratch_root
from pipeline.planning.keywords import JobOptions
from pipeline.planning.listen import listen_text
from pipeline.planning.quantizations import PRECISION, overlaid, precision_alone, without_contradictions
from pipeline.planning.target_options import AbsolutePath, OutputPlace, Shape, Size, TargetOptions
from pipeline.planning.wrong_values import expected, place, unknown_name, unlike, wrong_value
from pipeline.sinks.remote import store_fault
from pipeline.sinks.scratch import DEFAULT_ROOT
from pipeline.tensor.remote_path import RemotePath
from pipeline.urls import NO_SECRET, holds_secret, shown

SCRATCH_STAGES = ("read", "rename", "unpack", "shard")


def _names(value: Any) -> Any:
    """Split text at commas; return any other value unchanged."""
    return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value


ModelName = Annotated[Path | str, BeforeValidator(model_name)]
ScratchRoot = Annotated[str, BeforeValidator(scratch_root)]
ListenAddress = Annotated[str, AfterValidator(listen_text)]
CutNames = Annotated[tuple[Literal["read", "rename", "unpack", "shard", "auto", "none"], ...], BeforeValidator(_names)]

RANGES = ("act_range", "calibration_tokens", "calib_dataset")  # what ranges of activations are from: one of these files


class Job(Shape):
    """One conversion: a source, and one target (`output_dir` and the fields of Shape) or several (`target`).

    `make_job` makes one and checks that its options do not contradict each other.
    """

    model_dir: ModelName | None = Field(
        None,
        description="Checkpoint to read: a Hugging Face or Meta directory, a GGUF file, org/name or org/name:TAG of the Hub.",
    )
    meta_ckpt_dir: AbsolutePath | None = Field(None, description="Meta checkpoint to read: params.json and consolidated.*.pth.")
    quant_ckpt_path: AbsolutePath | None = Field(
        None, description="Quantized checkpoint, file or directory, whose tensors stand in for those of model_dir."
    )
    act_range: AbsolutePath | None = Field(
        None,
        description="Largest magnitudes of activations, by `headrace calibrate`: for SmoothQuant, FP8 and 8-bit caches.",
    )
    calibration_tokens: AbsolutePath | None = Field(
        None, description="In its place tokens to measure them on first: a safetensors file with input_ids [samples, tokens]."
    )
    calib_dataset: AbsolutePath | None = Field(
        None, description="Or a file of texts for the checkpoint's own tokenizer: a line each, JSON lines, or Parquet."
    )
    calib_size: Size = Field(512, description="Samples that are made of texts at most.")
    calib_max_seq_length: Size = Field(512, description="Tokens of a sample that is made of texts.")
    calibration_dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        "auto", description="Type that the model is run in to measure activations; auto: the source's."
    )
    calibration_device: str = Field("cpu", description="Where it is run, by torch's name: cpu, cuda, cuda:1.")
    revision: str | None = Field(None, description="Branch, tag or commit of a model on the Hub.")
    output_dir: OutputPlace | None = Field(
        None, description="Directory, or s3://, gs:// or az:// prefix, for config.json and rank{N}.safetensors."
    )
    target: tuple[dict[str, Any], ...] = Field((), description="Several targets of one read, in a job file: [[target]] tables.")
    engine: dict[str, Any] | None = Field(None, description="Engines of all targets, in a job file: an [engine] table.")
    max_position_embeddings: Size | None = Field(
        None, description="Positions that the model was trained for, where Meta's params.json cannot tell; default: see the plan."
    )
    rope_scaling_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="Factor of Meta's use_scaled_rope, where params.json cannot tell; default: see the plan."
    )
    query_pre_attn_scalar: Size | None = Field(
        None, description="Number by whose root Gemma divides scores, where a GGUF file's size cannot tell; default: see the plan."
    )
    expect: dict[str, int | float | str] = Field(
        {}, description="Values that the model must have, such as num_hidden_layers, or it is refused: an [expect] table."
    )
    mlp_bias: Literal["omit", "keep", "refuse"] = Field(
        "keep", description="Biases of the MLP in the source: keep, omit as NVIDIA's converter does, or refuse the model."
    )
    rope_scaling: Literal["auto", "none", "keep"] = Field(
        "auto",
        description="Scaling of rotary positions: auto as TensorRT-LLM 1.2 reads it; none: left out; keep: as the source has it.",
    )
    check_crc: bool = Field(
        False, description="Hold zip archives of torch.save (.bin, .pth) against their CRCs while planning, which reads them whole."
    )
    copy_tokenizer: bool = Field(False, description="Copy the tokenizer's and chat template's files beside the ranks.")
    workers: Annotated[int, Field(ge=0)] = Field(
        0, description="Threads that work at once (in NVIDIA's script ranks at once); 0: one a core, at most 8."
    )
    memory_limit: ByteSize = Field(ByteSize(2 << 30), description="Most memory that the process may use, such as 2GiB.")
    scheduler: str = Field("local", description="local (with dashboard), threads, synchronous, or tcp://host:port.")
    cluster: dict[str, Any] | None = Field(
        None, description="A Dask cluster to start for the job: a [cluster] table with its class and options."
    )
    listen: ListenAddress | None = Field(
        None, description="HOST:PORT of the dashboard and headrace's page; default: 127.0.0.1:8787, only where there is a cluster."
    )
    performance_report: AbsolutePath | None = Field(None, description="File for Dask's own report of the run, as HTML.")
    scratch: ScratchRoot | None = Field(
        None, description="Directory or URL for cuts; default: .headrace-scratch beside the output."
    )
    scratch_after: CutNames = Field(
        ("auto",), description="Stages after which tensors go to Zarr scratch: read, rename, unpack, shard; auto; none."
    )
    keep_scratch: bool = Field(False, description="Keep scratch after success, for other jobs to use.")
    scratch_outputs: tuple[OutputPlace, ...] = Field(
        (), description="Outputs of several jobs for which scratch is kept: whoever completes the last of them removes it."
    )
    sync: bool = Field(False, description="Have every byte on disk before config.json is written, as a power cut may ask for.")
    overwrite: bool = Field(False, description="Start afresh where the output directory holds another conversion.")
    per_group: bool = Field(False, description="Accepted for NVIDIA's sake: scales by group are the source's.")
    load_by_shard: bool = Field(False, description="Accepted for NVIDIA's sake: reading is always piece by piece.")
    load_model_on_cpu: bool = Field(False, description="Accepted for NVIDIA's sake: no GPU is ever used.")

    if TYPE_CHECKING:
        # A field takes more types than it holds: "ranks" for a path, "1GiB" for a size.
        def __init__(self, **options: Unpack[JobOptions]) -> None: ...

    @property
    def threads(self) -> int:
        """The number of worker threads that the job runs on."""
        return self.workers or min(os.cpu_count() or 1, 8)

    @property
    def targets(self) -> tuple[TargetOptions, ...]:
        """The targets to write: each `[[target]]` with the job's own fields as defaults, or else the job's single target."""
        shape = self.model_dump(include=set(Shape.model_fields), exclude_unset=True)
        return tuple(TargetOptions(**overlaid(shape, table)) for table in self.target or ({"output_dir": self.output_dir},))

    @property
    def cuts(self) -> tuple[str, ...]:
        """The stages that the user wants cuts after, in processing order; none for `auto` and `none`."""
        return tuple(stage for stage in SCRATCH_STAGES if stage in self.scratch_after)

    @property
    def scratch_root(self) -> str:
        """The directory or URL of scratch: by default beside the first output, or here where that is in object storage."""
        return self.scratch or str(self.scratch_directory)

    @property
    def scratch_directory(self) -> Path:
        """The directory of what goes to no bucket: that of scratch, or, where this is a URL, the one that it has by default."""
        beside = self.targets[0].output_dir.parent
        default = (Path.cwd() if isinstance(beside, RemotePath) else beside) / DEFAULT_ROOT
        return Path(self.scratch) if self.scratch and "://" not in self.scratch else default

    @property
    def elsewhere(self) -> bool:
        """Whether the workers are other processes, perhaps on other machines."""
        return self.scheduler.startswith(("tcp://", "tls://")) or bool(self.cluster and "class" in self.cluster)

    def source_identity(self) -> dict[str, Any]:
        """Return the fields that decide which tensors of the source are read, as plain values."""
        said: dict[str, Any] = {name: value for name, value in self.unsaid().items() if value is not None}
        said |= {"act_range": self.act_range.name} if self.act_range else {}
        said |= self._measured() if self.calibrates else {}
        return {"mlp_bias": self.mlp_bias, "rope_scaling": self.rope_scaling, **said}

    @property
    def calibrates(self) -> bool:
        """Whether activations are measured in the run itself."""
        return bool(self.calibration_tokens or self.calib_dataset)

    def _measured(self) -> dict[str, Any]:
        """Return the fields that decide what is measured, as plain values."""
        made = {"calib_size": self.calib_size, "calib_max_seq_length": self.calib_max_seq_length} if self.calib_dataset else {}
        files = {"calibration_tokens": self.calibration_tokens, "calib_dataset": self.calib_dataset}
        named = {name: path.name for name, path in files.items() if path}
        return {**named, **made, "calibration_dtype": self.calibration_dtype, "calibration_device": self.calibration_device}

    def unsaid(self) -> dict[str, int | float | None]:
        """Return what the job says of a model whose configuration may not say it; None where it does not."""
        return {
            "max_position_embeddings": self.max_position_embeddings,
            "rope_scaling_factor": self.rope_scaling_factor,
            "query_pre_attn_scalar": self.query_pre_attn_scalar,
        }


def make_job(options: Mapping[str, Any], file: Path | None = None, live: bool = False, base: Job | None = None) -> Job:
    """Make a job from options and, where given, a TOML file or another job.

    Parameters
    ----------
    options
        Fields of Job by name. They override those of `file` and `base`, in the tables of targets too; of `expect` each its own key.
    file
        A job file.
    live
        The source is a model in memory, so the options must not name one.
    base
        A job in the place of a file.

    Returns
    -------
    Job
        The job, with absolute paths.

    Raises
    ------
    BadInput
        Every option that is unknown, missing, has a wrong value or contradicts another.
    """
    before = read_job_file(file) if file else base.model_dump(exclude_unset=True) if base else {}
    values = overlaid(before, options)
    if all(isinstance(each.get("expect"), Mapping) for each in (before, options)):
        values["expect"] = {**before["expect"], **options["expect"]}
    tables = before.get("target") if "target" not in options else None
    if tables and isinstance(tables, list | tuple) and all(isinstance(table, dict) for table in tables):
        # An option overrides every target's, but targets cannot share an output directory.
        if "output_dir" in options:
            expected = "the directories of the [[target]] tables"
            raise BadInput([Problem("--output_dir", f"one directory for {len(tables)} targets", expected)])
        values["target"] = [_without(table, options) for table in tables]
    values, contradicting = without_contradictions(values)
    try:
        job = Job(**values)
    except ValidationError as error:
        problems = [*contradicting, *(_problem(detail, file, options) for detail in unlike(error.errors()))]
        if not values.get("target") and values.get("output_dir") is None:
            problems.append(_no_output())
        raise BadInput(problems) from None
    problems = contradicting + _sources(job, live) + _contradictions(job, file)
    if problems:
        raise BadInput(problems)
    job_requests(job.targets, job.engine, job.scratch_root)
    return job


def _without(table: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """A target's table without what options override: its flags where they name a quantization, its name where they have flags."""
    return {key: value for key, value in overlaid(table, options).items() if key in table and key not in options}


def _sources(job: Job, live: bool) -> list[Problem]:
    """Check that the options name exactly one source, and that the options about it fit."""
    named = {"a model in memory": live or None, "--model_dir": job.model_dir, "--meta_ckpt_dir": job.meta_ckpt_dir}
    given = [name for name, value in named.items() if value is not None]
    problems = []
    if not given:
        problems.append(Problem("--model_dir", "nothing", f"a value: {Job.model_fields['model_dir'].description}"))
    elif len(given) > 1:
        problems.append(Problem(given[1], f"a second source beside {given[0]}", "one source"))
    if job.quant_ckpt_path and job.model_dir is None:
        expected = "--model_dir with the model that it was quantized from"
        problems.append(Problem("--quant_ckpt_path", f"{job.quant_ckpt_path} alone", expected))
    return problems + revision_problems(job.model_dir, job.revision)


def _no_output() -> Problem:
    return Problem("--output_dir", "nothing", f"a value: {Job.model_fields['output_dir'].description}")


def _contradictions(job: Job, file: Path | None) -> list[Problem]:
    """Check the options that depend on one another: scheduler, scratch, outputs and report."""
    problems = []
    if not job.elsewhere and job.scheduler not in ("local", "threads", "synchronous"):
        problems.append(Problem("--scheduler", job.scheduler, "local, threads, synchronous or tcp://host:port"))
    scheduler = job.scheduler if "scheduler" in job.model_fields_set else None
    problems += [*cluster_problems(job.cluster, scheduler), *_report(job), *_calibration(job)]
    if job.scratch and holds_secret(job.scratch):
        problems.append(Problem(f"--scratch {shown(job.scratch)}", "a URL with a secret in it", NO_SECRET))
    elif job.scratch and "://" in job.scratch and (fault := store_fault(job.scratch)):
        problems.append(fault)
    if {"auto", "none"} & set(job.scratch_after) and len(job.scratch_after) > 1:
        problems.append(Problem("--scratch_after", ",".join(job.scratch_after), "auto, none, or names of stages"))
    if not job.target and job.output_dir is None:
        problems.append(_no_output())
        return problems
    if job.target and job.output_dir is not None:
        problems.append(Problem(f"{file or 'job'}: output_dir", "both a directory and [[target]] tables", "one or the other"))
    try:
        directories = [target.output_dir for target in job.targets]
    except ValidationError as error:
        details: list[Any] = list(error.errors())
        return problems + [_problem({**detail, "loc": ("target", *detail["loc"])}, file, {}) for detail in details]
    problems += _precision(job)
    if job.performance_report and job.performance_report.parent in directories:
        found = "a place among the rank files"
        problems.append(Problem(f"--performance_report {job.performance_report}", found, "a file outside the output directory"))
    problems += _scratch_apart(job, directories)
    twice = {str(directory) for directory in directories if directories.count(directory) > 1}
    problems += [Problem(f"output_dir {directory}", "two targets", "a directory for each") for directory in sorted(twice)]
    return problems


def _scratch_apart(job: Job, directories: Iterable[Any]) -> list[Problem]:
    """Refuse scratch among the files of an output: they would be files that no conversion writes there."""
    root = job.scratch_root
    local = [] if "://" in root else [each for each in directories if not isinstance(each, RemotePath)]
    inside = [each for each in local if Path(root).resolve().is_relative_to(each.resolve())]
    if not inside:
        return []
    remedy = f"Give another directory, such as {inside[0].parent / DEFAULT_ROOT}"
    return [Problem(f"--scratch {root}", f"a place in the output {inside[0]}", "a directory apart from the outputs", remedy)]


def _precision(job: Job) -> list[Problem]:
    """A precision of weights where nothing has weights quantized."""
    own = [target for target, table in zip(job.targets, job.target, strict=False) if PRECISION in table]
    unused = [target for target in own if not target.use_weight_only]
    if PRECISION in job.model_fields_set and not any(each.use_weight_only for each in (job, *job.targets)):
        unused.append(job.targets[0])
    return list(dict.fromkeys(precision_alone(target.weight_only_precision) for target in unused))


def _calibration(job: Job) -> list[Problem]:
    """Check that activations are measured once, and that what is said of that is said of something."""
    files = {f"--{name}": getattr(job, name) for name in RANGES}
    given = [name for name, path in files.items() if path]
    if len(given) > 1:
        return [Problem(given[1], f"{given[0]} too", "one file of what is measured")]
    own = [] if job.calibrates else ["calibration_dtype", "calibration_device"]
    own += [] if job.calib_dataset else ["calib_size", "calib_max_seq_length"]
    unused = [name for name in own if name in job.model_fields_set and getattr(job, name) != Job.model_fields[name].default]
    expected = "--calib_dataset beside it" if "calib_size" in own else "--calibration_tokens or --calib_dataset beside it"
    return [Problem(f"--{name} {getattr(job, name)}", "nothing that it is about", expected, "Leave it out") for name in unused]


def _report(job: Job) -> list[Problem]:
    """Check the path of a performance report, and that the scheduler can make one."""
    path = job.performance_report
    if path is None:
        return []
    subject = f"--performance_report {path}"
    if job.scheduler in ("threads", "synchronous"):
        remedy = "Leave out --scheduler, or the report"
        return [Problem(subject, f"--scheduler {job.scheduler}, which keeps no record of its tasks", "a cluster", remedy)]
    if path.is_dir() or not path.parent.is_dir():
        return [Problem(subject, "a directory" if path.is_dir() else "no such directory", "a file in a directory that is there")]
    return []


def _problem(detail: Mapping[str, Any], file: Path | None, options: Mapping[str, Any]) -> Problem:
    """Turn one of pydantic's errors into a Problem that names the flag, the keyword or the job file's key."""
    name = place(detail["loc"]) or "job"
    subject = f"--{name}" if name in options or file is None else f"{file}: {name}"
    if detail["type"] == "missing":
        field = Job.model_fields.get(name)
        return Problem(subject if file else f"--{name}", "nothing", f"a value: {field.description}" if field else "a value")
    if detail["type"] == "extra_forbidden":  # no flag of the command line, which knows its own
        key, names = str(detail["loc"][-1]), TargetOptions.model_fields if "target" in detail["loc"] else Job.model_fields
        subject = f"{file}: {name}" if file and name not in options else name
        found, listed = "an option that headrace does not have", "one that `headrace convert --help` lists"
        return unknown_name(subject, key, names, found, listed)
    value = detail.get("input")
    # A table of a cluster's options may have a password in it, and an address.
    hidden = name.partition(".")[0] == "cluster" or (isinstance(value, str) and holds_secret(value))
    if isinstance(value, str) and "://" in value:  # it may hold a secret
        return Problem(subject, f"{value.partition('://')[0]}://...", expected(detail))
    return Problem(subject, f"a value of type {type(value).__name__}", expected(detail)) if hidden else wrong_value(subject, detail)
