"""Read a Hugging Face model that is in memory: the tensors that `save_pretrained` would write, without a file in between.

Of a dense model, names, bytes and configuration are those of the saved directory. Experts that transformers 5 keeps in one stacked
tensor stay stacked, whereas `save_pretrained` writes a tensor for each expert under the names of the original checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4
from weakref import WeakValueDictionary

import numpy as np
import xxhash

from pipeline.errors import BadInput, Problem
from pipeline.model.dtypes import MODEL_DTYPES, TABLE
from pipeline.tensor.metering import meter
from pipeline.tensor.placement import Region, pieces, size, slices, whole
from pipeline.tensor.tensors import Block, Source, SourceFile, View, tensor_bytes

if TYPE_CHECKING:
    import torch

LOCATION = Path("model-in-memory")
# Stands for the model in `Source.files`. Its parent is a device, so that no output directory can be taken for the source's.
_FILE = Path("/dev/null") / LOCATION
_CONFIG_NAME = "the model's configuration"
_HASHED_BYTES = 4 << 20  # of a tensor, hashed at a time
_TYPES = {row.numpy.name: row.numpy for row in TABLE}  # torch and NumPy have the same names for these types
# The integers as which torch passes ml_dtypes' types to NumPy, that it cannot pass as they are.
_BITS = {row.numpy.name: f"int{8 * row.numpy.itemsize}" for row in TABLE if row.numpy.isbuiltin != 1}
_WRAPPERS = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}


class OpenedModel:
    """The tensors of one opened model by name, on any device. LiveTensors keep it alive; `_OPENED` does not."""

    def __init__(self, values: Mapping[str, torch.Tensor]) -> None:
        self.values, self.token = values, uuid4().hex
        _OPENED[self.token] = self


# The opened models of this process by token, through which a pickled LiveTensor finds its model again.
_OPENED: WeakValueDictionary[str, OpenedModel] = WeakValueDictionary()


class LiveTensor(Block):
    """A tensor of an opened model: `shape` elements of `dtype`, in the model's own memory.

    It is pickled as the model's token and the tensor's name, without values, because Dask pickles tasks even for workers in the
    same process. Unpickling raises RuntimeError in another process, and once the source and all its tensors are gone.
    """

    def __init__(self, opened: OpenedModel, name: str) -> None:
        self.opened, self.name = opened, name
        values = opened.values[name]
        self.shape, self.dtype = tuple(values.shape), _TYPES[_type_name(values)]

    def block(self, region: Region) -> Block:
        return View(self, region)

    def read(self, region: Region) -> np.ndarray:
        """Return the values of `region`, read-only: a view where the tensor is contiguous in main memory, else a copy."""
        import torch

        tensor, bits = self.opened.values[self.name], _BITS.get(self.dtype.name)
        with meter("read", size(region) * self.dtype.itemsize):
            part = tensor[slices(region)]
            if tensor.device.type != "cpu" or not tensor.is_contiguous():
                part = part.to("cpu").contiguous()
            values: np.ndarray = (part.view(getattr(torch, bits)) if bits else part).numpy().view(self.dtype)
        values.flags.writeable = False
        return values

    def __reduce__(self) -> tuple[Any, ...]:
        return _resolve, (os.getpid(), self.opened.token, self.name)


def open_model(model: Any) -> Source:
    """Open a transformers model that is in memory.

    All values are read once for the fingerprint, a few MiB at a time. The source shares the memory of the model's tensors and keeps
    them alive, but not the model itself. Values that are changed in place before they are converted are converted as changed.

    Parameters
    ----------
    model
        A transformers model, also inside torch.compile's or a data-parallel wrapper.

    Returns
    -------
    Source
        The model as a Hugging Face source, with `in_memory` set.

    Raises
    ------
    BadInput
        The object is no such model, or has tensors that cannot be read: on the meta device, sharded over processes, or of a type
        that no checkpoint holds.
    """
    model = _unwrapped(model)
    if not (callable(getattr(model, "state_dict", None)) and callable(getattr(getattr(model, "config", None), "to_dict", None))):
        found = f"an object of type {type(model).__module__}.{type(model).__qualname__}"
        raise BadInput([Problem("model", found, "a transformers model, with config.to_dict() and state_dict()")])
    config = _plain_config(model.config)
    # Another library's wrapper class does not name the model's architecture; then the configuration does.
    architectures = (
        [type(model).__name__.removeprefix("FSDP")] if hasattr(type(model), "config_class") else config.get("architectures")
    )
    problems: list[Problem] = []
    values = _tensors(model, problems)
    dtype = next((_type_name(value) for value in values.values() if value.is_floating_point()), None)
    if dtype and dtype not in MODEL_DTYPES:
        problems.append(Problem(f"{_CONFIG_NAME}: dtype", repr(dtype), f"one of {', '.join(MODEL_DTYPES)}"))
    if problems:
        raise BadInput(problems)
    config |= {"architectures": architectures, "torch_dtype" if "torch_dtype" in config else "dtype": dtype}
    opened = OpenedModel(values)
    tensors = {name: LiveTensor(opened, name) for name in values}
    return Source(
        kind="Hugging Face model in memory",
        location=LOCATION,
        container="huggingface",
        architecture=str(architectures[0]) if architectures else "",
        config=config,
        config_name=_CONFIG_NAME,
        tensors=tensors,
        files=(_fingerprint(config, tensors),),
        dtype=dtype,
        in_memory=True,
    )


def _unwrapped(model: Any) -> Any:
    """Return the model inside the wrappers of torch.compile and data-parallel training, which prefix the name of every tensor."""
    while type(model).__name__ in _WRAPPERS and hasattr(model, _WRAPPERS[type(model).__name__]):
        model = getattr(model, _WRAPPERS[type(model).__name__])
    return model


def _tensors(model: Any, problems: list[Problem]) -> dict[str, torch.Tensor]:
    """Return the tensors that `save_pretrained` would write, by the source's names; they share the model's memory.

    Adds the tensors that cannot be read to `problems`.
    """
    state = dict(model.state_dict(keep_vars=False))
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(name, None)
    adapted = next((name for name in state if ".base_layer." in name), None)
    if adapted:
        remedy = "Call merge_and_unload() and convert the model that it returns"
        problems.append(Problem(adapted, "a module with an adapter", "the adapter merged into the weights", remedy))
        return {}
    refused = [problem for name, value in state.items() if (problem := _refused(name, value))]
    if refused:
        problems += refused
        return {}
    # `_tied_weights_keys` is a list of patterns in transformers 4 and a dictionary by pattern in 5, which also has the full names.
    tied = {*(getattr(model, "_tied_weights_keys", None) or ()), *(getattr(model, "all_tied_weights_keys", None) or ())}
    copies = _copies(state, tied)
    return {_parameter_name(name, value): value.detach() for name, value in state.items() if name not in copies}


def _refused(name: str, value: Any) -> Problem | None:
    import torch

    remedy = "Gather or dequantize the model before it is converted"
    if not isinstance(value, torch.Tensor):
        return Problem(name, f"an object of type {type(value).__name__}", "a tensor", remedy)
    if value.device.type == "meta":
        remedy = "Load the model without offloading, or convert the directory that it comes from"
        return Problem(name, "a parameter on the meta device", "values in memory", remedy)
    # Such a tensor is made of other tensors, for example shards or quantized codes, which have another dtype.
    if hasattr(type(value), "__tensor_flatten__") or value.layout != torch.strided:
        return Problem(name, f"a tensor of type {type(value).__name__} and layout {value.layout}", "a plain tensor", remedy)
    if _type_name(value) not in _TYPES:
        return Problem(name, f"values of type {_type_name(value)}", f"one of {', '.join(sorted(_TYPES))}", remedy)
    return None


def _copies(state: Mapping[str, torch.Tensor], tied: Iterable[str]) -> set[str]:
    """Return the names that `save_pretrained` drops because another name has the same memory.

    Of names that share memory it drops those that match `tied`, as long as one remains, and then all but the first.
    """
    groups: dict[Any, list[str]] = defaultdict(list)
    for name, value in state.items():
        if value.numel():  # empty tensors may share an address
            groups[value.device, value.data_ptr(), value.dtype, value.shape, value.stride()].append(name)
    copies: set[str] = set()
    for names in groups.values():
        known = [name for name in sorted(names) if any(re.search(pattern, name) for pattern in tied)][: len(names) - 1]
        copies |= {*known, *[name for name in names if name not in known][1:]}
    return copies


def _parameter_name(name: str, value: torch.Tensor) -> str:
    """Add `.weight` to a stack of matrices that is a parameter without a module of its own, because tables map modules."""
    return f"{name}.weight" if value.ndim == 3 and name.rpartition(".")[2] not in ("weight", "bias") else name


def _type_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _plain_config(config: Any) -> dict[str, Any]:
    """Return the configuration as config.json would have it: plain values, without those that equal the library's defaults."""
    if hasattr(config, "to_json_string"):
        text = config.to_json_string()
    else:
        text = json.dumps(config.to_dict(), default=lambda value: str(value).removeprefix("torch."))
    return dict(json.loads(text))


