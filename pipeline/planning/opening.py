"""The first stage of planning: the source opened, its family, its model and its packed modules known, every tensor's row found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import BadInput, Problem
from pipeline.model.model_config import ModelConfig, model_config
from pipeline.model.tables import Family, families, find_family, layout
from pipeline.planning.choose_algorithm import Packing, clean_settings
from pipeline.planning.job import Job, TargetOptions
from pipeline.sinks.output_checks import check_output, check_source
from pipeline.tensor.names import by_module
from pipeline.tensor.tensors import Source
from stages.quantization.sources import formats as known_formats
from stages.quantization.unread import unread
from stages.read import find_source, open_model
from stages.rename import Matches, match
from stages.shard import Embedding, Sharding
from stages.unpack import arranged, axes, check, zero_biases


@dataclass(frozen=True)
class OpenedSource:
    """A job's source as planning knows it before anything is composed.

    Attributes
    ----------
    model
        The model as it is converted: without the biases that the job leaves out.
    packing
        The source's packed modules; `unreadable` are the problems of those that cannot be unpacked.
    shardings
        One for each target of the job.
    output_problems
        What is wrong with the output directories.
    """

    job: Job
    source: Source
    family: Family
    model: ModelConfig
    packing: Packing
    unreadable: tuple[Problem, ...]
    matches: Matches
    shardings: tuple[Sharding, ...]
    output_problems: tuple[Problem, ...]

    @property
    def tie_word_embeddings(self) -> bool:
        """The value for config.json: the source's own, or, where it has none, whether lm_head had to be tied."""
        if self.model.tie_word_embeddings is not None:
            return self.model.tie_word_embeddings
        rows = self.family.sources()
        tied = {row[0] for name in self.family.ties if (row := rows.find(name))}
        return not any(name.module in tied for name in self.source.named)


def open_job(job: Job, live_model: Any = None, download: bool = False) -> OpenedSource:
    """Open what a job names. Reads headers, the configuration, and the small tensors that say how modules are packed.

    `live_model`: a Hugging Face model in memory, in the place of a checkpoint. `download`: whether missing files of a model on the
    Hub may be fetched. Raises BadInput where there is no source that headrace knows, with the problems of the output directories.
    """
    outputs = [problem for target in job.targets for problem in check_output(target.output_dir, job.overwrite)]
    try:
        source = _open_source(job, live_model, download)
        if not outputs:
            files = [file.path for file in source.files]
            outputs = [problem for target in job.targets for problem in check_source(target.output_dir, files)]
        family = _family(source)
        declared = model_config(source.config, family, source.architecture, source.config_name)
    except BadInput as error:
        raise BadInput([*error.problems, *outputs]) from None
    kept = frozenset({"mlp_bias"} if job.mlp_bias == "keep" else ())
    omitted: dict[str, Any] = {row.flag: False for row in family.omit if row.flag not in kept}
    model = replace(declared, **omitted)
    settings = clean_settings(source.config)
    formats, ordered, packing_problems = check(source.named, settings)
    packing = Packing(formats, ordered, settings)
    unknown = unread(source.config, source.config_name, settings, by_module(source.named), formats)
    unreadable = unknown or [*packing_problems, *_unknown_quantization(source, formats)]
    zeros = zero_biases(source.named, formats)
    return OpenedSource(
        job,
        source,
        family,
        model,
        packing,
        tuple(unreadable),
        match(source.named, family, layout(family.layout), declared, kept, zeros, axes(formats)),
        tuple(_sharding(options, family, model) for options in job.targets),
        tuple(outputs),
    )


def _open_source(job: Job, live_model: Any, download: bool) -> Source:
    if live_model is not None:
        return open_model(live_model)
    source = find_source(job.model_dir, job.meta_ckpt_dir, job.quant_ckpt_path, job.revision, download)
    return replace(source, tensors=arranged(source.tensors))


def _family(source: Source) -> Family:
    family = find_family(source.container, source.architecture)
    if family is None:
        known: Sequence[str] = sorted(
            name for family in families() if family.container == source.container for name in family.architectures
        )
        subject = f"{source.config_name}: architecture"
        raise BadInput([Problem(subject, source.architecture or "none", f"one of {', '.join(known)}")])
    return family


def _sharding(options: TargetOptions, family: Family, model: ModelConfig) -> Sharding:
    embedding = Embedding(options.use_parallel_embedding, options.embedding_sharding_dim)
    return Sharding(layout(family.layout), model, options.parallelism, embedding)


def _unknown_quantization(source: Source, packed: Mapping[str, str]) -> list[Problem]:
    """A checkpoint that is quantized in a way that nothing unpacks is refused by name: its codes must not pass for weights."""
    settings = source.config.get("quantization_config")
    if not settings or packed:
        return []
    method = settings.get("quant_method", "unknown") if isinstance(settings, Mapping) else settings
    subject, remedy = f"{source.config_name}: quantization_config", "Convert the model that it was quantized from"
    known = ", ".join(each.title for each in known_formats()) + ", or none"
    return [Problem(subject, f"quant_method {method}, and no module packed in a known way", known, remedy)]
