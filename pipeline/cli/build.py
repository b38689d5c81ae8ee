"""The command `headrace build`."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.cli.help import HelpCommand
from pipeline.cli.shared import LogFormat, Quiet
from pipeline.engine.log import BuildLog
from pipeline.errors import BadInput, Problem
from pipeline.planning.builder_options import OptionTable, known_options
from pipeline.planning.engine_options import EngineOptions, EngineRequest, make_request
from pipeline.printed import escaped
from pipeline.watching.units import human_bytes

if TYPE_CHECKING:
    from pipeline.run.results import Built

app = typer.Typer()

_FIELDS = {name: field.description or "" for name, field in EngineOptions.model_fields.items()}


@app.command(
    "build",
    cls=HelpCommand,
    epilog="headrace build ranks --output_dir engine --max_batch_size 8",
    no_args_is_help=True,
    context_settings={"ignore_unknown_options": True},
    options_metavar="[OPTIONS] [TRTLLM-BUILD OPTIONS]",
)
def build_command(
    words: Annotated[list[str], typer.Argument(metavar="CHECKPOINT", help="A TensorRT-LLM checkpoint, as convert writes it.")],
    output_dir: Annotated[str | None, typer.Option("--output_dir", help=_FIELDS["output_dir"])] = None,
    builder: Annotated[Literal["auto", "command", "python"] | None, typer.Option(help=_FIELDS["builder"])] = None,
    trtllm_build: Annotated[str | None, typer.Option("--trtllm_build", help=_FIELDS["trtllm_build"])] = None,
    container: Annotated[str | None, typer.Option(help=_FIELDS["container"])] = None,
    retries: Annotated[int | None, typer.Option(help=_FIELDS["retries"])] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=_FIELDS["overwrite"])] = False,
    scheduler: Annotated[str, typer.Option(help="local (with dashboard), threads, synchronous, or tcp://host:port.")] = "local",
    print_command: Annotated[
        bool, typer.Option("--print_command", help="Print trtllm-build's command line, to run elsewhere, and do nothing.")
    ] = False,
    quiet: Quiet = False,
    log_format: LogFormat = "text",
) -> None:
    """Build the engines of a checkpoint with TensorRT-LLM's trtllm-build, whose own options go beside these.

    Exit codes: 0 done or already up to date, 2 bad request or bad checkpoint (nothing written), 3 interrupted,
    4 the builder failed or is not here, 1 a bug.
    """
    positional, builder_options = split_words(words, known_options())
    own = {
        "output_dir": output_dir,
        "builder": builder,
        "trtllm_build": trtllm_build,
        "container": container,
        "retries": retries,
        "overwrite": overwrite,
    }
    request = _request(positional, {**builder_options, **{name: value for name, value in own.items() if value is not None}})
    if print_command:
        if problems := request.problems(known_options()):
            raise BadInput(problems)
        print(shlex.join(request.command()))
        return
    from pipeline.engine.run import build_engine

    if "://" not in scheduler and scheduler not in ("local", "threads", "synchronous"):
        raise BadInput([Problem("--scheduler", scheduler, "local, threads, synchronous or tcp://host:port")])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    log = BuildLog(quiet, log_format)
    built = build_engine(request, log, scheduler)
    if log_format == "json":
        log.say("finished", "", engines=[facts(built)])
    elif not quiet:
        print(escaped(sentence(built)))


def split_words(words: list[str], table: OptionTable) -> tuple[list[str], dict[str, Any]]:
    """Split a command line's words into positional arguments and the builder's options with their values.

    An option of several values takes all words up to the next option; a flag takes none, and an option of one value one word.
    `table` says which is which; an option that it does not know takes one. The options are returned as a job file would have them:
    true for a flag, otherwise a list of words.
    """
    positional: list[str] = []
    options: dict[str, Any] = {}
    values_of_last: list[str] = positional
    room = 0  # how many more words the last option takes
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            values = table[name].values if name in table else "one"
            values_of_last = options[name] = [value] if equals else []
            room = 0 if equals or values == "none" else 1 if values == "one" else len(words)
        elif room:
            values_of_last.append(word)
            room -= 1
        else:
            positional.append(word)
    flags = {name for name in options if not options[name] and (name not in table or table[name].values == "none")}
    return positional, {name: True if name in flags else value for name, value in options.items()}


def facts(built: Built) -> dict[str, Any]:
    """Return what the JSON log says of an engine."""
    return {
        "path": str(built.directory),
        "seconds": round(built.seconds, 3),
        "bytes": built.nbytes,
        "attempts": built.attempts,
        "up_to_date": built.up_to_date,
    }


def sentence(built: Built) -> str:
    """Return the line that standard output has for an engine."""
    if built.up_to_date:
        return f"{built.directory} is up to date: nothing to do"
    return f"{built.directory}: {human_bytes(built.nbytes)} of engines, built in {built.seconds:.1f} s"


def _request(positional: list[str], options: dict[str, Any]) -> EngineRequest:
    if len(positional) == 1:
        return make_request(Path(positional[0]), options)
    # An unknown option takes a word, so report what is wrong with the options too: it may be the cause.
    problems = [Problem("headrace build", f"{len(positional)} arguments ({', '.join(positional)})", "one checkpoint")]
    try:
        problems += make_request(Path("checkpoint"), options).problems(known_options())
    except BadInput as error:
        problems += error.problems
    raise BadInput(problems)
