"""The commands `headrace verify` and `headrace generate`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.help import HelpCommand
from pipeline.cli.levels import Lines, levels
from pipeline.cli.shared import Json, Quiet
from pipeline.errors import BadInput, Problem
from pipeline.printed import escaped
from pipeline.tensor.bucket import output_at

app = typer.Typer()

FEW_TOKENS = 256  # or characters of a prompt

Output = Annotated[
    Path, typer.Argument(parser=output_at, metavar="OUTPUT", help="A finished output: a directory or a URL.", show_default=False)
]


@app.command("verify", cls=HelpCommand, no_args_is_help=True, epilog="headrace verify ranks --source Llama-3.1-8B")
def verify_command(
    output: Output,
    source: Annotated[str | None, typer.Option(help="What it was made of: compare every value with it.")] = None,
    quant_ckpt_path: Annotated[Path | None, typer.Option("--quant_ckpt_path", help="As given to convert.")] = None,
    logits: Annotated[
        bool, typer.Option("--logits", help="Compute logits from the ranks, and with transformers from the source.")
    ] = False,
    prompt: Annotated[str | None, typer.Option(help="What to compute logits for; needs the source's tokenizer.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="How many random tokens, where there is no prompt.")] = 32,
    sm: Annotated[
        int | None,
        typer.Option("--sm", help="The GPUs that integer weights of an output without headrace.json are for; default 80."),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Threads that work at once; 0: one a core, at most 8.")] = 0,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write all of it as a page named *.html, too: see headrace report.")
    ] = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Prove an output right without a GPU: headers and checksums, every value against the source, logits.

    Exit codes: 0 nothing wrong, 2 nothing to look at, 5 something is wrong.
    """
    from pipeline.reporting.verification import TOKENS, verify

    if tokens != TOKENS and (prompt is not None or not logits):
        found = "no --logits beside it" if prompt is None else "--prompt beside it"
        raise BadInput([Problem(f"--tokens {tokens}", found, "--logits without a prompt", "Leave it out")])
    if report:
        from pipeline.reporting.html import check_report_path

        check_report_path(report, output, "--report")
    one_thread(len(prompt) if prompt is not None else tokens)
    with levels(quiet or json_) as advance:
        result = verify(
            output,
            source,
            quant_ckpt_path=quant_ckpt_path,
            logits=logits or prompt is not None,
            prompt=prompt,
            tokens=tokens,
            sm=sm,
            workers=workers,
            advance=advance,
        )
    if json_:
        print(json.dumps(result.summary(), indent=2))
    elif not quiet:
        from pipeline.reporting.terminal import console, verification_table

        console().print(verification_table(result.summary()))
    if report:
        from pipeline.reporting.report import make_report

        page = make_report(output, output=report, verification=result.summary()).page
        if not (quiet or json_):
            print(escaped(f"wrote {page}"))
    result.check()


@app.command(
    "generate", cls=HelpCommand, no_args_is_help=True, epilog="headrace generate ranks --prompt 'The capital of France is'"
)
def generate_command(
    output: Output,
    prompt: Annotated[str, typer.Option(help="The text to go on from.", show_default=False)],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Where the tokenizer is: a directory or a GGUF file. Default: the output, then its source.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens at most.")] = 24,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn where the temperature is not 0.")] = 0,
) -> None:
    """Continue a text with the converted ranks, on the CPU."""
    one_thread(len(prompt))
    from pipeline.reporting.generation import generate_text

    lines = None if sys.stderr.isatty() or _one_place() else Lines()  # where the text itself is seen to grow, no lines are
    for text in generate_text(output, prompt, tokenizer, tokens, temperature, seed, lines):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _one_place() -> bool:
    """Whether standard output and error go to one file or pipe, in which lines would stand amid the text."""
    try:
        out, err = os.fstat(sys.stdout.fileno()), os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):  # closed, or no files
        return False
    return (out.st_dev, out.st_ino) == (err.st_dev, err.st_ino)


def one_thread(tokens: int) -> None:
    """Have PyTorch compute few tokens with one thread, where its user has not said with how many.

    For these its threads mostly wait for one another, in loops: two to three times the processor time, and on a busy machine, where
    one of them has no core, as many times the seconds.
    """
    if tokens <= FEW_TOKENS:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
