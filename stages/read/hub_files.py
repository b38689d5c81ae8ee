"""Which files of a repository of the Hub are a checkpoint: the configuration, the weights in one format, the tokenizer's files.

Safetensors come before PyTorch's files, these before Meta's, and GGUF's last, of which a repository may have many: a tag names one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.documents import read_object
from stages.read.quantizer import FILES as QUANTIZERS

# The names of an index and of the single file of a model without one, best format first.
FORMATS = (("model.safetensors.index.json", "model.safetensors"), ("pytorch_model.bin.index.json", "pytorch_model.bin"))
META = re.compile(r"(original/)?consolidated\.(\d\d)\.pth")
GGUF = re.compile(r"(?P<stem>.+?)(?:-\d{5}-of-(?P<count>\d{5}))?\.gguf")
# GGUF files of other things: what reads pictures, and statistics of a quantizer.
NO_MODEL = re.compile(r"(.*[-._/])?mmproj([-._].*)?|(.*/)?imatrix[^/]*|.*[-._]imatrix", re.IGNORECASE)
KNOWN = "config.json and weights as safetensors or pytorch_model.bin, whole or with an index; Meta's own files; or one GGUF model"
COMPANIONS = re.compile(
    r"tokenizer[^/]*|chat_template\.[^/]*|merges\.txt|(special_tokens_map|added_tokens|vocab|generation_config)\.json|"
    + "|".join(map(re.escape, QUANTIZERS))
)
USUAL = ("*.json", "model*.safetensors", "tokenizer*", "merges.txt", "chat_template.*")  # of a repository that is not known


@dataclass(frozen=True)
class HubWeights:
    """A checkpoint's files in one format.

    `first`: the configuration and the index, which are fetched first. `files`: the weights, where no `index` names them. `folder`:
    the directory of the repository that they are in, with a slash, or "". `place`: what of the repository is opened; "" for all.
    """

    first: tuple[str, ...]
    files: tuple[str, ...] = ()
    index: str | None = None
    folder: str = ""
    place: str = ""

    def named(self, snapshot: Path) -> tuple[str, ...]:
        """Return the weights' files; none for a damaged index, which is reported when the source is opened."""
        if self.index is None:
            return self.files
        try:
            files = read_object(snapshot / self.index)["weight_map"].values()
            return tuple(sorted({file for file in files if isinstance(file, str)}))
        except (KeyError, TypeError, AttributeError):
            return ()

    def beside(self, names: Iterable[str]) -> list[str]:
        """Those of a repository's files that go with the weights; a GGUF file has its tokenizer in itself."""
        if self.place.endswith(".gguf"):
            return []
        return [name for name in names if COMPANIONS.fullmatch(name.removeprefix(self.folder))]


def choose(names: Iterable[str], tag: str = "") -> HubWeights | None:
    """Return the files of the best format that `names` has any weights of; None where it has none, or several GGUF models.

    `tag`: the end of a GGUF model's name, such as Q4_K_M, of which case does not count; then only that model counts.
    """
    names = set(names)
    for index, file in FORMATS if not tag else ():
        if index in names or file in names:
            return HubWeights(("config.json", index), index=index) if index in names else HubWeights(("config.json",), (file,))
    for folder in ("", "original/") if not tag else ():
        parts = [int(match[2]) for match in map(META.fullmatch, names) if match and (match[1] or "") == folder]
        if parts:
            files = tuple(f"{folder}consolidated.{part:02}.pth" for part in range(max(parts) + 1))
            return HubWeights((f"{folder}params.json",), files, folder=folder, place=folder)
    models = gguf_models(names, tag)
    if len(models) != 1:
        return None
    ((stem, count),) = models
    files = tuple(f"{stem}-{n:05}-of-{count:05}.gguf" for n in range(1, count + 1)) or (f"{stem}.gguf",)
    return HubWeights((), files, place=files[0])


def gguf_models(names: Iterable[str], tag: str = "") -> list[tuple[str, int]]:
    """Return the GGUF models among a repository's files: each one's name, and the number of its parts, 0 for one file."""
    matches = [match for match in map(GGUF.fullmatch, names) if match and not NO_MODEL.fullmatch(match["stem"])]
    found = {(match["stem"], int(match["count"] or 0)) for match in matches}
    ending = re.compile(rf"(.*[-._/])?{re.escape(tag)}", re.IGNORECASE)
    return sorted(each for each in found if not tag or ending.fullmatch(each[0]))
