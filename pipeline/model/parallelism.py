"""The split of a model over GPUs: tensor-, pipeline- and expert-parallel sizes, and each rank's place in them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rank:
    """The place of one output file, `rankN.safetensors` with N = `index` = tp + pp * tp_size, in each parallel dimension."""

    index: int
    tp: int
    pp: int
    moe_tp: int
    moe_ep: int


@dataclass(frozen=True)
class Parallelism:
    """The parallel sizes, as in TensorRT-LLM's `Mapping`. It requires `moe_tp_size * moe_ep_size == tp_size`.

    Context parallelism (`cp_size`) multiplies the number of GPUs but not of files: its ranks share files.
    """

    tp_size: int = 1
    pp_size: int = 1
    cp_size: int = 1
    moe_tp_size: int = 1
    moe_ep_size: int = 1

    @classmethod
    def resolve(cls, tp_size: int, pp_size: int = 1, cp_size: int = 1, moe_tp_size: int = 0, moe_ep_size: int = 0) -> Parallelism:
        """Fill in the expert sizes that were not given (0 or -1); by default all of `tp_size` is tensor-parallel."""
        if moe_ep_size <= 0:
            moe_ep_size = max(tp_size // moe_tp_size, 1) if moe_tp_size > 0 else 1
        if moe_tp_size <= 0:
            moe_tp_size = max(tp_size // moe_ep_size, 1)
        return cls(tp_size, pp_size, cp_size, moe_tp_size, moe_ep_size)

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size * self.cp_size

    def ranks(self) -> tuple[Rank, ...]:
        """Return all output ranks, in the order of their files."""
        return tuple(
            Rank(n, n % self.tp_size, n // self.tp_size, n % self.tp_size // self.moe_ep_size, n % self.tp_size % self.moe_ep_size)
            for n in range(self.tp_size * self.pp_size)
        )

    def layers(self, pp_rank: int, num_layers: int) -> range:
        """Return a pipeline stage's layers by global number; the first `num_layers % pp_size` stages have one more than the others.

        This is how `torch.tensor_split` divides.
        """
        size, extra = divmod(num_layers, self.pp_size)
        start = pp_rank * size + min(pp_rank, extra)
        return range(start, start + size + (pp_rank < extra))

    def mapping(self) -> dict[str, int]:
        """Return config.json's `mapping`: the keys that all versions from 0.13 to 1.2.1 accept.

        Facts: docs/format/checkpoint.md, section 12.
        """
        return {
            "world_size": self.world_size,
            "gpus_per_node": 8,
            "cp_size": self.cp_size,
            "tp_size": self.tp_size,
            "pp_size": self.pp_size,
            "moe_tp_size": self.moe_tp_size,
            "moe_ep_size": self.moe_ep_size,
        }
