"""The command line, a module a group of commands.

The flags of a conversion are the fields of Job, by NVIDIA's names; `-` and `_` are alike.
"""

from __future__ import annotations

import atexit
import gc
import io
import itertools
import json
import sys
import warnings
from dataclasses import asdict
from typing import Annotated

import typer

from pipeline.cli.commands import LateGroup
from pipeline.cli.limits import raise_open_files
from pipeline.cli.streams import keep_streams
from pipeline.errors import HeadraceError, WriteFailed
from pipeline.tensor.system_errors import sentence
from stages.quantization.kernels.chosen import kernels_in_use

app = typer.Typer(
    cls=LateGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Stream LLaMA-family checkpoints into TensorRT-LLM ranks, out of core.",
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": lambda name: name.replace("-", "_")},
)


def _version(asked: bool) -> None:
    if asked:
        from pipeline import __version__

        print(f"headrace {__version__}\nkernels: {kernels_in_use()}")
        raise typer.Exit


@app.callback()
def _flags(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Take the flags that stand before a command."""


def _say(error: HeadraceError) -> None:
    """An error on standard error, as JSON where the log is."""
    words = [word.replace("-", "_") for word in sys.argv]
    if "__log_format=json" not in words and ("__log_format", "json") not in itertools.pairwise(words):
        print(f"headrace: {error}", file=sys.stderr)
        return
    problems = [asdict(problem) for problem in getattr(error, "problems", ())]
    event = {"event": "error", "exit_code": error.exit_code, "message": str(error), "problems": problems}
    print(json.dumps(event), file=sys.stderr)


def main() -> None:
    """Run the command line; errors of ours become one report and their exit code, without a traceback."""
    keep_streams()
    raise_open_files()
    warnings.filterwarnings("ignore", module="distributed")  # of large graphs and of ports: both are as they should be
    # Modules and plans are a great many objects that stay. To go through them after every 700 new ones, and once more at the end,
    # takes more than a tenth of a second.
    gc.set_threshold(50_000)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name that the terminal's encoding lacks must not end a command whose work is done.
            stream.reconfigure(errors="backslashreplace")
    atexit.register(gc.freeze)
    try:
        app(prog_name="headrace")
    except HeadraceError as error:
        _say(error)
        sys.exit(error.exit_code)
    except OSError as error:  # of a command that has no words of its own for it
        _say(WriteFailed(sentence(error)))
        sys.exit(WriteFailed.exit_code)
    except KeyboardInterrupt:
        print("headrace: interrupted before anything was written", file=sys.stderr)
        sys.exit(3)
