"""make_plan: the list of stages. Opens headers only, writes nothing, and refuses what cannot be converted with one report."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import BadInput, Problem
from pipeline.model.dtypes import BY_TARGET, auto_dtype, of_numpy
from pipeline.model.model_config import ModelConfig, model_config
from pipeline.model.quantization import Quantization
from pipeline.model.tables import Family, families, find_family, layout
from pipeline.model.target_config import target_config
from pipeline.planning.checks import check_fused, check_quantization, check_tensors, check_ties
from pipeline.planning.choose_algorithm import Packing, choose, clean_settings, unused
from pipeline.planning.cuts import Cuts
from pipeline.planning.job import Job, TargetOptions
from pipeline.planning.memory import MAX_PIECE_BYTES, block_bytes, budget
from pipeline.planning.plans import VERSION, Phase, Plan, Target, group_blocks
from pipeline.planning.stores import make_stores, need
from pipeline.sinks.output import Output, check_output, check_source
from pipeline.sinks.rank_file import rank_file
from pipeline.tensor.blocks import read_block
from pipeline.tensor.placement import Placement, RankTensor
from pipeline.tensor.tensors import Source, TensorMap
from stages import rope
from stages.cast import cast
from stages.quantization import numbers
from stages.quantize import CODES, Entry, alignment, quantize, signal_to_noise, sizes_agree, unfit, without_kernel
from stages.read import find_source, open_model, read, read_scratch
from stages.rename import Matches, match, rename
from stages.shard import Embedding, Sharding, divisibility, embedding_options, rank_tensors, shard, tp_sizes
from stages.unpack import axes, check, unpack, zero_biases

ROW_MULTIPLE = 64


def make_plan(job: Job, model: Any = None, download: bool = False) -> Plan:
    """Plan a job. Raises BadInput with everything that is wrong with the request, the source or the output directories.

    `model`: a Hugging Face model in memory, in the place of a checkpoint. `download`: whether missing files of a model on the Hub
    may be fetched.
    """
    problems = [problem for target in job.targets for problem in check_output(target.output_dir, job.overwrite)]
    source = _open(job, model, download, problems)
    if not problems:
        problems += [p for target in job.targets for p in check_source(target.output_dir, [file.path for file in source.files])]
    family = _family(source, problems)
    declared = _model(source, family, problems)
    kept = frozenset({"mlp_bias"} if job.mlp_bias == "keep" else ())
    dropped: dict[str, Any] = {row.flag: False for row in family.omit if row.flag not in kept}
    model = replace(declared, **dropped)
    packing, quantized = _packing(source)
    zeros = zero_biases(source.tensors, packing.formats)
    matches = match(source.tensors, family, layout(family.layout), declared, kept, zeros, axes(packing.formats))
    shardings = [_sharding(options, family, model) for options in job.targets]
    problems += _refused(matches, job) + _refused_options(job, source)
    problems += dict.fromkeys(p for sharding in shardings for p in (*divisibility(sharding), *embedding_options(sharding)))
    if quantized:  # of what cannot be unpacked nothing more can be asked
        raise BadInput([*problems, *quantized])
    chosen = [choose(options, packing, source.tensors) for options in job.targets]
    quantized += dict.fromkeys(problem for _, found in chosen for problem in found)
    problems += quantized or matches.problems

    size = block_bytes(source.nbytes)
    carried = source.in_memory and job.elsewhere
    chunk = min(size, MAX_PIECE_BYTES) if "://" in (job.scratch or "") and (job.cuts or carried) else size
    identity = [VERSION, family.name, job.source_identity(), [file.fingerprint() for file in source.files]]
    cuts = Cuts(job, source, identity, size, read_scratch, matches)
    tensors = cuts.cut("read", read(source.tensors, chunk, math.lcm(ROW_MULTIPLE, model.head_size)))
    tensors = cuts.cut("rename", rename(tensors, matches, model))
    if quantized:
        raise BadInput(problems)
    tensors = cuts.cut("unpack", unpack(tensors, packing.settings))
    problems += check_fused(source, matches, packing.formats) or check_tensors(tensors, matches, shardings[0], family)
    problems += check_ties(source, matches.copies)
    for (quantization, _), sharding in zip(chosen, shardings, strict=True):
        problems += without_kernel(sharding, quantization)
        problems += [] if problems else unfit(tensors, sharding, quantization, matches.origin)
        problems += [] if problems else alignment(sharding, quantization, tp_sizes(sharding.model, sharding))
    if problems:
        raise BadInput(problems)

    asked = zip(job.targets, shardings, (quantization for quantization, _ in chosen), strict=True)
    pieces = [_compose(*each, tensors, source, matches, size) for each in asked]
    uneven = [problem for piece in pieces for problem in sizes_agree(piece.entries, matches.origin)]
    if uneven:
        raise BadInput(uneven)
    stores = make_stores(tensors, pieces, source, matches, bool(cuts.phases))
    stores = cuts.cut_ranks(stores, [piece.ranks for piece in pieces], {name: row.numpy for name, row in BY_TARGET.items()})
    left_out = {**matches.left_out, **unused(packing, source.tensors, [quantization for quantization, _ in chosen])}
    # Scratch is still empty: what planning looks at comes from the source itself.
    straight = unpack(rename(read(source.tensors, size, 1), matches, model), packing.settings) if job.requantize else {}
    notes = _notes(straight, [quantization for quantization, _ in chosen])
    targets = tuple(_target(piece, identity, source, family, left_out, notes, job) for piece in pieces)
    write = Phase("write", stores, tuple(target.output for target in targets), group_blocks(stores, size))
    phases = (*cuts.phases, write)
    needs = [need(store, chunk < size) for phase in phases for store in phase.stores]
    limits = budget(job.memory_limit, job.threads, needs, max(len(phase.groups) for phase in phases))
    reasons = cuts.reasons()
    cut = tuple(cuts.groups)
    return Plan(job, source, family, model, targets, phases, cut, reasons, size, limits, left_out, notes, bool(packing.formats))


def _open(job: Job, model: Any, download: bool, problems: list[Problem]) -> Source:
    try:
        if model is not None:
            return open_model(model)
        return find_source(job.model_dir, job.meta_ckpt_dir, job.quant_ckpt_path, job.revision, download)
    except BadInput as error:
        raise BadInput([*error.problems, *problems]) from None


def _family(source: Source, problems: list[Problem]) -> Family:
    family = find_family(source.container, source.architecture)
    if family is None:
        known = sorted(name for family in families() if family.container == source.container for name in family.architectures)
        subject = f"{source.config_name}: architecture"
        raise BadInput([Problem(subject, source.architecture or "none", f"one of {', '.join(known)}"), *problems])
    return family


def _model(source: Source, family: Family, problems: list[Problem]) -> ModelConfig:
    try:
        return model_config(source.config, family, source.architecture, source.config_name)
    except BadInput as error:
        raise BadInput([*error.problems, *problems]) from None


def _sharding(options: TargetOptions, family: Family, model: ModelConfig) -> Sharding:
    embedding = Embedding(options.use_parallel_embedding, options.embedding_sharding_dim)
    return Sharding(layout(family.layout), model, options.parallelism, embedding)


def _refused(matches: Matches, job: Job) -> list[Problem]:
    if job.mlp_bias != "refuse":
        return []
    omitted = set(matches.left_out) - set(matches.copies)
    return [Problem(name, "a bias of the MLP", "none, as --mlp_bias is refuse") for name in sorted(omitted)]


def _refused_options(job: Job, source: Source) -> list[Problem]:
    problems = []
    if job.copy_tokenizer and not source.companions:
        expected = "a Hugging Face directory with its tokenizer"
        problems.append(Problem("--copy_tokenizer", f"no tokenizer's files in {source.location}", expected))
    if "://" in (job.scratch or "") and "shard" in job.cuts:
        remedy = "Cut after another stage, or give --scratch a directory"
        problems.append(Problem("--scratch_after shard", f"scratch at {job.scratch}", "a local directory", remedy))
    return problems


def _packing(source: Source) -> tuple[Packing, list[Problem]]:
    """What the packed modules of a source are, and which cannot be unpacked."""
    settings = clean_settings(source.config)
    formats, ordered, problems = check(source.tensors, settings)
    return Packing(formats, ordered, settings), problems + check_quantization(source, formats)


@dataclass(frozen=True)
class Piece:
    """What the stages after the reading make of a source for one target."""

    options: TargetOptions
    sharding: Sharding
    quantization: Quantization
    dtype: str
    entries: Mapping[str, Entry]
    arrays: TensorMap
    placements: Mapping[str, tuple[Placement, ...]]
    ranks: tuple[RankTensor, ...]


def _compose(
    options: TargetOptions,
    sharding: Sharding,
    quantization: Quantization,
    tensors: TensorMap,
    source: Source,
    matches: Matches,
    size: int,
) -> Piece:
    dtype = auto_dtype(source.dtype) if options.dtype == "auto" else options.dtype
    entries = quantize(cast(tensors, sharding.layout, dtype), sharding, quantization, dtype, matches.origin)
    arrays = {name: entry.array for name, entry in entries.items()}
    placements = {name: shard(name, entry.slot, entry.parameter, sharding) for name, entry in entries.items()}
    # One of a fused module's parts, or of a stack's experts, stands for the tensor that they share.
    shared = {(entry.slot.module.name, entry.slot.layer, name.rpartition(".")[2]): name for name, entry in entries.items()}
    ranks: tuple[RankTensor, ...] = tuple(
        tensor
        for name in shared.values()
        for tensor in rank_tensors(name, entries[name].slot, entries[name].parameter, sharding, of_numpy(arrays[name].dtype).target)
    )
    if options.write_rope_buffers:
        buffers = rope.rope_buffers(sharding.model)
        arrays |= read(buffers, size, 1)
        placements |= {name: rope.placements(name, tensor, sharding.parallelism) for name, tensor in buffers.items()}
        ranks += rope.rank_tensors(buffers, sharding.parallelism)
    return Piece(options, sharding, quantization, dtype, entries, arrays, placements, ranks)


def _notes(tensors: TensorMap, chosen: Sequence[Quantization]) -> tuple[str, ...]:
    """What to know of the numbers before they are written: the error that quantizing again adds, by one tensor's first rows."""
    sizes = {each.group_size for each in chosen if each.algorithm == "W4A16_GPTQ" and each.from_numbers}
    module = next((name.rpartition(".")[0] for name in tensors if name.rpartition(".")[2] in CODES), None)
    if not sizes or module is None:
        return ()
    parameters = {name.rpartition(".")[2]: array for name, array in tensors.items() if name.rpartition(".")[0] == module}
    weight = numbers.dequantize(parameters)
    again = numbers.dequantize(numbers.requantize(weight, min(sizes)))
    rows = ((0, min(64, weight.shape[0])), (0, weight.shape[1]))
    before, after = (read_block(array, (0, 0)).read(rows) for array in (weight, again))
    error = signal_to_noise(after, before)
    return (f"quantized again: {error:.1f} dB of signal to noise against the source's own weights, in the first rows of {module}",)


