"""The inputs that decide an engine: its checkpoint, the builder's options, the files that they name, and the builder's version."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pipeline.engine.check import identity, world_size
from pipeline.engine.output import EngineDirectory
from pipeline.planning.builder_options import known_options
from pipeline.planning.engine_options import EngineRequest
from stages.build.builders import BuilderProbe


def engine_directory(request: EngineRequest, probed: BuilderProbe) -> EngineDirectory:
    """The directory of a request's engine, with the inputs that decide what is built there by the builder that was `probed`."""
    table = known_options()
    arguments = request.arguments(table)
    # An option that this version does not know may change the engine.
    deciding = {name: list(words) for name, words in sorted(arguments.items()) if name not in table or not table[name].inert}
    # The cache of timings that a build leaves for the next is another one after each.
    written = arguments.get("output_timing_cache", ())
    named = [word for name, words in deciding.items() if _is_path(name) for word in words if word not in written]
    inputs = {
        "checkpoint": dict(request.identity) or identity(request.checkpoint),
        "options": deciding,
        "files": _file_states(path for word in named if not Path(word).is_relative_to(request.engine) for path in _files(word)),
        "container": list(request.own.container),
        "version": probed.version,
    }
    return EngineDirectory(request.engine, request.ranks or world_size(request.checkpoint), inputs)


def _is_path(name: str) -> bool:
    return name in known_options() and known_options()[name].type == "path"


def _files(word: str) -> list[Path]:
    """The files that an option names: one, or those in a directory, as an adapter's are."""
    path = Path(word)
    return [each for each in sorted(path.iterdir() if path.is_dir() else [path]) if each.is_file()]


def _file_states(paths: Iterable[Path]) -> dict[str, list[int]]:
    """The size and time of each file, as its contents decide the engine too."""
    states = {str(path): path.stat() for path in paths}
    return {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}