def _fingerprint(config: Mapping[str, Any], tensors: Mapping[str, LiveTensor]) -> SourceFile:
    """Return a fingerprint of the configuration and of every tensor's name, dtype, shape and values; equal in every process."""
    digests = []
    for name, tensor in tensors.items():
        digest = xxhash.xxh3_128()
        for region in pieces(whole(tensor.shape), tensor.dtype.itemsize, _HASHED_BYTES):
            digest.update(np.ascontiguousarray(tensor.read(region)).reshape(-1).view(np.uint8).data)
        digests.append([name, tensor.dtype.name, tensor.shape, digest.hexdigest()])
    text = json.dumps([dict(config), digests], sort_keys=True)
    return SourceFile(_FILE, sum(map(tensor_bytes, tensors.values())), 0, hashlib.sha256(text.encode()).hexdigest())


def _resolve(process: int, token: str, name: str) -> LiveTensor:
    """Return a LiveTensor from its pickled form. Raises RuntimeError where this process does not have the opened model any more."""
    opened = _OPENED.get(token)
    if opened is not None:
        return LiveTensor(opened, name)
    if process != os.getpid():
        where = f"the model lives in another process ({process}, this is {os.getpid()})"
        raise RuntimeError(f"{name}: {where}; a plan that other processes run must cut to scratch")
    raise RuntimeError(f"{name}: the model in memory was let go: keep its source while the plan is in use")
