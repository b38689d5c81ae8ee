"""Requests for engines: from an `[engine]` table for all targets, a `[target.engine]` table for one, or `headrace build`."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pipeline.errors import BadInput, Problem
from pipeline.planning.builder_options import Arguments, OptionTable, arguments, check_options, command_words, known_options
from pipeline.planning.home import at_home
from pipeline.planning.wrong_values import place, unlike, wrong_value
from pipeline.tensor.remote_path import is_remote

if TYPE_CHECKING:
    from pipeline.model.parallelism import Parallelism
    from stages.build.arranged_weights import ArrangedWeights

SUFFIX = "-engine"  # added to a target's directory for its engine's, where none is named
PREFIX = "engine."  # before an option's name in messages about a job file


def _words(value: Any) -> Any:
    return tuple(shlex.split(value)) if isinstance(value, str) else value


def _at_home(value: str) -> str:
    at_home(value)
    return value


Home = Annotated[str, AfterValidator(_at_home)]  # a path that `anchored` has been at


class EngineOptions(BaseModel):
    """The options of an engine that are headrace's own; every other key is an option of trtllm-build."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=(), defer_build=True)

    output_dir: Home | None = Field(None, description="Directory for rank{N}.engine and config.json.", min_length=1)
    builder: Literal["auto", "command", "python"] = Field(
        "auto", description="trtllm-build, tensorrt_llm's Python API (a task for each rank), or the first of the two that is there."
    )
    trtllm_build: Home = Field("trtllm-build", description="The builder: a name on PATH or a path.", min_length=1)
    container: Annotated[tuple[str, ...], BeforeValidator(_words)] = Field(
        (),
        description="Command to run trtllm-build behind, such as docker run; {checkpoint}, {engine}, {uid}, {gid} are filled in.",
    )
    retries: int = Field(0, description="How often a build that failed is tried again.", ge=0)
    overwrite: bool = Field(False, description="Replace an engine of another checkpoint or with other options.")

    @property
    def passed(self) -> Mapping[str, Any]:
        """The options that go to the builder."""
        return self.model_extra or {}


@dataclass(frozen=True)
class EngineRequest:
    """A request to build one engine.

    Parameters
    ----------
    checkpoint
        The directory of the TensorRT-LLM checkpoint.
    engine
        The directory of the engine.
    own
        headrace's own options, and the builder's in `own.passed`.
    prefix
        The text before an option's name in messages.
    ranks, identity, arranged
        The number of ranks, the identity and the order of integer weights of a checkpoint that is still to be written (see
        `pipeline.engine.requests`).
    """

    checkpoint: Path
    engine: Path
    own: EngineOptions
    prefix: str = "--"
    ranks: int = 0
    identity: Mapping[str, Any] = field(default_factory=dict)
    arranged: ArrangedWeights | None = None

    def arguments(self, table: OptionTable) -> Arguments:
        """Return the words of the builder's options; `table` has the options that it knows."""
        return arguments(self.own.passed, table)

    def problems(self, table: OptionTable) -> list[Problem]:
        """Return what is wrong with the options for a builder that knows those in `table`."""
        return check_options(self.arguments(table), table, self.prefix)

    def command(self) -> list[str]:
        """Return the command line that builds this engine on a machine with TensorRT-LLM."""
        places = ["--checkpoint_dir", str(self.checkpoint), "--output_dir", str(self.engine)]
        options = command_words(self.arguments(known_options()))
        return [*self.container(self.engine), self.own.trtllm_build, *places, *options]

    def container(self, engine: Path) -> tuple[str, ...]:
        """Return the container's command for a builder that writes to `engine`, with its placeholders filled in."""
        places = {"checkpoint": self.checkpoint, "engine": engine, "uid": os.getuid(), "gid": os.getgid()}
        words = self.own.container
        for name, value in places.items():  # not str.format: other braces are left as they are
            words = tuple(word.replace(f"{{{name}}}", str(value)) for word in words)
        return words


class EngineTarget(Protocol):
    """The part of a job's target that an engine's request depends on."""

    @property
    def output_dir(self) -> Path: ...
    @property
    def engine(self) -> Mapping[str, Any] | None: ...
    @property
    def parallelism(self) -> Parallelism: ...


def make_request(checkpoint: Path, options: Mapping[str, Any]) -> EngineRequest:
    """The request of `headrace build`. Raises BadInput naming each option of headrace's own that is wrong."""
    try:
        own = EngineOptions(**anchored(options, Path.cwd()))
    except ValidationError as error:
        raise BadInput(_invalid(error, "--")) from None
    problems = [] if own.output_dir else [Problem("--output_dir", "nothing", "a directory for the engine")]
    try:
        directory = _absolute(checkpoint, Path.cwd())
    except ValueError as error:
        raise BadInput([*problems, Problem("CHECKPOINT", repr(str(checkpoint)), str(error))]) from None
    request = EngineRequest(directory, Path(own.output_dir or "engine"), own)
    problems += _places([request])
    if problems:
        raise BadInput(problems)
    return request


