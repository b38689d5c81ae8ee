"""The first stage of planning: the source opened, its family, its model and its packed modules known, every tensor's row found."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import BadInput, Problem
from pipeline.model.causal import check_causal
from pipeline.model.config_values import assumed_notes, refusals, remark_notes
from pipeline.model.dtypes import NUMBERS, auto_dtype, of_numpy
from pipeline.model.long_attention import long_attention_notes
from pipeline.model.long_rope import check_long_rope
from pipeline.model.model_config import ModelConfig, model_config
from pipeline.model.tables import Family, Layout, Slot, find_family, layout
from pipeline.model.unsaid import fill_in
from pipeline.model.windows import check_windows, window_notes, with_pattern
from pipeline.model.written_rope import undeclared, written_scaling
from pipeline.planning.choose_algorithm import Packing, clean_settings, own_dtype
from pipeline.planning.job import Job
from pipeline.planning.nearest import unknown_architecture
from pipeline.planning.target_options import TargetOptions
from pipeline.printed import printed
from pipeline.sinks.bucket_checks import check_apart_there, check_bucket
from pipeline.sinks.output_checks import check_apart, check_output, check_source
from pipeline.tensor.names import by_module, split_names
from pipeline.tensor.remote_path import is_remote
from pipeline.tensor.tensors import Source
from stages.quantization.modules import linear
from stages.quantization.sources import formats as known_formats
from stages.quantization.unread import decided, unread
from stages.read import find_source, open_model
from stages.read.crc import check_crcs
from stages.read.huggingface import TOKENIZER
from stages.read.wrapped_names import no_name_fits
from stages.rename import Matches, match
from stages.shard import Embedding, Sharding
from stages.unpack import arranged, axes, check, zero_biases


@dataclass(frozen=True)
class OnCluster:
    """The workers of a cluster, as they were found when they were asked.

    `threads`: of all of them together. `apart`: some of them do not see the directories of the outputs.
    """

    threads: int = 0
    apart: bool = False


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
        What is wrong with the output directories, and with options about the source.
    notes
        What was taken for values that the source does not say, and what is written otherwise than it or NVIDIA has it.
    workers
        Those of a cluster elsewhere; of others nothing is asked.
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
    notes: tuple[str, ...] = ()
    workers: OnCluster = OnCluster()

    @property
    def auto_dtype(self) -> str:
        """The type that `--dtype auto` means."""
        return auto_dtype(self.source.dtype or own_dtype(self.source.named, self.packing))

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
    copied = TOKENIZER if job.copy_tokenizer else ()
    places = [target.output_dir for target in job.targets]
    local, there = [each for each in places if not is_remote(each)], [each for each in places if is_remote(each)]
    outputs = [problem for each in local for problem in check_output(each, job.overwrite, copied)]
    outputs += [problem for each in there for problem in check_bucket(each, job.overwrite, copied)]
    outputs = outputs or [*check_apart(local), *check_apart_there(there)]
    try:
        source = _open_source(job, live_model, download)
        if not outputs:
            files = [file.path for file in source.files]
            outputs = [problem for each in local for problem in check_source(each, files)]
        family = _family(source)
        if problems := [*refusals(source.config, family, source.config_name), *check_causal(source.config, source.config_name)]:
            raise BadInput(problems)
        filled = fill_in(source.config, family, source.config_name, job.unsaid())
        declared = model_config(filled.config, family, source.architecture, source.config_name)
        declared = with_pattern(declared, filled.config, family)
        problems = [*check_windows(declared, source.config_name), *undeclared(declared, family, source.config_name)]
        if problems := [*problems, *(check_long_rope(declared, source.config_name) if job.rope_scaling != "none" else ())]:
            raise BadInput(problems)
    except BadInput as error:
        raise BadInput([*error.problems, *outputs]) from None
    kept = frozenset({"mlp_bias"} if job.mlp_bias == "keep" else ())
    omitted: dict[str, Any] = {row.flag: False for row in family.omit if row.flag not in kept}
    scaling, rope_note = written_scaling(declared, family, job.rope_scaling)
    model = replace(declared, rotary_scaling=scaling, **omitted)
    dense = [] if job.quant_ckpt_path else _left_behind(source, family)  # whoever names a quantized checkpoint means one
    settings = {} if dense else clean_settings(source.config)
    examined = check(source.named, settings, source.names_of)
    formats = examined.formats
    unknown = [] if dense else unread(source.config, source.config_name, settings, by_module(source.named), formats)
    unreadable = [] if dense else unknown or [*examined.problems, *_unknown_quantization(source, formats)]
    zeros = zero_biases(source.named, formats)
    target = layout(family.layout)
    matches = match(source.named, family, target, declared, kept, zeros, axes(formats, source.named))
    if source.tensors and not matches.names and not unreadable:
        raise BadInput([no_name_fits(source, family), *outputs])
    outside = _outside(formats, matches, target)
    damaged, crc_notes = _crcs(job, source)
    packing = Packing(formats, examined.ordered, settings, examined.own, outside, examined.cache)
    return OpenedSource(
        job,
        source,
        family,
        model,
        packing,
        tuple(unreadable),
        matches,
        tuple(_sharding(options, family, model) for options in job.targets),
        (*filled.problems, *outputs, *damaged),
        (
            *crc_notes,
            *source.notes,
            *dense,
            *assumed_notes(filled.config, family, source.config_name),
            *remark_notes(filled.config, family),
            *filled.notes,
            *_dtype_notes(job, source, packing),
            *filter(None, (rope_note,)),
            *window_notes(model),
            *long_attention_notes(filled.config, model.max_position_embeddings),
        ),
    )


def type_of(source: Source) -> str:
    """The type that "auto" means for a source that no job names: its own, or that of its tensors where it says none."""
    if source.dtype:
        return auto_dtype(source.dtype)
    named = split_names(arranged(source.tensors))
    settings = clean_settings(source.config)
    examined = check(named, settings)
    return auto_dtype(own_dtype(named, Packing(examined.formats, examined.ordered, settings, examined.own)))


def _open_source(job: Job, live_model: Any, download: bool) -> Source:
    if live_model is not None:
        return open_model(live_model)
    source = find_source(job.model_dir, job.meta_ckpt_dir, job.quant_ckpt_path, job.revision, download)
    return replace(source, tensors=arranged(source.tensors))


def _crcs(job: Job, source: Source) -> tuple[list[Problem], list[str]]:
    """Check the checksums that a source's files have themselves, where the job asks for it, or note that there are none."""
    if not job.check_crc:
        return [], []
    problems, archives = check_crcs(file.path for file in source.files if file.seen)
    return problems, [] if archives else ["check_crc: no file of this source has checksums (zip archives of torch.save have)"]


