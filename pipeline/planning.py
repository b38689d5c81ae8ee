"""make_plan: the list of stages. Opens headers only, writes nothing, and refuses what cannot be converted with one report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline.checks import check_quantization, check_tensors, check_ties, origin, parameters
from pipeline.dtypes import auto_dtype
from pipeline.errors import BadInput, Problem
from pipeline.job import Job
from pipeline.memory import DENSE_COPIES, PACKED_COPIES, Need, block_bytes, budget
from pipeline.model_config import ModelConfig, model_config
from pipeline.output import Output, check_output
from pipeline.parallelism import Parallelism
from pipeline.placement import RankTensor
from pipeline.plans import Phase, Plan, Store, Target
from pipeline.tables import Family, families, find_family, layout
from pipeline.target_config import QUANTIZATION, target_config
from pipeline.tensors import LazyTensor, Source, TensorMap, tensor_bytes
from stages import rope
from stages.cast import cast
from stages.read import open_source, read
from stages.rename import Matches, match, rename
from stages.shard import Embedding, Sharding, divisibility, rank_tensors, shard
from stages.unpack import unpack
from stages.write import rank_file

ROW_MULTIPLE = 64


def make_plan(job: Job) -> Plan:
    """Plan a job. Raises BadInput with everything that is wrong with the request, the source or the output directory."""
    problems = check_output(job.output_dir, job.overwrite)
    source = _open(job, problems)
    family = _family(source, problems)
    declared = model_config(source.config, family, source.architecture, source.config_name)
    kept = frozenset({"mlp_bias"} if job.mlp_bias == "keep" else ())
    dropped: dict[str, Any] = {row.flag: False for row in family.omit if row.flag not in kept}
    model = replace(declared, **dropped)
    sharding = _sharding(job, family, model)
    matches = match(source.tensors, family, sharding.layout, declared, kept)
    problems += check_quantization(source) or matches.problems
    problems += _refused(matches, job)
    problems += divisibility(sharding)
    if problems:
        raise BadInput(problems)

    size = block_bytes(source.nbytes, job.threads)
    tensors = read(source.tensors, size, math.lcm(ROW_MULTIPLE, model.head_size))
    tensors = rename(tensors, matches, model)
    tensors = unpack(tensors)
    problems = check_tensors(tensors, matches.origins, sharding, family) + check_ties(source, matches.copies)
    if problems:
        raise BadInput(problems)

    dtype = auto_dtype(source.dtype) if job.dtype == "auto" else job.dtype
    whole = cast(tensors, sharding.layout, dtype)
    stores = _stores(tensors, whole, source, matches, sharding)
    buffers = rope.rope_buffers(model) if job.write_rope_buffers else {}
    stores += _computed(buffers, read(buffers, size, 1), sharding.parallelism)
    target = _target(job, source, family, sharding, dtype, buffers)
    phase = Phase("write", stores)
    groups = phase.groups(size)
    limits = budget(job.memory_limit, job.threads, map(_need, stores), len(groups))
    return Plan(job, source, family, model, (target,), (phase,), groups, size, limits, matches.left_out)


def _open(job: Job, problems: list[Problem]) -> Source:
    try:
        return open_source(job.model_dir)
    except BadInput as error:
        raise BadInput([*error.problems, *problems]) from None
    except PermissionError as error:
        raise BadInput([Problem(str(error.filename), "no permission to read it", "a readable checkpoint"), *problems]) from None


def _family(source: Source, problems: list[Problem]) -> Family:
    family = find_family(source.container, source.architecture)
    if family is None:
        known = sorted(name for family in families() if family.container == source.container for name in family.architectures)
        subject = f"{source.config_name}: architecture"
        raise BadInput([Problem(subject, source.architecture or "none", f"one of {', '.join(known)}"), *problems])
    return family


def _sharding(job: Job, family: Family, model: ModelConfig) -> Sharding:
    parallelism = Parallelism.resolve(job.tp_size, job.pp_size, job.cp_size, job.moe_tp_size, job.moe_ep_size)
    return Sharding(layout(family.layout), model, parallelism, Embedding(job.use_parallel_embedding, job.embedding_sharding_dim))


def _refused(matches: Matches, job: Job) -> list[Problem]:
    if job.mlp_bias != "refuse":
        return []
    omitted = set(matches.left_out) - set(matches.copies)
    return [Problem(name, "a bias of the MLP", "none, as --mlp_bias is refuse") for name in sorted(omitted)]


def _stores(tensors: TensorMap, whole: TensorMap, source: Source, matches: Matches, sharding: Sharding) -> tuple[Store, ...]:
    """One store for each array, in the order of the source's bytes; names that share an array (ties) share the store."""
    names: dict[str, list[str]] = {}
    for name, array in whole.items():
        names.setdefault(array.name, []).append(name)
    stores = []
    for shared in names.values():
        name = shared[0]
        tensor = source.tensors[origin(name, matches.origins)]
        store = Store(
            name=name,
            arrays=(whole[name],),
            placements=(tuple(placement for each in shared for placement in shard(each, sharding)),),
            itemsize=max(tensors[name].dtype.itemsize, whole[name].dtype.itemsize),
            row_multiple=_row_multiple(origin(name, matches.origins), matches, sharding.model),
            source_bytes=tensor_bytes(tensor),
        )
        stores.append(((str(getattr(tensor, "path", "")), getattr(tensor, "offset", 0)), store))
    return tuple(store for _, store in sorted(stores, key=lambda item: item[0]))


