"""Read Hugging Face directories: config.json, and weights as safetensors or PyTorch's .bin, in one file or indexed shards."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.errors import BadInput, Problem
from pipeline.model.dtypes import MODEL_DTYPES
from pipeline.printed import printed
from pipeline.tensor.tensors import LazyTensor, Source, SourceFile
from stages.read.file_sets import left_alone, repeated, stale_index, two_sets, unfinished
from stages.read.json_file import json_file
from stages.read.quantizer import KEY, quantizer_settings
from stages.read.source_reader import SourceReader


@dataclass(frozen=True)
class WeightsFormat:
    """A format of weights.

    `index`: the name of the index. `single`: that of a single file without an index. `shards`: the pattern of the files.
    `reader`: the module of `stages.read` whose `open_file` reads one.
    """

    kind: str
    index: str
    single: str
    shards: str
    reader: str

    def is_in(self, location: Path) -> bool:
        """Return whether a directory has weights of this format."""
        return (location / self.index).exists() or any(location.glob(self.shards))

    def open_file(self, path: Path) -> tuple[SourceFile, Mapping[str, LazyTensor]]:
        """Open a file: return its fingerprint and its tensors by name. Raises BadInput with all problems, OSError if unreadable."""
        module = importlib.import_module(f"stages.read.{self.reader}")
        opened: tuple[SourceFile, Mapping[str, LazyTensor]] = module.open_file(path)
        return opened


# Where a directory has both, the first is read. Other .bin files, such as training_args.bin, hold no weights and are left alone.
FORMATS = (
    WeightsFormat("Hugging Face safetensors", "model.safetensors.index.json", "model.safetensors", "*.safetensors", "safetensors"),
    WeightsFormat(
        "Hugging Face PyTorch .bin", "pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model*.bin", "torch_pickle"
    ),
)
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
)


# torch's second names of its types, as people and trainers write them.
_ALSO_CALLED = {"half": "float16", "float": "float32", "fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


class HuggingFace(SourceReader):
    """Directories as Hugging Face tools write them."""

    name = "huggingface"
    title = "a Hugging Face directory"

    def detect(self, location: Path) -> bool:
        """Return whether `location` is a directory with a config.json or with weights in one of FORMATS."""
        return location.is_dir() and ((location / "config.json").exists() or any(known.is_in(location) for known in FORMATS))

    def open_source(self, location: Path) -> Source:
        """Open a directory: read config.json, the index, and every shard's header. Raises BadInput with all problems found."""
        config, config_file = _config(location / "config.json")
        _refuse_ranks(location, config)
        settings, described = quantizer_settings(location, config)
        config = {**config, KEY: settings} if settings else config
        problems: list[Problem] = []
        tensors, files = open_tensors(location, problems)
        architecture = _architecture(config, config_file.path, problems)
        dtype = declared_dtype(config, config_file.path, problems)
        if problems:
            raise BadInput(problems)
        read = [file.path for file in files]
        return Source(
            kind=_format(location).kind,
            location=location,
            container="huggingface",
            architecture=architecture,
            config=config,
            config_name=str(config_file.path),
            tensors=tensors,
            files=(config_file, *described, *files),
            dtype=dtype,
            companions=tuple(location / name for name in TOKENIZER if (location / name).is_file()),
            notes=left_alone([path.name for path in read], [path.name for path in _others(location, _format(location), read)]),
        )


def open_tensors(location: Path, problems: list[Problem]) -> tuple[dict[str, LazyTensor], tuple[SourceFile, ...]]:
    """Return the tensors of a directory by name, and the files that they are in. Adds what is wrong with them to `problems`."""
    weights = _format(location)
    shards, listed = _shards(location, weights, problems)
    tensors: dict[str, LazyTensor] = {}
    homes: dict[str, Path] = {}
    twice: dict[str, tuple[Path, Path]] = {}
    files: list[SourceFile] = []
    for path in shards:
        try:
            file, file_tensors = weights.open_file(path)
        except BadInput as error:
            problems += error.problems
            continue
        except OSError as error:
            problems.append(Problem(str(path), f"a file that cannot be read ({error.strerror})", "a readable file"))
            continue
        files.append(file)
        for name, tensor in file_tensors.items():
            if name in homes:
                twice[name] = (homes[name], path)
            homes[name] = path
            tensors[name] = tensor
    problems += repeated(location, twice)
    opened = {str(file.path.relative_to(location)) for file in files}
    problems += [
        Problem(name, f"no such tensor in {file}", f"the tensor there, as {weights.index} says", "Fetch both again")
        for name, file in listed.items()
        if file in opened and name not in homes
    ]
    return tensors, tuple(files)


