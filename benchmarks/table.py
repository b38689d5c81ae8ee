"""Measure the README's table in one run: `make bench`, or `python -m benchmarks.table`.

Whole commands, start-up included, run in rounds with `cp -r` of the bytes that they write, and with `cat` of the source before it, in
random order, each after a sync. Also measured: planning a mixture of experts, peak memory, scheduling alone, several targets from one
read, cuts, and verifying against `cat` of the files it reads.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from benchmarks import convert, planning
from benchmarks.gguf_models import make_gguf
from benchmarks.measure import Run, machine, rounds, run
from benchmarks.models import make, make_packed, weights

CONVERT = [sys.executable, "-m", "pipeline.cli", "convert", "--quiet"]
VERIFY = [sys.executable, "-m", "pipeline.cli", "verify", "--quiet"]


def forget(directory: Path) -> None:
    """Drop a directory's files from the page cache, after writing them to disk."""
    os.sync()
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def row(name: str, against: str, ours: Iterable[Run], theirs: Iterable[Run], nbytes: int) -> None:
    """Print one row: the median ratio of pairs, their range, and the rates."""
    ours, theirs = list(ours), list(theirs)
    ratios = [a.seconds / b.seconds for a, b in zip(ours, theirs, strict=True)]
    seconds = [statistics.median(each.seconds for each in runs) for runs in (ours, theirs)]
    peak = max(each.peak_bytes for each in ours) >> 20
    print(
        f"| {name} | {against} | {statistics.median(ratios):.2f} x | {min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} rounds "
        f"| {seconds[0]:.1f} s against {seconds[1]:.1f} s, {nbytes / seconds[0] / 1e9:.2f} GB/s, {peak} MiB |",
        flush=True,
    )


def copying(source: Path, reference: Path, copy: Path) -> dict[str, tuple[list[str], Path | None]]:
    """What a conversion is held against: copying as many bytes as it writes, and reading its source besides."""
    copied = shlex.join(["cp", "-r", str(reference), str(copy)])
    return {
        "`cp -r` of the output": (["sh", "-c", copied], copy),
        "`cat` of the source and `cp -r` of the output": (["sh", "-c", f"cat {source}/* > /dev/null && {copied}"], copy),
    }


def measured(
    name: str, source: Path, work: Path, count: int, flags: list[str], schedulers: Iterable[str], cold: bool = False
) -> None:
    """Print the rows of one conversion, for each scheduler, against what `copying` has."""
    reference, output = work / "reference", work / "output"
    model = source if source.is_dir() else source.parent
    command = [*CONVERT, "--model_dir", str(source), *flags]
    run([*command, "--output_dir", str(reference), "--scheduler", "threads"], remove=reference)
    nbytes = sum(path.stat().st_size for path in reference.iterdir())
    against = copying(model, reference, work / "copy")
    for scheduler in schedulers:
        full = [*command, "--output_dir", str(output), "--scheduler", scheduler]
        places = {"ours": [model], **{other: [model, reference] for other in against}}
        before = (lambda which, places=places: [forget(place) for place in places[which]]) if cold else None  # type: ignore[misc]
        runs = rounds({"ours": (full, output), **against}, count, before)  # type: ignore[arg-type]
        label = {"local": "default scheduler", "threads": "`--scheduler threads`"}[scheduler]
        for other in against:
            row(f"{name}, {label}", other, runs["ours"], runs[other], nbytes)
    shutil.rmtree(reference)


def parallel(source: Path, work: Path, count: int) -> None:
    """Print the rows of a dense conversion against one `cp` a rank, all at once: of whole commands, and of its run without start-up."""
    reference, output, copy = work / "reference", work / "output", work / "copy"
    command = [*CONVERT, "--model_dir", str(source), "--tp_size", "2", "--scheduler", "threads", "--output_dir"]
    run([*command, str(reference)], remove=reference)
    ranks = sorted(reference.glob("rank*.safetensors"))
    nbytes = sum(path.stat().st_size for path in ranks)
    each = " & ".join(shlex.join(["cp", str(rank), str(copy)]) for rank in ranks)
    whole, alone, theirs = [], [], []
    for number in range(count):
        for which in ("ours", "theirs")[:: 1 if number % 2 else -1]:
            if which == "theirs":
                theirs.append(run(["sh", "-c", f"mkdir {copy} && {{ {each} & wait; }}"], remove=copy))
                shutil.rmtree(copy)
                continue
            whole.append(run([*command, str(output)], remove=output))
            seconds = json.loads((output / "headrace.json").read_text())["timings"]["seconds"]
            alone.append(replace(whole[-1], seconds=seconds))
            shutil.rmtree(output)
    against = f"{len(ranks)} `cp` at once, one a rank file"
    row("dense, TP 2, `--scheduler threads`", against, whole, theirs, nbytes)
    row("the same, its run alone, without start-up and planning", against, alone, theirs, nbytes)
    shutil.rmtree(reference)


