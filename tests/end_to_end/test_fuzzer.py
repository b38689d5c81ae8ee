"""Damaged sources, configurations, journals and job files: each is refused shortly with nothing written, or converted right.

Right is what the undamaged source gives, or, where the damage makes another model of it, what a second reading gives by the
libraries of its container (tests/support/second_reading.py). By night 3,000 are tried, by day a few of each kind.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import Interrupted, convert, plan
from pipeline.run.execute import execute
from pipeline.watching.listener import Silent
from stages.write import Written
from tests.pipeline.planning.bad_input.gguf_files import header_end
from tests.support import checkpoints, gguf_files, meta_files, mutations, rank_files, second_reading
from tests.support import quantized_checkpoints as packed
from tests.support.fuzzed import CPU_SECONDS, MEMORY_BYTES, Did, Worker

SEED = os.environ.get("HEADRACE_FUZZ_SEED", "1")  # another for other mutations
MESSAGE_BYTES = 4096
WRITTEN = 1_700_000_000  # when all files were, in seconds since the epoch: what is planned of them depends on it
CONFIG = checkpoints.LLAMA | {"num_hidden_layers": 2, "vocab_size": 64, "intermediate_size": 96}
QUANTIZED = packed.LLAMA | {
    "num_hidden_layers": 1,
    "hidden_size": 128,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 32,
}
FLAGS = ("--tp_size", "2", "--scheduler", "synchronous")

Files = dict[str, bytes]


@dataclass(frozen=True)
class Kind:
    """Something to damage: the files of a directory, the command that reads them, and what is done to one of them.

    `victims`: the files that are damaged. `second`: reads the source again; None where `headrace verify` does, whose formats are
    its own. `codes`: of commands that end well or are refused.
    """

    files: Files
    command: tuple[str, ...]
    victims: tuple[str, ...]
    mutate: Callable[[bytes, Random], bytes]
    second: Callable[[Path], tuple[second_reading.Arrays, Mapping[str, Any]]] | None = None
    codes: tuple[int, ...] = (0, 2)
    output: str = "out"


def kept(directory: Path) -> Files:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def restored(directory: Path, files: Files) -> None:
    for name, data in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
        os.utime(directory / name, (WRITTEN, WRITTEN))


def by_json(model: Path) -> tuple[second_reading.Arrays, Mapping[str, Any]]:
    return second_reading.hugging_face(model), json.loads((model / "config.json").read_bytes().decode("utf-8-sig"))


def by_params(model: Path) -> tuple[second_reading.Arrays, Mapping[str, Any]]:
    return second_reading.meta(model), json.loads((model / "params.json").read_text())


def by_gguf(model: Path) -> tuple[second_reading.Arrays, Mapping[str, Any]]:
    return second_reading.gguf(model)


class Stop(Silent):
    """Interrupts a run after so many groups."""

    def __init__(self, after: int) -> None:
        self.after = after

    def advanced(self, written: Written) -> None:  # noqa: ARG002
        self.after -= 1
        if not self.after:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    """Every kind, by name."""
    root = tmp_path_factory.mktemp("sound")
    tensors = checkpoints.values(CONFIG)
    made: dict[str, Kind] = {}

    def source(name: str, write: Callable[[Path], Any], *more: str, flag: str = "--model_dir", **kind: Any) -> None:
        write(root / name / "model")
        command = ("convert", flag, kind.pop("where", "model"), "--output_dir", "out", *FLAGS, *more)
        made[name] = Kind(kept(root / name), command, **kind)

    def saved(directory: Path, shards: int = 1, **how: Any) -> None:
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps(CONFIG))
        named = list(tensors.items())
        names = ["pytorch_model.bin"] if shards == 1 else [f"pytorch_model-{n + 1:05}-of-{shards:05}.bin" for n in range(shards)]
        for n, name in enumerate(names):
            torch.save({key: torch.from_numpy(array.copy()) for key, array in named[n::shards]}, directory / name, **how)
        if shards > 1:
            homes = {key: names[n % shards] for n, (key, _) in enumerate(named)}
            (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))

    def in_gguf(kind: str) -> Callable[[Path], Any]:
        def write(directory: Path) -> None:
            directory.mkdir(parents=True)
            gguf_files.write(directory / "model.gguf", CONFIG, tensors, kind)

        return write

    one, index = "model/model.safetensors", "model/model.safetensors.index.json"
    shards = tuple(f"model/model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))
    json_file, header = mutations.mutated_json, mutations.mutated_safetensors
    source("safetensors", lambda d: checkpoints.save(d, CONFIG, tensors), victims=(one,), mutate=header, second=by_json)
    source("shards", lambda d: checkpoints.save(d, CONFIG, tensors, shards=3), victims=shards, mutate=header, second=by_json)
    source("index", lambda d: checkpoints.save(d, CONFIG, tensors, shards=3), victims=(index,), mutate=json_file, second=by_json)
    source(
        "config", lambda d: checkpoints.save(d, CONFIG, tensors), victims=("model/config.json",), mutate=json_file, second=by_json
    )
    archive = "model/pytorch_model.bin"
    source("archive", saved, victims=(archive,), mutate=mutations.mutated_archive, second=by_json)
    source(
        "archives",
        lambda d: saved(d, shards=2),
        victims=("model/pytorch_model.bin.index.json",),
        mutate=json_file,
        second=by_json,
    )
    legacy = {"_use_new_zipfile_serialization": False}
    source("legacy", lambda d: saved(d, **legacy), victims=(archive,), mutate=mutations.mutated_legacy, second=by_json)
    parts = ("model/consolidated.00.pth", "model/consolidated.01.pth")
    for name, victims, mutate in (("meta", parts, mutations.mutated_archive), ("params", ("model/params.json",), json_file)):
        source(
            name,
            lambda d: meta_files.write(d, CONFIG, tensors, 2),
            flag="--meta_ckpt_dir",
            victims=victims,
            mutate=mutate,
            second=by_params,
        )
    for kind in ("F16", "Q8_0"):
        source(
            f"gguf {kind}",
            in_gguf(kind),
            where="model/model.gguf",
            victims=("model/model.gguf",),
            mutate=lambda data, random: mutations.mutated_gguf(data, random, ends[len(data)]),
            second=by_gguf,
        )
    ends = {
        (root / f"gguf {k}/model/model.gguf").stat().st_size: header_end(root / f"gguf {k}/model/model.gguf")
        for k in ("F16", "Q8_0")
    }
    for name in (
        "gptq without g_idx",
        "awq",
        "compressed w4a16",
        "compressed fp8",
        "modelopt awq",
        "fp8 block",
        "bitsandbytes nf4",
    ):
        kind = packed.formats()[name]
        source(
            name,
            lambda d, kind=kind: packed.write(d, QUANTIZED, kind),
            *(("--dequantize",) if name in ("fp8 block", "bitsandbytes nf4") else ()),
            victims=tuple(f"model/{file}" for file in ("config.json", *kind.files)),
            mutate=json_file,
        )
    return made | states(root, made["safetensors"])


def states(root: Path, sound: Kind) -> dict[str, Kind]:
    """What a run finds of earlier ones: a whole output, a journal, a kept cut; and a job file that asks for it."""
    job = b'model_dir = "model"\noutput_dir = "out"\ntp_size = 2\ndtype = "float16"\nscheduler = "synchronous"\nworkers = 1\n'
    made = {}
    for name, stop, more in (("output", 0, ()), ("journal", 5, ()), ("scratch", 0, ("--scratch_after", "read", "--keep_scratch"))):
        place = root / name
        restored(place, sound.files)
        asked = {"model_dir": place / "model", "output_dir": place / "out", "tp_size": 2, "scheduler": "synchronous"}
        if more:
            asked |= {"scratch_after": "read", "keep_scratch": True, "scratch": place / "scratch"}
        with contextlib.suppress(Interrupted), pytest.MonkeyPatch.context() as patch:
            patch.setattr("pipeline.planning.make_plan.block_bytes", lambda _: 20_000)
            if stop:
                execute(plan(**asked), Stop(stop))
            else:
                convert(**asked)
        if more:
            shutil.rmtree(place / "out")
        files = kept(place)
        victims = {
            "output": ("out/headrace.json", "out/config.json"),
            "journal": ("out/headrace.json.partial",),
            "scratch": tuple(file for file in files if file.endswith("zarr.json")),
        }[name]
        mutate = mutations.mutated_journal if name == "journal" else mutations.mutated_json
        command = (*sound.command, *more, *(("--scratch", "scratch") if more else ()))
        made[name] = Kind(files, command, victims, mutate, codes=(0, 2, 3) if more else (0, 2))
    command = ("convert", "job.toml")
    # 4: an engine was asked for.
    made["job"] = Kind(sound.files | {"job.toml": job}, command, ("job.toml",), mutations.mutated_toml, codes=(0, 2, 4))
    return made


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


def outputs(directory: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in sorted(directory.glob("*"))
        if path.name == "config.json" or path.name.startswith("rank")
    }


class Fuzzer:
    """Tries mutations of kinds, by number; `faults` says what was wrong, `figures` what became of all."""

    def __init__(self, kinds: Mapping[str, Kind], worker: Worker, place: Path) -> None:
        self.kinds, self.worker, self.place = kinds, worker, place
        self.sound: dict[str, dict[str, bytes]] = {}
        self.faults: list[str] = []
        self.figures: Counter[str] = Counter()
        self.by_kind: dict[str, Counter[str]] = {}
        self.cpu_seconds = self.peak_bytes = self.longest = 0.0

    def sound_output(self, name: str) -> dict[str, bytes]:
        if name not in self.sound:
            kind = self.kinds[name]
            directory = self.fresh("sound", kind.files)
            did = self.worker.run(directory, kind.command)
            assert did.code == 0, (name, did)
            self.sound[name] = outputs(directory / kind.output)
        return self.sound[name]

    def fresh(self, name: str, files: Files) -> Path:
        directory = self.place / name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        restored(directory, files)
        return directory

    def try_one(self, number: int) -> None:
        name = list(self.kinds)[number % len(self.kinds)]
        kind, sound = self.kinds[name], self.sound_output(name)
        random = Random(f"{SEED} {number}")
        victim = random.choice(kind.victims)
        data = kind.files[victim]
        while (changed := kind.mutate(kind.files[victim], random)) == data or (name == "job" and leaves(changed)):
            pass
        directory = self.fresh("case", kind.files | {victim: changed})
        did = self.worker.run(directory, kind.command)
        fault = self.fault(kind, directory, did, sound, changed)
        self.cpu_seconds += did.cpu_seconds
        self.peak_bytes, self.longest = max(self.peak_bytes, did.peak_bytes), max(self.longest, did.cpu_seconds)
        if fault:
            self.faults.append(f"mutation {number} of {name}, {victim}: {fault}")
            if keep := os.environ.get("HEADRACE_FUZZ_KEEP"):
                shutil.copytree(directory, Path(keep) / str(number), dirs_exist_ok=True)
        ended = "faults" if fault else "refused" if did.code == 2 else "failed" if did.code else self.how
        self.figures[ended] += 1
        self.by_kind.setdefault(name, Counter())[ended] += 1

    def fault(self, kind: Kind, directory: Path, did: Did, sound: dict[str, bytes], changed: bytes) -> str:
        """What is wrong with what a command did; "" for nothing."""
        self.how = ""
        if did.code not in kind.codes:
            return f"exit code {did.code}: {did.said[-1500:]}"
        if did.forbidden and "job.toml" not in kind.victims:  # whoever writes a job may ask for a cluster
            return f"it tried {did.forbidden[:3]}"
        if (directory / mutations.CANARY).exists():
            return "the code of a pickle was run"
        if did.cpu_seconds > CPU_SECONDS or did.peak_bytes > MEMORY_BYTES:
            return f"{did.cpu_seconds:.0f} s, {did.peak_bytes:,} bytes"
        if len(did.said.encode(errors="replace")) > MESSAGE_BYTES and did.code:
            return f"a message of {len(did.said):,} characters: {did.said[:300]}"
        if any(not each.isprintable() and each != "\n" for each in did.said):
            return f"a message with control characters: {did.said[:300]!r}"
        if did.code == 2 and did.touched:
            return f"refused, and something written: {did.said[:300]}"
        if did.code:
            return ""
        return self.wrong(kind, directory, sound, changed)

    def wrong(self, kind: Kind, directory: Path, sound: dict[str, bytes], changed: bytes) -> str:
        """What is wrong with an output; "" for nothing."""
        place = directory / kind.output
        if kind.victims == ("job.toml",):
            places = [path.parent for path in directory.rglob("rank0.safetensors")]
            if len(places) != 1:
                return f"{len(places)} outputs"
            (place,) = places
        found = outputs(place)
        if found == sound:
            self.how = "the same"
            return ""
        self.how = "another model"
        if kind.victims == ("job.toml",):
            config = json.loads(found["config.json"])
            asked = tomllib.loads(changed.decode())
            if config["mapping"]["tp_size"] != asked.get("tp_size", 1):
                return f"tp_size {config['mapping']['tp_size']}"
        if kind.second is None:
            did = self.worker.run(directory, ("verify", str(place), "--source", "model"))
            return "" if did.code == 0 else f"verify: {did.code} {did.said[-1000:]}"
        model = directory / kind.command[2]
        try:
            source, said = kind.second(model)
            ranks = [rank_files.read(place / f"rank{n}.safetensors") for n in range(len(found) - 1)]
            with np.errstate(all="ignore"):
                wrong = second_reading.differences(source, said, json.loads(found["config.json"]), ranks)
        except second_reading.Unread as error:
            return f"its library does not read it: {error}"
        except Exception as error:
            return f"a second reading ends with {type(error).__name__} {error}"
        return "; ".join(wrong[:4])

    def said(self) -> str:
        total = sum(self.figures.values())
        parts = ", ".join(f"{count} {what}" for what, count in self.figures.most_common())
        cost = (
            f"{self.cpu_seconds:.0f} s of processor time, at most {self.longest:.1f} s and {self.peak_bytes / 1e6:.0f} MB for one"
        )
        each = [f"  {name}: {', '.join(f'{n} {what}' for what, n in ended.most_common())}" for name, ended in self.by_kind.items()]
        return "\n".join([f"{total} mutations: {parts}; {cost}", *each])


def leaves(text: bytes) -> bool:
    """Whether a job file names a place outside of its directory: job files are trusted with that."""
    with contextlib.suppress(ValueError, RecursionError):
        return any(
            isinstance(each, str) and (each.startswith(("/", "~")) or ".." in each)
            for each in tomllib.loads(text.decode()).values()
        )
    return False


def fuzz(kinds: Mapping[str, Kind], worker: Worker, place: Path, numbers: range) -> None:
    fuzzer = Fuzzer(kinds, worker, place)
    for number in numbers:
        fuzzer.try_one(number)
    print(fuzzer.said())
    assert not fuzzer.faults, "\n\n".join([fuzzer.said(), *fuzzer.faults])


def test_a_few_mutations_of_each_kind(kinds: dict[str, Kind], worker: Worker, tmp_path: Path) -> None:
    fuzz(kinds, worker, tmp_path, range(60))


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_three_thousand_mutations(kinds: dict[str, Kind], worker: Worker, tmp_path: Path) -> None:
    fuzz(kinds, worker, tmp_path, range(60, 3060))