def _format(location: Path) -> WeightsFormat:
    return next((known for known in FORMATS if known.is_in(location)), FORMATS[0])


def _config(path: Path) -> tuple[dict[str, Any], SourceFile]:
    if not path.exists():
        raise BadInput([Problem(str(path), "no such file", "the model's configuration", "Fetch it with the checkpoint")])
    return json_file(path)


def _refuse_ranks(location: Path, config: Mapping[str, Any]) -> None:
    """Raise BadInput where config.json is a TensorRT-LLM checkpoint's, which has one architecture, and how its ranks are split."""
    split, named = config.get("mapping"), config.get("architecture")
    if "architectures" in config or not isinstance(split, Mapping) or not isinstance(named, str):
        return
    sizes = ", ".join(f"{key} {split[key]}" for key in ("tp_size", "pp_size") if key in split)
    found = f"a TensorRT-LLM checkpoint of {printed(named)}{f', {printed(sizes)}' if sizes else ''}: it is converted already"
    remedy = (
        f"Build its engine from it as it is: trtllm-build --checkpoint_dir {location}. For other ranks, or another quantization, "
        "convert the model that it was made from"
    )
    raise BadInput([Problem(str(location), found, "a source, such as a Hugging Face directory", remedy)])


def _architecture(config: Mapping[str, Any], path: Path, problems: list[Problem]) -> str:
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures and isinstance(architectures[0], str):
        return architectures[0]
    problems.append(Problem(f"{path}: architectures", repr(architectures), 'a list such as ["LlamaForCausalLM"]'))
    return ""


def declared_dtype(config: Mapping[str, Any], path: Path | str, problems: list[Problem]) -> str | None:
    """Return the configuration's `torch_dtype`, or `dtype` as transformers 5 writes it; None where there is neither.

    Adds to `problems` where it is no type of weights.
    """
    key = next((key for key in ("torch_dtype", "dtype") if config.get(key) is not None), None)
    if key is None:
        return None
    name = str(config[key]).removeprefix("torch.")
    if name == "auto":  # as trainers write it: the weights' own
        return None
    name = _ALSO_CALLED.get(name, name)
    if not isinstance(config[key], str) or name not in MODEL_DTYPES:
        remedy = "Mend the key, or leave it out: then the type is the weights' own"
        problems.append(Problem(f"{path}: {key}", repr(config[key]), f"one of {', '.join(MODEL_DTYPES)}", remedy))
    return name


def _shards(location: Path, weights: WeightsFormat, problems: list[Problem]) -> tuple[list[Path], dict[str, str]]:
    """Return the shard files, and the file of each tensor according to the index (empty where there is no index)."""
    index = location / weights.index
    if not index.exists():
        single = location / weights.single
        paths: list[Path] = [single] if single.exists() else sorted(location.glob(weights.shards))
        numbered = [path.name for path in _others(location, weights, paths) if "-of-" in path.name]
        if single.exists() and numbered:
            problems.append(two_sets(location, [single.name], numbered))
        problems += unfinished(paths)
        if not paths:
            names = ", ".join(sorted(path.name for path in location.iterdir())[:8]) or "nothing"
            problems.append(Problem(str(location), names, f"{weights.single}, or shards and {weights.index}"))
        return paths, {}
    listed = json_file(index)[0].get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        problems.append(Problem(f"{index}: weight_map", str(listed)[:80], "tensor names and the file of each"))
        return [], {}
    paths = []
    missing: list[Problem] = []
    for file in sorted(set(listed.values())):
        # Only the name is checked: a shard may be a link to elsewhere, as in the Hub's cache, but an index must not lead outside.
        parts = PurePosixPath(file).parts
        if not parts or file.startswith("/") or ".." in parts or "\\" in file:
            problems.append(Problem(str(index), f"the shard {file!r}", "a file inside the directory"))
        elif not _is_file(location / file):
            count = sum(1 for home in listed.values() if home == file)
            expected = f"the {count} tensors that {weights.index} says it holds"
            missing.append(Problem(str(location / file), "no such file", expected, "Fetch it"))
        else:
            paths.append(location / file)
    others = [path.name for path in _others(location, weights, [location / file for file in listed.values()])]
    if missing and others and not paths:
        problems.append(stale_index(index, [Path(each.subject).name for each in missing], others))
        return [], {}
    if weights.single in others:
        problems.append(two_sets(location, [path.name for path in paths], [weights.single]))
    problems += missing
    return paths, listed


def _others(location: Path, weights: WeightsFormat, read: Collection[Path]) -> list[Path]:
    """Return the files of a format that are not among those that are read."""
    known = set(read)
    return [path for path in sorted(location.glob(weights.shards)) if path not in known]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the file system
        return False


READER = HuggingFace()
