"""Command-line flags: one for each field of Job, and those that several commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from pydantic.types import ByteSize

from pipeline.cli.shared import WATCHING
from pipeline.errors import BadInput, Problem
from pipeline.planning.job import Job, make_job
from pipeline.planning.nvidia_flags import understood
from pipeline.planning.nvidia_table import nvidia_flags

JOB_FILE = typer.Argument(help="A TOML file of these options; flags override it.", show_default=False)

NVIDIA_PANEL = "Flags of NVIDIA's scripts"
# The groups of the help, in its order, with the fields of Job that are in each.
PANELS: Mapping[str, tuple[str, ...]] = {
    "Source": (
        "model_dir",
        "meta_ckpt_dir",
        "quant_ckpt_path",
        "revision",
        "max_position_embeddings",
        "rope_scaling_factor",
        "query_pre_attn_scalar",
        "mlp_bias",
        "rope_scaling",
        "check_crc",
    ),
    "Target": (
        "output_dir",
        "dtype",
        "tp_size",
        "pp_size",
        "cp_size",
        "moe_tp_size",
        "moe_ep_size",
        "use_parallel_embedding",
        "embedding_sharding_dim",
        "write_rope_buffers",
        "remove_duplicated_kv_heads",
        "copy_tokenizer",
        "overwrite",
        "sync",
    ),
    "Quantization": (
        "quantization",
        "use_weight_only",
        "weight_only_precision",
        "group_size",
        "sm",
        "dequantize",
        "requantize",
        "use_fp8",
        "use_fp8_rowwise",
        "use_meta_fp8_rowwise_recipe",
        "use_nvfp4",
        "smoothquant",
        "per_channel",
        "per_token",
        "int8_kv_cache",
        "fp8_kv_cache",
        "act_range",
        "disable_weight_only_quant_plugin",
    ),
    "Calibration": (
        "calibration_tokens",
        "calib_dataset",
        "calib_size",
        "calib_max_seq_length",
        "calibration_dtype",
        "calibration_device",
    ),
    "Running": ("workers", "memory_limit", "scheduler"),
    "Scratch": ("scratch", "scratch_after", "keep_scratch"),
    WATCHING: ("listen", "performance_report"),
    NVIDIA_PANEL: ("per_group", "load_by_shard", "load_model_on_cpu"),
}
IN_FILES_ALONE = frozenset({"target", "engine", "expect", "scratch_outputs", "cluster"})
# The words that stand for a value, where they are not those of its type.
METAVARS = {
    "model_dir": "PATH|NAME",
    "revision": "NAME",
    "listen": "HOST:PORT",
    "memory_limit": "SIZE",
    "scheduler": "NAME|URL",
    "scratch": "PATH|URL",
    "scratch_after": "STAGES",
    "smoothquant": "ALPHA",
    "rope_scaling_factor": "X",
}
SHORT = {"smoothquant": ("-sq",)}  # more spellings of flags, as NVIDIA's scripts have them
TAKES = {"nothing": bool, "integer": int, "number": float, "text": str}


def job_options(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate `command(job, **its own options)`: add a flag for each field of Job, and pass the Job made of those given.

    NVIDIA's other flags are there too; those that say how much to print become the command's own `quiet`.
    """

    def run(file: Path | None, **values: Any) -> None:
        given = taken(values)
        own = {name: values.pop(name) for name in list(values) if name not in Job.model_fields}
        options = {name: value for name, value in values.items() if value is not None}
        known = understood(given, options)
        if "quiet" in own:
            own["quiet"] = own["quiet"] or known.quiet
        command(_job({**options, **known.options}, file, known.problems), **own)

    own = list(inspect.signature(command).parameters.values())[1:]
    hints = inspect.get_annotations(command, eval_str=True)
    file_type: Any = Annotated[Path | None, JOB_FILE]
    parameters = [inspect.Parameter("file", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=file_type, default=None)]
    for panel, names in PANELS.items():
        for name in names:
            field = Job.model_fields[name]
            annotation: Any = Annotated[_flag_type(field), _option(name, field, panel)]
            parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=None))
    parameters += nvidia_parameters()
    parameters += [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[parameter.name]) for parameter in own]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = command.__doc__
    return run


def nvidia_options(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate `command(nvidia, **its own options)`: add NVIDIA's other flags, and pass the meaning of those given as `nvidia`."""
    signature = inspect.signature(command)
    hints = inspect.get_annotations(command, eval_str=True)

    def run(**values: Any) -> None:
        known = understood(taken(values), {name: value for name, value in values.items() if value is not None})
        if known.problems:
            raise BadInput(known.problems)
        command(known, **values)

    own = list(signature.parameters.values())[1:]
    parameters = [parameter.replace(annotation=hints[parameter.name]) for parameter in own]
    run.__signature__ = signature.replace(parameters=[*parameters, *nvidia_parameters()])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*parameters, *nvidia_parameters()]}
    run.__doc__ = command.__doc__
    return run


def nvidia_parameters() -> list[inspect.Parameter]:
    """A keyword for each of NVIDIA's other flags; those that are refused are not in the help."""
    parameters = []
    for flag in nvidia_flags().values():
        meaning = (
            f"Another name of --{flag.becomes}."
            if flag.becomes
            else flag.help or f"Refused unless the model has this {flag.expects}."
        )
        option = typer.Option(
            f"--{flag.name}", *flag.words, help=meaning, show_default=False, rich_help_panel=NVIDIA_PANEL, hidden=bool(flag.refused)
        )
        annotation: Any = Annotated[TAKES[flag.takes] | None, option]
        parameters.append(inspect.Parameter(flag.name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=None))
    return parameters


def taken(values: dict[str, Any]) -> dict[str, Any]:
    """Take NVIDIA's other flags out of `values`, and return those that were given."""
    own = {name: values.pop(name) for name in nvidia_flags()}
    return {name: value for name, value in own.items() if value is not None}


def _job(options: Mapping[str, Any], file: Path | None, problems: Sequence[Problem]) -> Job:
    """The job of these options. Raises BadInput with `problems` and the options' own."""
    try:
        job = make_job(options, file)
    except BadInput as error:
        raise BadInput([*problems, *error.problems]) from None
    if problems:
        raise BadInput(problems)
    return job


def _flag_type(field: FieldInfo) -> Any:
    """Return the type that the command line parses a field's value as: Job itself says what is wrong with it."""
    return bool | None if field.annotation is bool else str | None


def _option(name: str, field: FieldInfo, panel: str) -> Any:
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    flags = f"--{name}/--no_{name}" if field.annotation is bool else f"--{name}"
    said = [field.description or "", f"Choices: {', '.join(map(str, choices))}." if choices else "", _default(field)]
    metavar = METAVARS.get(name) or (
        "NAME" if choices else "PATH" if Path in _types(field) else "N" if int in _types(field) else "X"
    )
    return typer.Option(
        flags,
        *SHORT.get(name, ()),
        help=" ".join(filter(None, said)),
        metavar=None if field.annotation is bool else metavar,
        show_default=False,
        rich_help_panel=panel,
    )


def _types(field: FieldInfo) -> set[Any]:
    """The types that a field's value may have."""
    kind = field.annotation
    return {get_args(each)[0] if get_args(each) else each for each in (get_args(kind) or (kind,))}


def _default(field: FieldInfo) -> str:
    """A field's default as people write it; "" where it has none, and of switches."""
    value = field.default
    if field.is_required() or value is None or isinstance(value, bool):
        return ""
    words = value.human_readable() if isinstance(value, ByteSize) else ",".join(value) if isinstance(value, tuple) else str(value)
    return f"Default: {words.replace('.0', '')}."