def _family(source: Source) -> Family:
    family = find_family(source.container, source.architecture)
    if family is None:
        raise BadInput([unknown_architecture(source)])
    return family


def _dtype_notes(job: Job, source: Source, packing: Packing) -> list[str]:
    """Say which type was taken where the configuration names none, and some target has that of the source."""
    found = own_dtype(source.named, packing)
    if source.dtype or not found or all(target.dtype != "auto" for target in job.targets):
        return []
    name, came = source.config_name.rpartition("/")[2], auto_dtype(found)
    told = f"its {'16-bit tensors' if packing.formats and came == found else 'weights'} are {found}"
    return [f"dtype {came}: {name} names none, and {told}; --dtype says another"]


def _sharding(options: TargetOptions, family: Family, model: ModelConfig) -> Sharding:
    embedding = Embedding(options.use_parallel_embedding, options.embedding_sharding_dim)
    return Sharding(layout(family.layout), model, options.parallelism, embedding)


def _outside(packed: Collection[str], matches: Matches, target: Layout) -> frozenset[str]:
    """Those of some packed modules that no target quantizes: a head, and what no target has."""
    slots: dict[str, Slot | None] = {}
    for name, renamed in matches.names.items():
        module = renamed.source.module
        if module in packed and module not in slots:
            slots[module] = target.find(name.module)
    return frozenset(module for module in packed if not ((slot := slots.get(module)) and linear(slot.module)))


def _left_behind(source: Source, family: Family) -> list[str]:
    """The note on quantization settings of a source that is not quantized, as merges leave them; [] for any other source.

    Every tensor is a number and a weight or bias, and the settings name no format whose weights look so and are others.
    """
    said, settings, ignored = source.config.get("quantization_config"), clean_settings(source.config), family.ignored()
    if not said or decided(settings):
        return []
    for name, tensor in source.named.items():
        if ignored.find(name.module) or ignored.find(str(name)):
            continue
        if name.parameter not in ("weight", "bias") or of_numpy(tensor.dtype).safetensors not in NUMBERS:
            return []
    file, method = (
        source.config_name.rpartition("/")[2],
        printed(str(settings.get("quant_method", settings.get("quant_algo", "no method")) if settings else said)),
    )
    told = f"all {len(source.tensors)} tensors are plain numbers, so that it is converted as a dense model"
    return [f"quantization_config of {file} ({method}) is left aside: {told}"]


def _unknown_quantization(source: Source, packed: Mapping[str, str]) -> list[Problem]:
    """A checkpoint that is quantized in a way that nothing unpacks is refused by name: its codes must not pass for weights."""
    settings = source.config.get("quantization_config")
    if not settings or packed:
        return []
    method = settings.get("quant_method", "unknown") if isinstance(settings, Mapping) else settings
    subject, remedy = f"{source.config_name}: quantization_config", "Convert the model that it was quantized from"
    known = ", ".join(each.title for each in known_formats()) + ", or none"
    return [Problem(subject, f"quant_method {method}, and no module packed in a known way", known, remedy)]