def job_requests(targets: Sequence[EngineTarget], shared: Mapping[str, Any] | None, scratch: str = "") -> tuple[EngineRequest, ...]:
    """The engines that a job asks for, one for each target that has a table.

    `shared`: the table of all targets. `scratch`: the place of the job's cuts, where that is to be held against the engines'.

    Raises BadInput naming each of headrace's own options that is wrong. The builder's options are checked later, when it is known.
    """
    requests: list[EngineRequest] = []
    problems: list[Problem] = []
    for target in targets:
        tables = [table for table in (shared, target.engine) if table is not None]
        if not tables:
            continue
        directory = target.output_dir
        if is_remote(directory):
            remedy = "Copy the checkpoint to a disk, and run headrace build there"
            problems.append(Problem(f"[engine] of {directory}", "a checkpoint in object storage", "one in a directory", remedy))
            continue
        try:
            own = EngineOptions(**{key: value for table in tables for key, value in anchored(table, Path.cwd()).items()})
        except ValidationError as error:
            problems += _invalid(error, PREFIX)
            continue
        engine = (own.output_dir or f"{directory}{SUFFIX}").replace("{target}", directory.name)
        requests.append(EngineRequest(directory, Path(engine), own, PREFIX, target.parallelism.world_size))
    outputs = [target.output_dir for target in targets if not is_remote(target.output_dir)]
    problems = list(dict.fromkeys(problems)) or _places(requests, outputs, scratch)
    if problems:
        raise BadInput(problems)
    return tuple(requests)


def real_place(engine: Path) -> Path:
    """The place of an engine's directory: where a link of its name leads, as what is built beside it takes its name by a rename."""
    return _followed(engine) if engine.is_symlink() else engine


def partial_of(engine: Path) -> Path:
    """The directory beside an engine's in which it is built."""
    return beside(engine, ".partial")


def replaced_of(engine: Path) -> Path:
    """The place of the former engine while a new one takes its name."""
    return beside(engine, ".replaced")


def beside(engine: Path, suffix: str) -> Path:
    """The path beside an engine's directory whose name has this behind the engine's."""
    real = real_place(engine)
    return real.parent / f"{real.name}{suffix}"


def anchored(table: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return an engine's options with their paths made absolute from `folder`: a job file's, or the current directory."""
    paths = {"output_dir", *(name for name, option in known_options().items() if option.type == "path")}
    if "/" in str(table.get("trtllm_build", "")):
        paths.add("trtllm_build")

    def absolute(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [absolute(each) for each in value]
        try:
            return str(_absolute(value, folder)) if isinstance(value, str | Path) and str(value) else value
        except ValueError:  # a home directory that is not known: the option itself is refused
            return value

    return {name: absolute(value) if name in paths else value for name, value in table.items()}


def _absolute(value: str | Path, folder: Path) -> Path:
    return Path(os.path.abspath(folder / at_home(value)))  # noqa: PTH100 (links stay as they are)


def _followed(path: Path) -> Path:
    """The path without links; Path.resolve raises for a link that leads to itself."""
    return Path(os.path.realpath(path))


def _places(requests: list[EngineRequest], outputs: Sequence[Path] = (), scratch: str = "") -> list[Problem]:
    """Check that engines lie beside one another, and beside checkpoints and scratch: a new engine replaces all of its directory.

    `outputs`: the checkpoints of the job, of which no engine may be asked. `scratch`: the directory of its cuts, or a URL.
    """
    problems = []
    kept = [("the checkpoint", path) for path in dict.fromkeys([*outputs, *(request.checkpoint for request in requests)])]
    kept += [("scratch at", Path(scratch))] if scratch and "://" not in scratch else []
    for request in requests:
        subject, own = f"{request.prefix}output_dir {request.engine}", _followed(request.engine)
        engines = [("the engine", other.engine) for other in requests if other is not request]
        taken = (own, partial_of(own), replaced_of(own))
        for what, path in (*kept, *engines):
            real = _followed(path)
            inside = [directory for directory in taken if real.is_relative_to(directory)]
            if what == "the engine" and real == own:
                remedy = "Put {target}, the name of the target's directory, into it"
                problems.append(Problem(subject, "two engines", "a directory for each", remedy))
            elif what == "the checkpoint" and own.is_relative_to(real):
                problems.append(Problem(subject, f"the checkpoint {path}", "a directory outside of it"))
            elif inside:
                expected = "a directory of its own: a new engine takes the place of all that is in it"
                problems.append(Problem(subject, f"{what} {path} inside {inside[0]}", expected, "Choose another for one of them"))
    return list(dict.fromkeys(problems))


def _invalid(error: ValidationError, prefix: str) -> list[Problem]:
    return [wrong_value(f"{prefix}{place(detail['loc'])}", detail) for detail in unlike(error.errors())]
