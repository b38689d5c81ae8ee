"""One rank's tensors for Python scripts that feed a TensorRT-LLM model without going through files.

    from headrace import load_from_hf_checkpoint

    weights = load_from_hf_checkpoint("Llama-3.1-70B", tp_size=8, tp_rank=3, dtype="bfloat16")
    weights["transformer.layers.0.attention.qkv.weight"]  # a torch.Tensor, read and made when it is asked for

The tensors are those that `convert` writes to `rank{N}.safetensors`, by the same plan.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from pipeline.errors import BadInput, Problem, SourceChanged
from pipeline.model.dtypes import BY_TARGET
from pipeline.planning.job import make_job
from pipeline.planning.keywords import Dtype, LoadOptions, naming_keywords
from pipeline.planning.target_options import Shape
from pipeline.tensor.placement import Placement, Region, extent, intersect, pieces, shift, slices
from pipeline.tensor.system_errors import refusing
from stages.read.changing import moved

if TYPE_CHECKING:
    import torch

    from pipeline.planning.phases import Store
    from pipeline.planning.plans import Plan

PIECE_BYTES = 4 << 20
# Options about it.
OF_A_SOURCE = (
    "act_range",
    "revision",
    "max_position_embeddings",
    "rope_scaling_factor",
    "query_pre_attn_scalar",
    "rope_scaling",
    "mlp_bias",
)


class RankWeights(Mapping[str, "torch.Tensor"]):
    """One rank's tensors by TensorRT-LLM's names, each made anew whenever it is asked for; `config` is config.json."""

    def __init__(self, plan: Plan, rank: int) -> None:
        output = plan.targets[0].output
        self.config: Mapping[str, Any] = json.loads(output.config)
        self._tensors = output.files[rank].tensors
        self._files = plan.source.files
        self._parts: dict[str, list[_Part]] = {name: [] for name in self._tensors}
        for store in plan.phases[-1].stores:
            for placement in store.placed(0):
                if placement.rank == rank and placement.source is not None:
                    self._parts[placement.tensor].append(_Part(store, placement))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor, in host memory.

        Raises KeyError for a name that the rank does not have, BadInput where reading fails, and SourceChanged where the source is
        not as it was when it was loaded: tensors of before and after would be of two models.
        """
        tensor = self._tensors[name]
        # Padding is zeros.
        shape, dtype = tensor.stored
        result = np.zeros(shape, dtype=BY_TARGET[dtype].numpy)
        with refusing(name, "a source that can be read"):
            for part in self._parts[name]:
                part.copy_to(result)
        if changed := moved(self._files):
            raise SourceChanged(changed, "load it anew")
        values = result.reshape(-1).view(BY_TARGET[tensor.dtype].numpy).reshape(tensor.shape)
        return as_torch(values, tensor.dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not made for it."""
        return self._tensors[name].shape


@dataclass(frozen=True)
class _Part:
    """One source's share of a rank's tensor."""

    store: Store
    placement: Placement

    def copy_to(self, result: np.ndarray) -> None:
        from pipeline.tensor.blocks import read_block

        array, wanted = self.store.arrays[0], self.placement.source
        assert wanted is not None, "padding has no source"
        lead = len(self.placement.target) - len(wanted)
        move = [t[0] - s[0] for t, s in zip(self.placement.target[lead:], wanted, strict=True)]
        for index in array.grid.regions:
            region = self.store.region(index)
            common = intersect(wanted, region)
            if common is None:
                continue
            block, corner = read_block(array, index), [start for start, _ in region]
            for piece in pieces(common, self.store.itemsize, PIECE_BYTES, self.store.row_multiple):
                target: Region = (*self.placement.target[:lead], *shift(piece, move))
                values = np.asarray(block[slices(shift(piece, corner, -1))])
                result[slices(target)] = values.reshape(extent(target))


def as_torch(values: np.ndarray, dtype: str) -> torch.Tensor:
    """A NumPy array as a torch tensor of the same bits; `dtype` by TensorRT-LLM's name."""
    import torch

    if dtype == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    if dtype == "fp8":
        return torch.from_numpy(values.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(values)


@naming_keywords(LoadOptions)
def load_from_hf_checkpoint(
    model_dir: str | Path,
    *,
    quant_ckpt_path: str | Path | None = None,
    tp_size: int = 1,
    tp_rank: int = 0,
    pp_size: int = 1,
    pp_rank: int = 0,
    dtype: Dtype = "auto",
    **options: Unpack[LoadOptions],
) -> RankWeights:
    """Give one rank of a Hugging Face checkpoint, without files.

    Parameters
    ----------
    model_dir
        A directory, a GGUF file, or org/name on the Hugging Face Hub.
    quant_ckpt_path
        A quantized checkpoint whose tensors stand in for those of `model_dir`.
    tp_size, pp_size
        The number of tensor-parallel ranks and of pipeline stages.
    tp_rank, pp_rank
        Which of them, from 0.
    dtype
        The type of the weights; "auto" is the source's.
    **options
        Other fields of a Job that say what a target looks like, and those of LoadOptions that are about the source.

    Returns
    -------
    RankWeights
        TensorRT-LLM's names to tensors, each read and made when it is asked for.

    Raises
    ------
    BadInput
        As `convert` does, and where the rank is none of the target's.
    """
    source = {"model_dir": model_dir, "quant_ckpt_path": quant_ckpt_path}
    return _load({**source, **options}, None, (tp_size, tp_rank), (pp_size, pp_rank), dtype)


@naming_keywords(LoadOptions)
def load_from_hf_llama(
    model: Any,
    *,
    tp_size: int = 1,
    tp_rank: int = 0,
    pp_size: int = 1,
    pp_rank: int = 0,
    dtype: Dtype = "auto",
    **options: Unpack[LoadOptions],
) -> RankWeights:
    """Give one rank of a Hugging Face model in memory, of LLaMA or any other family that headrace knows.

    Parameters
    ----------
    model
        A PreTrainedModel of transformers.
    tp_size, tp_rank, pp_size, pp_rank, dtype, **options
        As for `load_from_hf_checkpoint`.

    Returns
    -------
    RankWeights
        TensorRT-LLM's names to tensors, each made when it is asked for.

    Raises
    ------
    BadInput
        As `convert` does, and where the rank is none of the target's.
    """
    return _load(options, model, (tp_size, tp_rank), (pp_size, pp_rank), dtype)


@naming_keywords(LoadOptions)
def load_from_meta_llama(
    meta_ckpt_dir: str | Path,
    *,
    tp_size: int = 1,
    tp_rank: int = 0,
    pp_size: int = 1,
    pp_rank: int = 0,
    dtype: Dtype = "auto",
    **options: Unpack[LoadOptions],
) -> RankWeights:
    """Give one rank of one of Meta's own checkpoints, without files.

    Parameters
    ----------
    meta_ckpt_dir
        The directory of params.json and consolidated.*.pth.
    tp_size, tp_rank, pp_size, pp_rank, dtype, **options
        As for `load_from_hf_checkpoint`.

    Returns
    -------
    RankWeights
        TensorRT-LLM's names to tensors, each read and made when it is asked for.

    Raises
    ------
    BadInput
        As `convert` does, and where the rank is none of the target's.
    """
    return _load({"meta_ckpt_dir": meta_ckpt_dir, **options}, None, (tp_size, tp_rank), (pp_size, pp_rank), dtype)


@naming_keywords(LoadOptions)
def load_from_gptq_llama(
    quant_ckpt_path: str | Path,
    *,
    model_dir: str | Path | None = None,
    tp_size: int = 1,
    tp_rank: int = 0,
    pp_size: int = 1,
    pp_rank: int = 0,
    dtype: Dtype = "auto",
    **options: Unpack[LoadOptions],
) -> RankWeights:
    """Give one rank of a GPTQ checkpoint, without files.

    Parameters
    ----------
    quant_ckpt_path
        The checkpoint: a directory of its own, or with `model_dir` a file or directory of quantized tensors.
    model_dir
        The model that it was quantized from, where the checkpoint holds its quantized tensors alone.
    tp_size, tp_rank, pp_size, pp_rank, dtype, **options
        As for `load_from_hf_checkpoint`; `sm` is the GPU generation that the weights are arranged for.

    Returns
    -------
    RankWeights
        TensorRT-LLM's names to tensors, each read and made when it is asked for.

    Raises
    ------
    BadInput
        As `convert` does, and where the rank is none of the target's.
    """
    sources = {"model_dir": quant_ckpt_path} if model_dir is None else {"model_dir": model_dir, "quant_ckpt_path": quant_ckpt_path}
    return _load({**sources, **options}, None, (tp_size, tp_rank), (pp_size, pp_rank), dtype)


def _load(source: Mapping[str, Any], model: Any, tp: tuple[int, int], pp: tuple[int, int], dtype: str) -> RankWeights:
    from pipeline.planning.make_plan import make_plan

    unknown = set(source) - set(Shape.model_fields) - {"model_dir", "meta_ckpt_dir", "quant_ckpt_path"} - set(OF_A_SOURCE)
    if unknown:
        raise BadInput(
            [Problem(name, "an option that loading has no use for", "the source's and the target's") for name in sorted(unknown)]
        )
    # Planning writes nothing: the directory is a name that the plan needs, and is never made.
    with tempfile.TemporaryDirectory() as place:
        target = {"output_dir": Path(place) / "never", "tp_size": tp[0], "pp_size": pp[0], "dtype": dtype, "scratch_after": "none"}
        job = make_job({**source, **target}, live=model is not None)
        sizes = (("tp", job.tp_size, tp[1]), ("pp", job.pp_size, pp[1]))
        wrong = [
            Problem(f"{name}_rank", repr(rank), f"a whole number from 0 to {size - 1}")
            for name, size, rank in sizes
            if not isinstance(rank, int) or not 0 <= rank < size
        ]
        if wrong:
            raise BadInput(wrong)
        plan = make_plan(job, model, download=True)
    return RankWeights(plan, pp[1] * job.tp_size + tp[1])
