"""Plan a target's directory: the layout of its rank files, the text of config.json, and what headrace.json says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.model.quantization import Quantization
from pipeline.model.target_config import target_config
from pipeline.model.windows import runtime_defaults
from pipeline.planning.compose import TargetTensors
from pipeline.planning.opening import OpenedSource
from pipeline.planning.plans import Target
from pipeline.planning.target_options import TargetOptions
from pipeline.sinks.output import Output
from pipeline.sinks.rank_file import rank_file
from pipeline.tensor.placement import RankTensor
from pipeline.version import VERSION
from stages.shard import Sharding


def plan_identity(opened: OpenedSource) -> list[Any]:
    """Everything that the bytes of a plan depend on beside a target's own options, as plain values."""
    files = [file.fingerprint() for file in opened.source.files]
    return [VERSION, opened.family.name, opened.job.source_identity(), files]


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
    tensors: TargetTensors, opened: OpenedSource, identity: Sequence[Any], left_out: Mapping[str, str], notes: Sequence[str]
) -> Target:
    """The output of one target. `identity`: `plan_identity`'s; `left_out` and `notes` are for headrace.json."""
    options, sharding, source = tensors.options, tensors.sharding, opened.source
    by_rank: dict[int, list[RankTensor]] = {rank.index: [] for rank in sharding.parallelism.ranks()}
    for tensor in tensors.ranks:
        by_rank[tensor.rank].append(tensor)
    files = tuple(rank_file(options.output_dir / f"rank{index}.safetensors", own) for index, own in sorted(by_rank.items()))
    config = json.dumps(config_values(opened, options, sharding, tensors.quantization, tensors.dtype), indent=4)
    copies = source.companions if opened.job.copy_tokenizer else ()
    provenance = {
        "headrace": VERSION,
        "source": {
            "path": source.place,
            "kind": source.kind,
            "files": [file.fingerprint() for file in source.files],
        },
        "options": {**opened.job.source_identity(), **options.identity()},
        "left_out": dict(left_out),
        "notes": list(notes),
    }
    decides = [list(identity), options.identity(), [path.name for path in copies]]
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return Target(options, tensors.dtype, Output(options.output_dir, files, config, digest, copies, opened.job.sync, provenance))
