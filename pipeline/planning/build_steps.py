"""The engines of a plan as steps of its graph: a task `build` for each, or for each rank where these are built through Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.planning.builder_options import OptionTable, command_words, known_options, parse_help
from pipeline.planning.engine_options import EngineRequest, beside, partial_of
from stages.build import BuilderCall
from stages.build.arranged_weights import ArrangedWeights
from stages.build.builders import Builder, BuilderProbe

GPU: Mapping[str, float] = {"GPU": 1}  # the resources of a worker that a build takes


@dataclass(frozen=True)
class BuildStep:
    """One task `build`.

    `engine`: the directory of the engine that it makes, or makes a rank of. `output`: the number of the target whose `finish` it
    waits for; None where the checkpoint is whole.
    """

    call: BuilderCall
    engine: Path
    output: int | None = None


def build_steps(
    request: EngineRequest,
    output: int | None,
    ranks: int,
    *,
    name: str = "",
    probed: BuilderProbe | None = None,
    token: Path = Path(),
    kept: Sequence[Path] = (),
    sync: bool = False,
    arranged: ArrangedWeights | None = None,
) -> tuple[BuildStep, ...]:
    """Make the steps of an engine.

    Parameters
    ----------
    output
        The number of the target that it is built of, None where the checkpoint is whole already.
    ranks
        How many ranks it has.
    name
        Added to the steps' names: a cluster may still know the tasks of an earlier run.
    probed
        The builder of the machine that builds, where it has been asked.
    token, kept, sync, arranged
        As in `BuilderCall`.

    Returns
    -------
    tuple of BuildStep
        One, or one for each rank where they are built through Python: where the request says so, or the builder that was found is.
    """
    partial, own = partial_of(request.engine), request.own
    words = ["--checkpoint_dir", str(request.checkpoint), "--output_dir", str(partial)]
    words += command_words(request.arguments(option_table(probed)))
    single = (probed.kind if probed else own.builder) == "python"
    steps = []
    for rank in range(ranks) if single else (None,):
        call = BuilderCall(
            f"{request.engine.name}{'' if rank is None else f' rank {rank}'}{name}",
            Builder(own.builder, own.trtllm_build, request.container(partial)),
            tuple(words),
            partial,
            log_of(request.engine, rank),
            token,
            tuple(kept),
            engine_files(range(ranks) if rank is None else (rank,)),
            probed,
            rank,
            ranks,
            own.retries + 1,
            sync,
            arranged,
        )
        steps.append(BuildStep(call, request.engine, output))
    return tuple(steps)


def builder_of(request: EngineRequest) -> Builder:
    """The builder that a request asks for."""
    return Builder(request.own.builder, request.own.trtllm_build, request.own.container)


def option_table(probed: BuilderProbe | None) -> OptionTable:
    """The options that a builder's --help lists; those of TensorRT-LLM 1.2.1 where it was not asked."""
    return (parse_help(probed.help) if probed else {}) or known_options()


def log_of(engine: Path, rank: int | None = None) -> Path:
    """The log of the builder of all ranks of an engine, or of one rank's."""
    return beside(engine, f"{'' if rank is None else f'.rank{rank}'}.log")


def engine_files(ranks: Sequence[int]) -> tuple[str, ...]:
    """The names of the files that the builder of some ranks writes, at least; config.json is rank 0's."""
    return (*(("config.json",) if 0 in ranks else ()), *(f"rank{rank}.engine" for rank in ranks))