def _computed(buffers: Mapping[str, LazyTensor], arrays: TensorMap, parallelism: Parallelism) -> tuple[Store, ...]:
    """Stores of tensors that no source holds: each whole on every rank."""
    return tuple(
        Store(name, (arrays[name],), (rope.placements(name, tensor, parallelism),), tensor.dtype.itemsize, 1, 0)
        for name, tensor in buffers.items()
    )


def _row_multiple(source_name: str, matches: Matches, model: ModelConfig) -> int:
    row = matches.names[source_name][1]
    return model.dimension(row.period) if row.period else 1


def _need(store: Store) -> Need:
    array = store.arrays[0]
    packed = store.itemsize * array.size > 2 * store.source_bytes
    row = int(array.shape[-1]) if math.prod(array.shape[:-1]) > 1 else 1
    return Need(store.name, row * store.itemsize * store.row_multiple, PACKED_COPIES if packed else DENSE_COPIES)


def _target(job: Job, source: Source, family: Family, sharding: Sharding, dtype: str, buffers: Mapping[str, LazyTensor]) -> Target:
    model, target_layout = sharding.model, sharding.layout
    wanted: Mapping[str, set[str]] = {name: set(parameters(row, model)) for name, row in target_layout.modules.items()}
    ranks = rank_tensors(wanted, sharding, dtype) + rope.rank_tensors(buffers, sharding.parallelism)
    by_rank: dict[int, list[RankTensor]] = {rank.index: [] for rank in sharding.parallelism.ranks()}
    for tensor in ranks:
        by_rank[tensor.rank].append(tensor)
    files = tuple(rank_file(job.output_dir / f"rank{index}.safetensors", held) for index, held in sorted(by_rank.items()))
    values = {
        "dtype": dtype,
        "mapping": sharding.parallelism.mapping(),
        "quantization": dict(QUANTIZATION),
        "use_parallel_embedding": job.use_parallel_embedding,
        "embedding_sharding_dim": job.embedding_sharding_dim,
        "disable_weight_only_quant_plugin": job.disable_weight_only_quant_plugin,
        "remove_duplicated_kv_heads": job.remove_duplicated_kv_heads,
        "logits_dtype": "float32",
        "tie_word_embeddings": _tied(sharding, source, family),
    }
    config = target_config(target_layout.config, family.config, model, values)
    return Target(sharding.parallelism, dtype, Output(job.output_dir, files, json.dumps(config, indent=4)))


def _tied(sharding: Sharding, source: Source, family: Family) -> bool:
    """What config.json says of ties: the source's word, or, where it has none, whether lm_head had to be tied."""
    declared = sharding.model.tie_word_embeddings
    if declared is not None:
        return declared
    rows = {row.to: pattern for pattern, row in family.rename.items()}
    return not any(name.startswith(f"{rows[tied]}.") for tied in family.ties for name in source.tensors)
