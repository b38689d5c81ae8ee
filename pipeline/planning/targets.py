"""Plan a target's directory: the layout of its rank files, the text of config.json, and what headrace.json says."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pipeline.model.quantization import GROUPED, Quantization
from pipeline.model.target_config import target_config
from pipeline.model.windows import runtime_defaults
from pipeline.planning.calibrating import Calibrating
from pipeline.planning.compose import TargetTensors
from pipeline.planning.job import RANGES, Job
from pipeline.planning.opening import OpenedSource
from pipeline.planning.plans import Target
from pipeline.planning.rank_parts import part_bytes
from pipeline.planning.target_options import TargetOptions
from pipeline.sinks.bucket_output import BucketOutput
from pipeline.sinks.output import Output
from pipeline.sinks.rank_file import rank_file
from pipeline.tensor.bucket import in_parts
from pipeline.tensor.placement import RankTensor
from pipeline.tensor.remote_path import is_remote
from pipeline.tensor.tensors import Source
from pipeline.version import VERSION
from stages.shard import Sharding


def plan_identity(opened: OpenedSource, calibrating: Calibrating | None = None) -> list[Any]:
    """Everything that the bytes of a plan depend on beside a target's own options, as plain values."""
    files = [file.fingerprint() for file in opened.source.files]
    measured = [calibrating.plan.identity] if calibrating else []
    return [VERSION, opened.family.name, opened.job.source_identity(), files, *measured]


def config_values(
    opened: OpenedSource, options: TargetOptions, sharding: Sharding, quantization: Quantization, dtype: str
) -> dict[str, Any]:
    """Return the values of a target's config.json. `dtype`: TensorRT-LLM's name of the type of what is not quantized."""
    values = {
        "dtype": dtype,
        "mapping": sharding.parallelism.mapping(),
        "quantization": quantization.config(),
        "quantization_set": quantization.config_set(),
        "runtime_defaults": runtime_defaults(sharding.model),
        "tensor_parallel": options.tp_size > 1,
        "use_parallel_embedding": options.use_parallel_embedding,
        "embedding_sharding_dim": options.embedding_sharding_dim,
        "disable_weight_only_quant_plugin": options.disable_weight_only_quant_plugin,
        "remove_duplicated_kv_heads": options.remove_duplicated_kv_heads,
        "logits_dtype": "float32",
        "tie_word_embeddings": opened.tie_word_embeddings,
    }
    return target_config(sharding.layout.config, opened.family.config, sharding.model, values)


def make_target(
    tensors: TargetTensors,
    opened: OpenedSource,
    identity: Sequence[Any],
    left_out: Mapping[str, str],
    notes: Sequence[str],
    cuts: Mapping[str, tuple[str, str]],
) -> Target:
    """The output of one target.

    `identity`: `plan_identity`'s; `left_out` and `notes` are for headrace.json, `cuts` for the journal, as `Output` has them.
    """
    options, sharding, source = tensors.options, tensors.sharding, opened.source
    own = _identity(options, tensors.quantization)
    by_rank: dict[int, list[RankTensor]] = {rank.index: [] for rank in sharding.parallelism.ranks()}
    for tensor in tensors.ranks:
        by_rank[tensor.rank].append(tensor)
    files = tuple(rank_file(options.output_dir / f"rank{index}.safetensors", own) for index, own in sorted(by_rank.items()))
    config = json.dumps(config_values(opened, options, sharding, tensors.quantization, tensors.dtype), indent=4)
    copies = source.companions if opened.job.copy_tokenizer else ()
    provenance = {
        "headrace": VERSION,
        "source": _recorded(source, opened.job),
        "options": {**opened.job.source_identity(), **own},
        "left_out": dict(left_out),
        "notes": list(notes),
    }
    decides = [list(identity), own, [path.name for path in copies]]
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    output = Output(options.output_dir, files, config, digest, copies, opened.job.sync, provenance, cuts)
    return Target(options, tensors.dtype, _in_its_place(output, opened.job))


def _recorded(source: Source, job: Job) -> dict[str, Any]:
    """The source as headrace.json has it, and its files: each by its place in it.

    A file that an option of the job names apart from the source has that option beside it, as `of`: then it is by its own name, or
    by its place in a quantized checkpoint, whose own place is said, too.
    """
    folders = {"": _folder(source.location)}
    folders |= {"quant_ckpt_path": _folder(job.quant_ckpt_path)} if job.quant_ckpt_path else {}
    given = {path: option for option in RANGES if (path := getattr(job, option))}
    files = []
    for file in source.files:
        values = file.fingerprint()
        of = given.get(file.path) or next((option for option, folder in folders.items() if file.path.is_relative_to(folder)), "")
        if folder := folders.get(of):
            values["path"] = str(file.path.relative_to(folder)) if file.path.is_relative_to(folder) else file.path.name
        files.append({**values, "of": of} if of else values)
    beside = {"quant_ckpt_path": str(job.quant_ckpt_path)} if job.quant_ckpt_path else {}
    return {"path": source.place, "kind": source.kind, **beside, "files": files}


def _folder(place: Path) -> Path:
    """The directory that a checkpoint is, or that its file is in."""
    return place if place.is_dir() else place.parent


def _identity(options: TargetOptions, quantization: Quantization) -> dict[str, Any]:
    """A target's options that decide its bytes: without a size of groups, which may be given, where there are no groups."""
    return options.identity() | ({} if quantization.algorithm in GROUPED else {"group_size": None})


def _in_its_place(output: Output, job: Job) -> Output:
    """The output as its directory has it, which may be in object storage."""
    if not is_remote(output.directory):
        return output
    journals = Path(tempfile.gettempdir() if "://" in job.scratch_root else job.scratch_root)
    sizes = tuple(part_bytes(file.size_bytes, output.size_bytes) if in_parts(str(file.path)) else 0 for file in output.files)
    own = {each.name: getattr(output, each.name) for each in fields(Output)}
    return BucketOutput(**own, journals=journals, part_bytes=sizes)
