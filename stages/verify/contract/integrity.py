"""integrity: check that every tensor has the name, shape, type and bytes that config.json and headrace.json say.

Headers are compared with the contract that config.json alone gives, bytes with the checksums of the run that wrote them, 4 MiB of a
tensor at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pipeline.errors import Problem
from pipeline.model.kernels import ANY, generations
from pipeline.tensor.checkpoint import Checkpoint, FileTensor
from pipeline.tensor.tensors import tensor_bytes
from stages.verify.contract import ExpectedTensor, contract
from stages.verify.contract.part_sums import RunningSums, unreadable
from stages.verify.contract.quantized import GPTQ, WEIGHT_ONLY, read_quantization
from stages.verify.contract.reader import shown
from stages.verify.values import UINT8, read

PIECE_BYTES = 4 << 20
_DIGEST = re.compile(r"[0-9a-f]{16}")
_RANK = re.compile(r"rank\d+\.safetensors")
_UNFINISHED = re.compile(r".*\.partial|(config|headrace)\.json\.new")
_AGAIN = "Convert again"


def headers(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Check everything that can be checked without reading a tensor's bytes.

    Reports what is wrong with config.json; tensors that a rank file lacks, that the loader does not ask for, or that have another
    shape or type; checksums of no tensor, and tensors without one; files that are left over.
    """
    ranks, problems = contract(checkpoint.config)
    yield from problems
    if ranks and len(ranks) != len(checkpoint.ranks):
        found = f"{len(checkpoint.ranks)} rank files"
        yield Problem(str(checkpoint.directory), found, f"{len(ranks)}, as config.json's mapping says", _AGAIN)
    for number, (expected, stored) in enumerate(zip(ranks, checkpoint.ranks, strict=False)):
        yield from _rank(_file(number), expected, stored)
    yield from _provenance(checkpoint)
    yield from _left_over(checkpoint)


def checksums(checkpoint: Checkpoint) -> Iterator[tuple[int, str, int]]:
    """List the tensors that headrace.json has usable checksums of, as (rank, name, bytes), in the order of the files."""
    for number, stored in enumerate(checkpoint.ranks):
        for name, tensor in stored.items():
            if part_sums(checkpoint, number, name) is not None:
                yield number, name, tensor_bytes(tensor)


def check_tensor(checkpoint: Checkpoint, rank: int, name: str) -> Problem | None:
    """Compare a tensor's bytes with its checksum in headrace.json; None where they agree, and where there is no checksum.

    `checkpoint` can be pickled, so that this runs as a task on any machine that sees the directory.
    """
    parts = part_sums(checkpoint, rank, name)
    if parts is None:
        return None
    subject, tensor = f"{_file(rank)}: {name}", checkpoint.ranks[rank][name]
    total = tensor_bytes(tensor)
    stream, sums = tensor.viewed((total,), UINT8), RunningSums(subject, parts)
    try:
        for at in range(0, total, PIECE_BYTES):
            sums.update(read(stream, ((at, min(at + PIECE_BYTES, total)),)))
            if sums.problem:
                break
    except OSError as error:
        return unreadable(subject, error)
    return sums.problem


def _file(rank: int) -> str:
    return f"rank{rank}.safetensors"


def _rank(file: str, expected: Mapping[str, ExpectedTensor], stored: Mapping[str, FileTensor]) -> Iterator[Problem]:
    """Compare a rank file's header with the tensors that config.json asks for."""
    bare: set[str] = set()
    for name, each in expected.items():
        alone = each.bare and name in stored and not any(partner in stored for partner in each.partners)
        if each.bare and alone and each.bare.fits(stored[name]):
            bare |= {name, *each.partners}
    for name, each in expected.items():
        if name in bare:
            continue
        if name not in stored:
            if each.required:
                yield Problem(f"{file}: {name}", "no such tensor", str(each), _AGAIN)
        elif not each.fits(stored[name]):
            tensor = stored[name]
            yield Problem(f"{file}: {name}", f"{tensor.dtype.name} {list(tensor.shape)}", str(each), _AGAIN)
    for name in stored:
        if name not in expected:
            found = "a tensor that TensorRT-LLM's loader does not ask for"
            yield Problem(
                f"{file}: {name}", found, "none, by config.json", "One of the two is of another model or option: convert again"
            )


