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
    inputs = {
        "checkpoint": dict(request.identity) or identity(request.checkpoint),
        "options": deciding,
        "files": _file_states(word for name, words in deciding.items() if _is_path(name) for word in words),
        "container": list(request.own.container),
        "version": probed.version,
    }
    return EngineDirectory(request.engine, request.ranks or world_size(request.checkpoint), inputs)


def _is_path(name: str) -> bool:
    return name in known_options() and known_options()[name].type == "path"


def _file_states(words: Iterable[str]) -> dict[str, list[int]]:
    """The size and time of each file that an option names, as its contents decide the engine too."""
    return {word: [Path(word).stat().st_size, Path(word).stat().st_mtime_ns] for word in words if Path(word).is_file()}