def large(work: Path, count: int) -> None:
    """Print the rows of 10 GB, where start-up is less of the whole."""
    source = work / "10GB"
    print(f"\n{make(source, '8B', layers=18, noise=weights()) / 1e9:.1f} GB of 8B-shaped bf16", flush=True)
    parallel(source, work, max(count // 2, 1))
    shutil.rmtree(source)


def dense(source: Path, work: Path, count: int) -> None:
    both = ("threads", "local")
    measured("dense, TP 2", source, work, count, ["--tp_size", "2"], both)
    parallel(source, work, count)
    measured("dense, TP 2, cold cache", source, work, max(count // 3, 1), ["--tp_size", "2"], both, cold=True)
    measured("dense, TP 8", source, work, max(count // 3, 1), ["--tp_size", "8", "--use_parallel_embedding"], both)


def quantized(source: Path, work: Path, count: int) -> None:
    few = max(count // 3, 1)
    for name, flags in (
        ("cast to float16", ["--dtype", "float16"]),
        ("int8 from bf16", ["--use_weight_only"]),
        ("int4 from bf16", ["--use_weight_only", "--weight_only_precision", "int4"]),
        ("FP8 by row from bf16", ["--use_fp8_rowwise"]),
    ):
        measured(f"{name}, TP 2", source, work, few, ["--tp_size", "2", *flags], ("threads",))


def packed(work: Path, count: int, layers: int) -> None:
    """Print the rows of sources that are packed already; their models have more layers, so that they are about as large."""
    few = max(count // 3, 1)
    for method in ("gptq", "awq"):
        source = work / method
        make_packed(source, "8B", 4 * layers, method)
        measured(f"{method.upper()} repacked, TP 2", source, work, few, ["--tp_size", "2"], ("threads",))
        shutil.rmtree(source)
    for kind, more in (("Q4_K", 4), ("Q8_0", 2)):
        path = work / kind / "model.gguf"
        make_gguf(path, "8B", more * layers, kind)
        measured(f"GGUF {kind} to bf16, TP 2", path, work, few, ["--tp_size", "2", "--dtype", "bfloat16"], ("threads",))
        shutil.rmtree(path.parent)


def targets(work: Path, count: int) -> None:
    """Print the rows of TP 1, 2, 4 and 8 from one read, against one after another and against copying the outputs."""
    source, sizes = work / "small", (1, 2, 4, 8)
    make(source, "8B", layers=2, noise=weights())
    tables = "".join(f'[[target]]\noutput_dir = "all/tp{n}"\ntp_size = {n}\nuse_parallel_embedding = true\n' for n in sizes)
    (work / "job.toml").write_text(f'model_dir = "{source}"\n{tables}')
    flags = [*CONVERT, "--model_dir", str(source), "--use_parallel_embedding", "--scheduler", "threads"]
    one_by_one = " && ".join(shlex.join([*flags, "--tp_size", str(n), "--output_dir", str(work / f"apart/tp{n}")]) for n in sizes)
    commands = {
        "all": [*CONVERT, str(work / "job.toml"), "--scheduler", "threads"],
        "apart": ["sh", "-c", one_by_one],
        "copy": ["cp", "-r", str(work / "reference"), str(work / "copy")],
    }
    run(commands["all"])
    (work / "all").replace(work / "reference")
    total = sum(path.stat().st_size for path in (work / "reference").rglob("*"))
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for number in range(max(count // 3, 1)):
        for name in list(commands)[:: 1 if number % 2 else -1]:
            runs[name].append(run(commands[name], remove=work / name))
            shutil.rmtree(work / name)
    row("TP 1, 2, 4 and 8 from one read", "one after another", runs["all"], runs["apart"], total)
    row("TP 1, 2, 4 and 8 from one read", "`cp -r` of the outputs", runs["all"], runs["copy"], total)
    shutil.rmtree(work / "reference")
    shutil.rmtree(source)


def scratch(source: Path, work: Path, count: int) -> None:
    for stage in ("unpack", "shard"):
        cut, without = [], []
        for _ in range(max(count // 3, 1)):
            flags = ["--model_dir", str(source), "--output_dir", str(work / "one"), "--tp_size", "2", "--scheduler", "threads"]
            without.append(run([*CONVERT, *flags], remove=work / "one"))
            nbytes = sum(path.stat().st_size for path in (work / "one").iterdir())
            shutil.rmtree(work / "one")
            cut.append(run([*CONVERT, *flags, "--scratch", str(work / "scratch"), "--scratch_after", stage], remove=work / "one"))
            shutil.rmtree(work / "one")
        row(f"dense, TP 2, a cut after `{stage}`", "the same without", cut, without, nbytes)


def proved(source: Path, work: Path, count: int, layers: int) -> None:
    """Print the rows of verifying, which hashes every byte and compares every value, against reading source and output."""
    for name, flags in (
        ("dense", []),
        ("int8", ["--use_weight_only"]),
        ("int4", ["--use_weight_only", "--weight_only_precision", "int4"]),
        ("FP8 by row", ["--use_fp8_rowwise"]),
    ):
        verified(name, source, work, count, flags)
    for method in ("gptq", "awq"):
        model = work / method
        make_packed(model, "8B", 4 * layers, method)
        verified(method.upper(), model, work, count, [])
        shutil.rmtree(model)


def verified(name: str, source: Path, work: Path, count: int, flags: list[str]) -> None:
    output = work / "ranks"
    options = ["--model_dir", str(source), "--output_dir", str(output), "--tp_size", "2", "--scheduler", "threads"]
    run([*CONVERT, *options, *flags], remove=output)
    nbytes = sum(path.stat().st_size for place in (source, output) for path in place.iterdir())
    commands: dict[str, tuple[list[str], Path | None]] = {
        "ours": ([*VERIFY, str(output), "--source", str(source)], None),
        "theirs": (["sh", "-c", f"cat {source}/* {output}/* > /dev/null"], None),
    }
    runs = rounds(commands, max(count // 3, 1))
    row(f"`headrace verify --source`, {name}, TP 2", "`cat` of source and output", runs["ours"], runs["theirs"], nbytes)
    shutil.rmtree(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9, help="of the dense rows; a third of it for the others")
    parser.add_argument("--layers", type=int, default=5, help="of the 8B-shaped model: 5 make 4.3 GB")
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="a directory with 35 GB free")
    parts = ("planning", "overhead", "memory", "dense", "scratch", "proved", "quantized", "packed", "targets", "large")
    parser.add_argument("--only", choices=parts, nargs="+", default=list(parts))
    arguments = parser.parse_args()
    work, count = arguments.work.absolute(), arguments.pairs
    work.mkdir(parents=True, exist_ok=True)
    print(machine())
    for name, part in (("planning", planning.planning), ("overhead", convert.overhead), ("memory", convert.memory)):
        if name in arguments.only:
            part(work)
    source = work / "8B"
    nbytes = make(source, "8B", layers=arguments.layers, noise=weights())
    print(
        f"\n{nbytes / 1e9:.1f} GB of 8B-shaped bf16\n\n| | against | median | range | |\n| --- | --- | --- | --- | --- |",
        flush=True,
    )
    for name, measure in (("dense", dense), ("scratch", scratch), ("quantized", quantized)):
        if name in arguments.only:
            measure(source, work, count)
    if "proved" in arguments.only:
        proved(source, work, count, arguments.layers)
    shutil.rmtree(source, ignore_errors=True)
    if "packed" in arguments.only:
        packed(work, count, arguments.layers)
    if "targets" in arguments.only:
        targets(work, count)
    if "large" in arguments.only:
        large(work, count)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
