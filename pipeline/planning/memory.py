"""How much memory a run takes, projected before it runs, and the piece size that keeps it under the limit.

A worker holds a few copies of one piece at a time, whatever the size of the block, the tensor or the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.errors import BadInput, Problem

MIB = 1 << 20
# A process with Dask, its dashboard and a small plan, but no work: measured by benchmarks/convert.py.
BASE_BYTES = 160 * MIB
# The plan and the scheduler's records of one task, its placements included: measured on a 70B model.
TASK_BYTES = 64 << 10
# An array in the plan, and its blocks in the graph and in a cluster of this process: measured on a mixture of 36,945 tensors
# (benchmarks/planning.py), as it is and to int8, where planning alone takes a third of it.
ARRAY_BYTES = 2560
# Measured: pieces that stay in the processor's cache between checksum and write are twice as fast as those of 16 MiB.
MAX_PIECE_BYTES = 4 * MIB
BLOCK_BYTES = 256 * MIB
MIN_BLOCK_BYTES = 8 * MIB
MAX_BLOCK_BYTES = 1024 * MIB
# Copies of a piece that a worker holds at once: the mapped one, its cast, a strided part gathered; unpackers' temporaries.
DENSE_COPIES = 3
PACKED_COPIES = 8


@dataclass(frozen=True)
class Need:
    """The memory of one tensor's smallest piece: its bytes, and how many copies of it are held."""

    name: str
    least_piece_bytes: int
    copies: int


@dataclass(frozen=True)
class Budget:
    """The piece size chosen for a run and the peak memory of the process that it implies.

    `least_bytes`: that peak with the smallest pieces.
    """

    piece_bytes: int
    peak_bytes: int
    workers: int
    limit_bytes: int
    least_bytes: int = 0


def block_bytes(total_bytes: int) -> int:
    """The bytes of one task's work, 256 MiB for most models.

    Small ones are cut finer, so that workers end together and the progress moves; very large ones coarser, as a scheduler takes
    milliseconds a task. It depends on the source alone: a run resumes with other workers and another memory limit.
    """
    if total_bytes > 1024 * BLOCK_BYTES:
        return min(total_bytes // 1024, MAX_BLOCK_BYTES)
    return min(BLOCK_BYTES, max(MIN_BLOCK_BYTES, total_bytes // 32))


def scratch_window(workers: int) -> int:
    """How many groups of blocks a cut that is not kept may be ahead of what reads it: enough that no worker waits."""
    return 2 * workers + 2


def budget(limit_bytes: int, workers: int, needs: Iterable[Need], tasks: int, arrays: int = 0, beside: int = 0) -> Budget:
    """Choose the piece size for a limit.

    `tasks`: the groups of the plan. `arrays`: those that it is composed of. `beside`: bytes held for something else. Raises
    BadInput naming the tensor that needs most where nothing fits, and what would.
    """
    kinds: dict[tuple[int, int], Need] = {}  # of thousands of tensors most need the same
    for need in needs:
        kinds.setdefault((need.least_piece_bytes, need.copies), need)
    needs = kinds.values()
    worst = max(needs, key=lambda need: need.least_piece_bytes * need.copies)
    copies = max(need.copies for need in needs)
    fixed = BASE_BYTES + tasks * TASK_BYTES + arrays * ARRAY_BYTES + beside
    least = worst.least_piece_bytes * worst.copies
    if limit_bytes < fixed + workers * least:
        wanted = -(-(fixed + workers * least) // MIB)
        fewer = (limit_bytes - fixed) // least
        remedy = f"Give --memory_limit {wanted}MiB" + (f" or --workers {fewer}" if fewer > 0 else "")
        found = f"{limit_bytes // MIB} MiB for {workers} workers, each with a piece of {worst.name}"
        raise BadInput([Problem("--memory_limit", found, f"{wanted} MiB or more", remedy)])
    piece = min((limit_bytes - fixed) // (workers * copies), MAX_PIECE_BYTES)
    held = max(max(piece, need.least_piece_bytes) * need.copies for need in needs)
    return Budget(piece, fixed + workers * held, workers, limit_bytes, fixed + workers * least)