def _provenance(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Check that headrace.json, where there is one, has a checksum for each tensor and for no other."""
    provenance = checkpoint.provenance
    if not provenance and "headrace.json" not in checkpoint.files:
        return
    options = provenance.get("options", {})
    sm = options.get("sm", 80) if isinstance(options, Mapping) else None
    if sm != ANY and sm not in generations():
        yield Problem("headrace.json: options.sm", shown(sm), f"one of {', '.join(map(str, (*generations(), ANY)))}", _AGAIN)
    if sm == ANY:
        yield from _arranged(checkpoint)
    for key, kind, expected in (("left_out", Mapping, "reasons by tensor"), ("notes", list, "a list of texts")):
        if key in provenance and not isinstance(provenance[key], kind):
            yield Problem(f"headrace.json: {key}", shown(provenance[key]), expected, _AGAIN)
    table = provenance.get("xxh3")
    if not isinstance(table, Mapping):
        yield Problem("headrace.json: xxh3", shown(table), "checksums by file and tensor", _AGAIN)
        return
    files = {_file(number): stored for number, stored in enumerate(checkpoint.ranks)}
    for file in (file for file in table if file not in files):
        yield Problem(f"headrace.json: xxh3 of {shown(file)}", "checksums of no rank file", f"{len(files)} ranks'", _AGAIN)
    for number, (file, stored) in enumerate(files.items()):
        sums = table.get(file)
        if not isinstance(sums, Mapping):
            yield Problem(f"{file}", "no checksums in headrace.json", "those of its tensors", _AGAIN)
            continue
        for name in (name for name in sums if name not in stored):
            yield Problem(f"{file}: {name}", "no such tensor", "one, as headrace.json has its checksum", _AGAIN)
        for name, tensor in stored.items():
            if part_sums(checkpoint, number, name) is None:
                found = f"checksums {shown(sums[name])} in headrace.json" if name in sums else "no checksum in headrace.json"
                expected = f"one for each of its parts, {tensor_bytes(tensor):,} bytes in all"
                yield Problem(f"{file}: {name}", found, expected, _AGAIN)


def part_sums(checkpoint: Checkpoint, rank: int, name: str) -> list[tuple[int, str]] | None:
    """(bytes, xxh3) of each of a tensor's consecutive parts; None where headrace.json has none that fit the tensor."""
    value: Any = checkpoint.provenance.get("xxh3")
    for key in (_file(rank), name):
        value = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(value, list) or not all(isinstance(part, list) and len(part) == 2 for part in value):
        return None
    for nbytes, digest in value:
        if not isinstance(nbytes, int) or isinstance(nbytes, bool) or nbytes <= 0:
            return None
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            return None
    whole = sum(nbytes for nbytes, _ in value) == tensor_bytes(checkpoint.ranks[rank][name])
    return [(nbytes, digest) for nbytes, digest in value] if whole else None


def _arranged(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Report integer weights in a kernel's order where headrace.json says that there is none.

    Facts: docs/format/runtime-1.2.md, section d4.
    """
    algorithm = read_quantization(checkpoint.config)[0].algorithm
    for number, stored in enumerate(checkpoint.ranks):
        for name, tensor in stored.items():
            module, _, parameter = name.rpartition(".")
            codes = algorithm in GPTQ and f"{module}.weights_scaling_factor" in stored
            if parameter == "weight" and (codes or (algorithm in WEIGHT_ONLY and tensor.dtype == np.int8)):
                found = f"codes of {algorithm}, which are in the order of one generation of GPUs"
                yield Problem(f"{_file(number)}: {name}", found, f"numbers, as headrace.json says --sm {ANY}", _AGAIN)
                return


def _left_over(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Report rank files that config.json does not count, and files that an unfinished run left."""
    counted = {_file(number) for number in range(len(checkpoint.ranks))}
    for name in checkpoint.files:
        if _RANK.fullmatch(name) and name not in counted:
            found = f"a rank file beside the {len(counted)} of config.json"
            yield Problem(name, found, "none", "Remove it: it is of another conversion")
        elif _UNFINISHED.fullmatch(name):
            yield Problem(name, "a file that is not finished", "none beside config.json", "Convert again, or remove it")
