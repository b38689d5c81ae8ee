"""The parameters beside a source's weights, of activations and of the cache, under the names of the weights' modules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from pipeline.tensor.names import TensorName
from pipeline.tensor.tensors import LazyTensor
from stages.verify.roundtrip.original.packed import BESIDE


def named_beside(named: Mapping[TensorName, LazyTensor], origins: Mapping[str, str]) -> dict[str, tuple[str, LazyTensor]]:
    """Each parameter by Hugging Face's name for its module, with its own name; of what becomes several weights, under all of these.

    `named`: the source's tensors. `origins`: the source's name of each weight, by Hugging Face's. A module that has no weight, as
    attention itself, is called as what is around the weights in it.
    """
    own: dict[str, dict[str, None]] = defaultdict(dict)
    around: dict[str, dict[str, None]] = defaultdict(dict)
    for name, origin in origins.items():
        ours, theirs = name.rpartition(".")[0], origin.rpartition(".")[0]
        own[theirs][ours] = None
        around[theirs.rpartition(".")[0]][ours.rpartition(".")[0]] = None
    result = {}
    for (module, parameter), tensor in named.items():
        if parameter in BESIDE:
            for place in own.get(module) or around.get(module) or [module]:
                result[f"{place}.{parameter}"] = (f"{module}.{parameter}", tensor)
    return result
