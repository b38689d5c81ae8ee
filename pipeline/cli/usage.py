"""Errors as the command line says them: those of ours, and mistakes that no command of ours gets to see, in our own words."""

from __future__ import annotations

import itertools
import json
import re
import sys
from dataclasses import asdict
from difflib import get_close_matches
from typing import Any

import typer

from pipeline.cli.typed import as_typed
from pipeline.errors import BadInput, HeadraceError
from pipeline.printed import escaped

# Click's error of a command line, which some versions of Typer have in themselves; and the code that Typer makes of Ctrl-C.
USAGE_ERROR: Any = next(each for each in typer.BadParameter.__mro__ if each.__name__ == "ClickException")
INTERRUPTED = 130
NOTHING, NEW_LINE = ", nothing was written", "\n"

# Click's sentences, and ours.
SENTENCES = (
    (r"No such command '(.+?)'\.(?: Did you mean (.+)\?)?", "no command {0}{1}"),
    (r"Option '(.+?)' requires an argument\.?", "{0}: found nothing after it; expected a value"),
    (r"Option '(.+?)' does not take a value\.?", "{0}: found a value; expected the flag alone"),
    (r"Missing option '(.+?)'(?: .*)?\.?", "{0}: found nothing; expected a value"),
    (r"Missing argument '(.+?)'\.?(?: .*)?", "{0}: found nothing; expected a value"),
    (r"Got unexpected extra argument(?:s|\(s\))? \((.+)\)", "{0}: found an argument too many; expected options by their names"),
    (r"Invalid value for '(.+?)': (.+?)\.?", "{0}: {1}"),
)


# The words after the number of problems; a command that is not here writes, and nothing was written.
READERS = ("plan", "inspect", "families", "formats", "verify", "generate", "jobs", "ls")
OUTCOMES = {**dict.fromkeys(READERS, ""), "rm": ", nothing was removed"}


def say(error: HeadraceError) -> int:
    """Say an error on standard error, as JSON where the log is; returns the exit code."""
    words = [word.replace("-", "_") for word in sys.argv]
    command = [word for word in words[1:] if not word.startswith("_")][:2]
    if command[:1] == ["scratch"]:
        command = command[1:]
    message = error.report(OUTCOMES.get(command[0], NOTHING)) if isinstance(error, BadInput) and command else str(error)
    if "__log_format=json" not in words and ("__log_format", "json") not in itertools.pairwise(words):
        print(f"headrace: {escaped(as_typed(message), keep=NEW_LINE)}", file=sys.stderr)
        return error.exit_code
    problems = [asdict(problem) for problem in getattr(error, "problems", ())]
    event = {"event": "error", "exit_code": error.exit_code, "message": message, "problems": problems}
    print(json.dumps(event), file=sys.stderr)
    return error.exit_code


def refuse(error: Any) -> int:
    """Say what is wrong with a command line; returns the exit code."""
    context = getattr(error, "ctx", None)
    message = str(error.format_message()).strip()
    if message.startswith("Usage:"):  # a command that was called without anything: its help
        print(message)
        return int(error.exit_code)
    name = getattr(error, "option_name", None)
    said = _no_option(name, context) if hasattr(error, "possibilities") and name else sentence(message)
    print(escaped(f"headrace: {said}"), file=sys.stderr)
    print(f"headrace: see {context.command_path if context else 'headrace'} --help", file=sys.stderr)
    return int(error.exit_code)


def sentence(message: str) -> str:
    """One of Click's sentences in our words; another as it is."""
    for pattern, words in SENTENCES:
        if found := re.fullmatch(pattern, message):
            first, *more = (each or "" for each in found.groups())
            meant = ", ".join(more).replace("'", "") if more else ""
            return words.format(first, f"; did you mean {meant}?" if "no command {0}" in words and meant else meant)
    return message


def _no_option(name: str, context: Any) -> str:
    """An option that there is not: another program's, or the nearest that there is."""
    from pipeline.planning.builder_options import known_options

    bare = name.lstrip("-").replace("-", "_")
    own = {flag.lstrip("-") for each in context.command.params if not getattr(each, "hidden", False) for flag in each.opts}
    if near := get_close_matches(bare, sorted(own), 1, 0.7):
        return f"no option {name}; did you mean --{near[0]}?"
    if bare in known_options():
        return f"no option {name}: it is one of trtllm-build's; give it to headrace build, or to a job file's [engine] table"
    return f"no option {name}"
