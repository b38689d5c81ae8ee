"""Describes a checkpoint, and the formats known: `headrace inspect`, `formats`. Opens headers only."""

from __future__ import annotations

import math
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.errors import BadInput, Problem
from pipeline.model.dtypes import of_numpy
from pipeline.model.model_config import ModelConfig, model_config
from pipeline.model.parallelism import Parallelism
from pipeline.model.quantization import Quantization
from pipeline.model.runtime import runtime
from pipeline.model.tables import Family, find_family, layout
from pipeline.model.unsaid import fill_in
from pipeline.planning.checks import expected
from pipeline.planning.choose_algorithm import choose, clean_settings
from pipeline.planning.conversions import conversions
from pipeline.planning.job import Job, make_job
from pipeline.planning.make_plan import plan_opened
from pipeline.planning.opening import OpenedSource, open_job
from pipeline.tensor.names import by_module
from pipeline.tensor.system_errors import refusing
from pipeline.tensor.tensors import Source, tensor_bytes
from stages.quantization.alignment import aligned
from stages.quantization.packed_format import PackedFormat
from stages.quantization.sources import formats
from stages.quantization.unread import unread_formats
from stages.read import find_source, sources
from stages.read.source_reader import SourceReader
from stages.rename import match
from stages.shard import Embedding, Sharding, dense, expert_sizes, tp_sizes
from stages.unpack import arranged, format_of


@refusing("the source", "files that can be read")
def inspect_source(model_dir: Path | str, revision: str | None = None) -> dict[str, Any]:
    """Describe a checkpoint as plain values. Raises BadInput where it cannot be opened.

    `problems` lists the reasons why it cannot be converted: an unknown family, tensors that do not fit, and so on.
    """
    with tempfile.TemporaryDirectory() as place:
        # Planning writes nothing: the directory is never made.
        job = make_job({"model_dir": model_dir, "revision": revision, "output_dir": Path(place) / "never", "scratch_after": "none"})
        try:
            opened = open_job(job)
        except BadInput as error:
            return _unopened(job, error)
        refused = _refusals(opened)
        ways = [] if opened.unreadable else conversions(opened, refused)
    facts = {**_facts(opened.source), "conversions": ways, "problems": [str(problem) for problem in refused]}
    return {**facts, **_of_model(opened.family, opened.model, bool(opened.matches.ties), _quantized(opened))}


def _unopened(job: Job, error: BadInput) -> dict[str, Any]:
    """Describe a source of no family, or one that is not what its configuration says, as far as it goes.

    Raises BadInput where it is no source at all.
    """
    source = find_source(job.model_dir, None, None, job.revision, download=False)
    source = replace(source, tensors=arranged(source.tensors))
    facts = {**_facts(source), "conversions": [], "problems": [str(problem) for problem in error.problems]}
    family = find_family(source.container, source.architecture)
    try:
        config = fill_in(source.config, family, source.config_name, {}).config if family else {}
        model = model_config(config, family, source.architecture, source.config_name) if family else None
    except BadInput:
        model = None
    if family is None or model is None:
        return {**facts, "family": family.name if family else None}
    matches = match(source.named, family, layout(family.layout), model, frozenset())
    return {**facts, **_of_model(family, model, bool(matches.ties), Quantization())}


def _of_model(family: Family, model: ModelConfig, tied: bool, quantization: Quantization) -> dict[str, Any]:
    """The facts of a source that is a model of a family."""
    sharding = Sharding(layout(family.layout), model, Parallelism.resolve(1, 1, 1, -1, -1), Embedding())
    return {
        "family": family.name,
        "model": _sizes(model),
        "parameters": _parameters(sharding, tied, family),
        "tied_embeddings": tied,
        **_parallel(sharding, quantization),
    }


def _refusals(opened: OpenedSource) -> tuple[Problem, ...]:
    """The problems with which `convert` would refuse this source, given no other options."""
    try:
        plan_opened(opened)
    except BadInput as error:
        return tuple(error.problems)
    return ()


