"""The command `headrace calibrate`."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import TypeAdapter, ValidationError
from pydantic.types import ByteSize

from pipeline.calibration.words import calibration_words
from pipeline.cli.help import HelpCommand
from pipeline.cli.shared import Json, Quiet
from pipeline.errors import BadInput, Problem
from pipeline.model.awq_settings import TOKENS, AwqSettings
from pipeline.printed import many
from pipeline.watching.units import human_bytes

app = typer.Typer()

SAMPLES, LENGTH = 512, 512  # of texts, where nothing else is said


@app.command(
    "calibrate",
    cls=HelpCommand,
    no_args_is_help=True,
    epilog="headrace calibrate MODEL --output ranges.safetensors --calib_dataset texts.txt",
)
def calibrate_command(
    model_dir: Annotated[str, typer.Argument(help="A directory, a GGUF file, or org/name on the Hub.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", help="The file of ranges to make, for --act_range.", show_default=False)],
    calibration_tokens: Annotated[
        Path | None, typer.Option("--calibration_tokens", help="A safetensors file with input_ids [samples, tokens].")
    ] = None,
    calib_dataset: Annotated[
        Path | None,
        typer.Option("--calib_dataset", help="In its place texts: a file of lines, JSON lines or Parquet."),
    ] = None,
    calib_size: Annotated[int, typer.Option("--calib_size", min=1, help="Samples that are made of texts at most.")] = SAMPLES,
    calib_max_seq_length: Annotated[
        int, typer.Option("--calib_max_seq_length", min=1, help="Tokens of a sample that is made of texts.")
    ] = LENGTH,
    awq_group_size: Annotated[
        Literal["64", "128"] | None,
        typer.Option("--awq_group_size", help="Search AWQ's scales, too, for int4_awq in groups of so many in-features."),
    ] = None,
    awq_tokens: Annotated[
        int, typer.Option("--awq_tokens", min=1, help="Tokens, evenly taken from all samples, that AWQ's search tries scales on.")
    ] = TOKENS,
    dtype: Annotated[
        Literal["auto", "float16", "bfloat16", "float32"],
        typer.Option("--dtype", "--calibration_dtype", help="Type that the model is run in; auto: the source's."),
    ] = "auto",
    calibration_device: Annotated[
        str, typer.Option("--calibration_device", help="Where layers run, by torch's name: cpu, cuda, cuda:1.")
    ] = "cpu",
    memory_limit: Annotated[str, typer.Option("--memory_limit", help="Most memory that the process may use.")] = "2GiB",
    scratch: Annotated[Path | None, typer.Option(help="Directory of scratch; default: .headrace-scratch beside it.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the Hub.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the ranges of another calibration.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry_run", help="Print what would be done, and write nothing.")] = False,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Measure the largest activations of each linear, a layer at a time, for SmoothQuant, FP8 and 8-bit caches.

    Exit codes: 0 done, 2 a bad request, 3 stopped or the disk failed: the same command goes on.
    """
    from pipeline.calibration.plan import Calibration
    from pipeline.calibration.tokens import Texts
    from pipeline.planning.job_file import model_name, revision_problems
    from pipeline.run.calibrations import calibrate, plan_ranges

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        name, limit, output = model_name(model_dir), _size(memory_limit), output.absolute()
    except ValueError as error:
        raise BadInput([Problem("MODEL_DIR", repr(model_dir), str(error))]) from None
    about = (
        ("awq_tokens", awq_tokens, TOKENS, "awq_group_size", awq_group_size),
        ("calib_size", calib_size, SAMPLES, "calib_dataset", calib_dataset),
        ("calib_max_seq_length", calib_max_seq_length, LENGTH, "calib_dataset", calib_dataset),
    )
    problems = [
        Problem(f"--{option} {value}", "nothing that it is about", f"--{other} beside it", "Leave it out")
        for option, value, default, other, given in about
        if value != default and not given
    ]
    if problems := problems + revision_problems(name, revision):
        raise BadInput(problems)
    texts = Texts(calib_dataset, calib_size, calib_max_seq_length) if calib_dataset else None
    place = (scratch or output.parent / ".headrace-scratch").absolute()
    awq = AwqSettings(int(awq_group_size), awq_tokens) if awq_group_size else None
    asked = Calibration(calibration_tokens, texts, place, output.name, dtype, calibration_device, awq)
    file = plan_ranges(name, output, asked, limit, revision, overwrite)
    facts = {"output": str(output), **(file.plan.summary(file.one_by_one) if json_ or not quiet else {})}
    if not (quiet or json_):
        print(calibration_words(facts))
    if not dry_run:
        result = calibrate(file, None if quiet else _Lines())
        facts |= {
            "modules": result.modules,
            "seconds": round(result.seconds, 3),
            "peak_memory_bytes": result.peak_memory_bytes,
            "resumed_layers": result.resumed_layers,
            "up_to_date": result.up_to_date,
        }
        if not (quiet or json_):
            took = f"done in {result.seconds:.1f} s, peak memory {human_bytes(result.peak_memory_bytes)}"
            done = "up to date" if result.up_to_date else took
            print(f"{result.output}: ranges of {many(result.modules, 'module')}, {done}")
    if json_:
        print(json.dumps(facts, indent=2))


class _Lines:
    """Says on standard error that a layer is done, and how long the rest may take."""

    def __init__(self) -> None:
        self.started, self.first = time.perf_counter(), 0

    def __call__(self, _: str, done: int, total: int) -> None:
        self.first = self.first or done
        each = (time.perf_counter() - self.started) / (done - self.first + 1)
        print(f"layer {done} of {total}, {each:.1f} s each, {each * (total - done):.0f} s left", file=sys.stderr)


def _size(text: str) -> int:
    """Bytes of a text such as 2GiB. Raises BadInput where it is none."""
    try:
        size: Any = TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        raise BadInput([Problem("--memory_limit", repr(text), "a size such as 2GiB")]) from None
    return int(size)
