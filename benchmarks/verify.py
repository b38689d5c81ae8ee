"""How long it takes to prove an output right, and in how much memory: `python -m benchmarks.verify`.

8B-shaped bf16 at TP 2, dense and as int8: `headrace verify OUT --source DIR` (every byte hashed, every value compared) against `cat`
of both trees, in alternating pairs.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from pathlib import Path

from benchmarks.measure import machine, run
from benchmarks.models import make, weights

HEADRACE = [sys.executable, "-m", "pipeline.cli"]
TARGETS = {"dense": [], "int8": ["--use_weight_only"], "int4": ["--use_weight_only", "--weight_only_precision", "int4"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--only", choices=TARGETS, nargs="+", default=["dense", "int8"])
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="a directory with 15 GB free")
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    source, output = work / "8B", work / "ranks"
    print(machine())
    nbytes = make(source, "8B", layers=arguments.layers, noise=weights())
    for name in arguments.only:
        shutil.rmtree(output, ignore_errors=True)
        given = ["--model_dir", str(source), "--output_dir", str(output), "--tp_size", "2", "--scheduler", "threads", "--quiet"]
        run([*HEADRACE, "convert", *given, *TARGETS[name]])
        written = sum(path.stat().st_size for path in output.iterdir())
        verify = [*HEADRACE, "verify", str(output), "--source", str(source), "--quiet"]
        cat = ["sh", "-c", f"cat {source}/* {output}/* > /dev/null"]
        ours, theirs = [], []
        for number in range(arguments.pairs):
            for command, runs in ((verify, ours), (cat, theirs))[:: -1 if number % 2 else 1]:
                runs.append(run(command))
        ratios = [a.seconds / b.seconds for a, b in zip(ours, theirs, strict=True)]
        seconds, reading = ([each.seconds for each in runs] for runs in (ours, theirs))
        print(
            f"{name}, {nbytes / 1e9:.1f} GB against {written / 1e9:.1f} GB: median {statistics.median(ratios):.2f} x cat of both "
            f"(pairs {min(ratios):.2f} to {max(ratios):.2f}); {statistics.median(seconds):.1f} s against "
            f"{statistics.median(reading):.1f} s; VmHWM {max(each.peak_bytes for each in ours) >> 20} MiB, "
            f"anonymous {max(each.anonymous_bytes for each in ours) >> 20} MiB",
            flush=True,
        )
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