def list_formats() -> dict[str, list[dict[str, Any]]]:
    """The sources that can be read, the quantized formats that can be unpacked, and those that are known by name alone.

    Each has a name and the first line of its file, a quantized one also the targets that keep its codes (`keeps`), the target
    where no option names one (`default`), and what its reading was compared with (`proof`).
    """
    return {
        "sources": [_described(source) for source in sources()],
        "quantized": [_quantized_format(packing) for packing in formats()],
        "not read": [{"name": row.name, "is": row.title} for row in unread_formats()],
    }


def _quantized_format(packing: PackedFormat) -> dict[str, Any]:
    default = packing.keeps[0] if packing.keeps and not packing.numbers else "16 bits"
    return {**_described(packing), "keeps": list(packing.keeps), "default": default, "proof": packing.proof}


def _described(known: PackedFormat | SourceReader) -> dict[str, str]:
    file = sys.modules[type(known).__module__]
    return {"name": known.name, "is": next(iter((file.__doc__ or known.title).strip().splitlines())).rstrip(".")}


def _facts(source: Source) -> dict[str, Any]:
    dtypes: Counter[str] = Counter()
    for tensor in source.tensors.values():
        dtypes[of_numpy(tensor.dtype).safetensors] += tensor_bytes(tensor)
    return {
        "path": source.place,
        "kind": source.kind,
        "architecture": source.architecture,
        "dtype": source.dtype,
        "tensors": len(source.tensors),
        "parameters": sum(math.prod(tensor.shape) for tensor in source.tensors.values()),
        "bytes": source.nbytes,
        "bytes_by_dtype": dict(dtypes.most_common()),
        "files": [{"file": file.path.name, "bytes": file.size_bytes} for file in source.files],
        "quantization": _quantization(source),
    }


def _quantization(source: Source) -> str | None:
    """The format that most packed modules show, or the method that the configuration names; None for a model that has neither."""
    found = Counter(packing.name for parameters in by_module(source.named).values() if (packing := format_of(parameters)))
    method = clean_settings(source.config).get("quant_method")
    return found.most_common(1)[0][0] if found else str(method) if method else None


def _sizes(model: ModelConfig) -> dict[str, Any]:
    names = ["num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_size"]
    names += ["vocab_size", "max_position_embeddings"] + (["num_experts", "experts_per_token"] if model.num_experts else [])
    return {name: getattr(model, name) for name in names}


def _parameters(sharding: Sharding, tied: bool, family: Family) -> int:
    """The model's learned numbers, whatever they are packed in; tied embeddings count once."""
    shapes = {name: sharding.shape(slot, dense(slot, parameter)) for name, slot, parameter in expected(sharding, {})}
    shared = set(family.ties) if tied else set()
    return sum(math.prod(shape) for name, shape in shapes.items() if name.module not in shared)


def _quantized(opened: OpenedSource) -> Quantization:
    """The quantization of a target where no option chooses another."""
    return Quantization() if opened.unreadable else choose(opened.job, opened.packing, opened.source.named)[0]


def _parallel(sharding: Sharding, quantization: Quantization) -> dict[str, Any]:
    """The sizes that the model can be cut to: any of tp_sizes with any of pp_sizes; experts as `moe_sizes` of a tp_size."""
    model = sharding.model
    sizes = aligned(sharding, quantization, tp_sizes(model, sharding))
    model_class = runtime().classes.get(model.architecture)
    stages = model.num_hidden_layers if model_class is None or model_class.pipeline_stages else 1
    result: dict[str, Any] = {"tp_sizes": list(sizes), "pp_sizes": [1, stages]}
    if model.num_experts:
        result["moe_sizes"] = {size: [list(pair) for pair in expert_sizes(model, size)] for size in sizes}
    return result