def _target(
    piece: Piece,
    identity: Sequence[Any],
    source: Source,
    family: Family,
    left_out: Mapping[str, str],
    notes: Sequence[str],
    job: Job,
) -> Target:
    options, sharding = piece.options, piece.sharding
    by_rank: dict[int, list[RankTensor]] = {rank.index: [] for rank in sharding.parallelism.ranks()}
    for tensor in piece.ranks:
        by_rank[tensor.rank].append(tensor)
    directory = options.output_dir
    files = tuple(rank_file(directory / f"rank{index}.safetensors", held) for index, held in sorted(by_rank.items()))
    values = {
        "dtype": piece.dtype,
        "mapping": sharding.parallelism.mapping(),
        "quantization": piece.quantization.config(),
        "quantization_set": piece.quantization.config_set(),
        "tensor_parallel": options.tp_size > 1,
        "use_parallel_embedding": options.use_parallel_embedding,
        "embedding_sharding_dim": options.embedding_sharding_dim,
        "disable_weight_only_quant_plugin": options.disable_weight_only_quant_plugin,
        "remove_duplicated_kv_heads": options.remove_duplicated_kv_heads,
        "logits_dtype": "float32",
        "tie_word_embeddings": _tied(sharding.model, source, family),
    }
    config = json.dumps(target_config(sharding.layout.config, family.config, sharding.model, values), indent=4)
    copies = source.companions if job.copy_tokenizer else ()
    provenance = {
        "headrace": VERSION,
        "source": {
            "path": str(source.location),
            "kind": source.kind,
            "files": [file.fingerprint() for file in source.files],
        },
        "options": {**job.source_identity(), **options.identity()},
        "left_out": dict(left_out),
        "notes": list(notes),
    }
    decides = [identity, options.identity(), [path.name for path in copies]]
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return Target(options, piece.dtype, Output(directory, files, config, digest, copies, job.sync, provenance))


def _tied(model: ModelConfig, source: Source, family: Family) -> bool:
    """What config.json says of ties: the source's word, or, where it has none, whether lm_head had to be tied."""
    if model.tie_word_embeddings is not None:
        return model.tie_word_embeddings
    rows = family.sources()
    patterns = [found[0] for tied in family.ties if (found := rows.find(tied))]
    return not any(name.startswith(f"{pattern}.") for pattern in patterns for name in source.tensors)
