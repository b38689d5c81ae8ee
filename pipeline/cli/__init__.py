"""The command line, a module a group of commands.

The flags of a conversion are the fields of Job, by NVIDIA's names; `-` and `_` are alike.
"""

from __future__ import annotations

import atexit
import gc
import io
import sys
import warnings
from typing import Annotated

import typer

from pipeline.cli.commands import LateGroup
from pipeline.cli.limits import raise_open_files
from pipeline.cli.streams import keep_streams
from pipeline.cli.usage import INTERRUPTED, USAGE_ERROR, refuse, say
from pipeline.errors import HeadraceError, WriteFailed
from pipeline.tensor.system_errors import sentence
from stages.quantization.kernels.chosen import kernels_in_use

app = typer.Typer(
    cls=LateGroup,
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Stream LLaMA-family checkpoints into TensorRT-LLM ranks, out of core.",
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": lambda name: name.replace("-", "_")},
)


def _version(asked: bool) -> None:
    if asked:
        from pipeline import __version__

        print(f"headrace {__version__}\nkernels: {kernels_in_use()}")
        raise typer.Exit


FIRST_STEPS = """headrace {version}: LLaMA-family checkpoints into TensorRT-LLM ranks, on a machine far smaller than the checkpoint.

First steps, with a model's directory, a GGUF file or a name on the Hub in the place of MODEL:
  headrace inspect MODEL                                    say what it is, and what it can become
  headrace plan --model_dir MODEL --output_dir ranks        say what convert would do; writes nothing
  headrace convert --model_dir MODEL --output_dir ranks     do it
  headrace verify ranks --source MODEL                      prove it right

headrace --help lists all commands, headrace COMMAND --help the options of one."""


@app.callback()
def _flags(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001 (its callback has it)
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version, and the kernels in use.")
    ] = False,
) -> None:
    """Take the flags that stand before a command; without one, say what to do first."""
    if context.invoked_subcommand is None:
        from pipeline import __version__

        print(FIRST_STEPS.format(version=__version__))


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
        code = app(prog_name="headrace", standalone_mode=False)
    except HeadraceError as error:
        sys.exit(say(error))
    except USAGE_ERROR as error:
        sys.exit(refuse(error))
    except OSError as error:  # of a command that has no words of its own for it
        sys.exit(say(WriteFailed(sentence(error))))
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        print("headrace: interrupted before anything was written", file=sys.stderr)
        sys.exit(3)
    sys.exit(code if isinstance(code, int) else 0)
