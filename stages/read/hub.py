"""Find a model of the Hugging Face Hub in the local cache, and download the files that are missing.

Only the files that a conversion reads are fetched: the configuration, the weights in one format, and the tokenizer's files.
"""

from __future__ import annotations

import glob
import re
import shlex
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.documents import read_object
from pipeline.errors import BadInput, Problem

# The names of an index and of the single file of a model without one, best format first; Meta's own format comes last.
FORMATS = (("model.safetensors.index.json", "model.safetensors"), ("pytorch_model.bin.index.json", "pytorch_model.bin"))
META = re.compile(r"(original/)?consolidated\.(\d\d)\.pth")
KNOWN = "config.json and weights as safetensors or pytorch_model.bin, in one file or with an index; or Meta's own files"
COMPANIONS = re.compile(
    r"tokenizer[^/]*|chat_template\.[^/]*|merges\.txt|"
    r"(special_tokens_map|added_tokens|vocab|generation_config|quantize_config|hf_quant_config)\.json"
)
USUAL = ("*.json", "model*.safetensors", "tokenizer*", "merges.txt", "chat_template.*")  # for a repository that is not known
COMMIT = re.compile(r"[0-9a-f]{40}")
PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"


def is_hub_id(text: str) -> bool:
    """Return whether `text` is a valid `org/name` of the Hub. A relative path can look the same: the caller checks for one."""
    return bool(re.fullmatch(f"{PART}/{PART}", text)) and "--" not in text and ".." not in text and not text.endswith(".git")


def find(repo_id: str, revision: str | None, download: bool) -> Path:
    """Return the directory of a model's files: its snapshot in huggingface_hub's cache.

    Parameters
    ----------
    repo_id
        The model, `org/name`.
    revision
        A branch, tag or commit; None for `main`.
    download
        Fetch what the cache lacks. Where the cache has everything, the Hub is not asked whether a branch has moved.

    Returns
    -------
    Path
        The snapshot, or its directory `original/` where that alone has weights, in Meta's format.

    Raises
    ------
    BadInput
        The cache lacks files that may not or cannot be fetched: offline, no such model or revision, no permission, or no weights.
    """
    from huggingface_hub import constants

    revision = revision or constants.DEFAULT_REVISION
    request = _Request(repo_id, revision, Path(constants.HF_HUB_CACHE).absolute(), f"{repo_id}, revision {revision}")
    directory, missing = request.cached()
    if directory and not missing:
        return directory
    if not download or constants.HF_HUB_OFFLINE:
        raise BadInput([request.incomplete("HF_HUB_OFFLINE set and " if download else "")])
    request.fetch()
    directory, missing = request.cached()
    if not directory or missing:  # where the network fails half-way, huggingface_hub may return what the cache held before
        raise BadInput([request.incomplete("an unfinished download and ", ())])
    return directory


@dataclass(frozen=True)
class _Weights:
    """A checkpoint's files in one format.

    `first`: the configuration and the index, which are fetched first. `files`: the weights, where no `index` names them. `folder`:
    the directory of the repository that they are in, with a slash, or "".
    """

    first: tuple[str, ...]
    files: tuple[str, ...] = ()
    index: str | None = None
    folder: str = ""

    def named(self, snapshot: Path) -> tuple[str, ...]:
        """Return the weights' files; none for a damaged index, which is reported when the source is opened."""
        if self.index is None:
            return self.files
        try:
            files = read_object(snapshot / self.index)["weight_map"].values()
            return tuple(sorted({file for file in files if isinstance(file, str)}))
        except (KeyError, TypeError, AttributeError):
            return ()


@dataclass(frozen=True)
class _Request:
    """A model and revision to find in, or fetch into, the cache. `subject`: its name in messages."""

    repo_id: str
    revision: str
    cache: Path
    subject: str

    def snapshot(self) -> tuple[Path | None, set[str]]:
        """Return the revision's directory in the cache and the files in it; None where the cache does not have the revision."""
        home = self.cache / f"models--{self.repo_id.replace('/', '--')}"
        with suppress(OSError, ValueError):
            commit = self.revision if COMMIT.fullmatch(self.revision) else (home / "refs" / self.revision).read_text().strip()
            if COMMIT.fullmatch(commit) and (snapshot := home / "snapshots" / commit).is_dir():
                # A link whose blob is gone does not count as a file.
                return snapshot, {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}
        return None, set()

    def cached(self) -> tuple[Path | None, list[str]]:
        """Return the directory to read and the files that it lacks; None for the directory where the files' names are not known."""
        snapshot, names = self.snapshot()
        if snapshot is None:
            return None, []
        weights = _choose(names) or _choose(self._listed(snapshot))
        if weights and any(map(META.fullmatch, weights.files)):  # Meta's files do not say how many there are
            weights = _choose(filter(META.fullmatch, names | self._listed(snapshot)))
        needed = (*weights.first, *weights.named(snapshot)) if weights else ()
        return snapshot / weights.folder if weights else None, [name for name in needed if name not in names]

    def _listed(self, snapshot: Path) -> set[str]:
        """Return the names of the repository's files where huggingface_hub has cached the list, which its later versions do."""
        try:
            from huggingface_hub import errors, get_cached_repo_tree
        except ImportError:
            return set()
        with suppress(errors.CachedRepoTreeNotFoundError):
            return {file.path for file in get_cached_repo_tree(self.repo_id, revision=snapshot.name, cache_dir=self.cache)}
        return set()

    def fetch(self) -> None:
        """Download what the cache lacks, the small files before the weights. Raises BadInput where that fails."""
        from huggingface_hub import HfApi, constants, snapshot_download

        def get(names: Iterable[str], revision: str) -> Path:
            patterns = [glob.escape(name) for name in names]
            return Path(snapshot_download(self.repo_id, revision=revision, cache_dir=self.cache, allow_patterns=patterns))

        needed: tuple[str, ...] = ()
        try:
            info = HfApi().model_info(self.repo_id, revision=self.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            names = {file.rfilename for file in info.siblings or ()}
            weights = _choose(names)
            if weights is None or not names.issuperset(weights.first):
                remedy = f"Fetch another kind with `hf download {self.repo_id} FILE --local-dir DIRECTORY`, and name its path"
                raise BadInput([Problem(self.subject, _some(sorted(names)) or "no files", KNOWN, remedy)])
            beside = [name for name in names if COMPANIONS.fullmatch(name.removeprefix(weights.folder))]
            snapshot = get([*weights.first, *beside], self.revision)
            files = weights.named(snapshot)
            needed = (*weights.first, *files)
            if absent := sorted(set(files) - names):
                found, remedy = f"no {_some(absent)} in the repository", "Try another --revision"
                raise BadInput([Problem(self.subject, found, "every file of the checkpoint", remedy)])
            if weights.index is None:  # the last of Meta's parts first: its number says how many come before it
                get(files[-1:], snapshot.name)
            get(files, snapshot.name)
        except Exception as error:  # of huggingface_hub and its HTTP library, which changes with its version
            problems = error.problems if isinstance(error, BadInput) else (self._failed(error, needed),)
            raise BadInput(problems) from None

    def incomplete(self, why: str, needed: Collection[str] | None = None) -> Problem:
        """Return the problem of files that the cache lacks, with the `hf` command that fetches them.

        The command names the commit of the files that are there, as the branch may have moved since. Many shards become one
        pattern: `hf` skips those that it has. `why`: the words before it in the message. `needed`: the files that a failed download
        was to fetch; None where nothing was downloaded.
        """
        snapshot, names = self.snapshot()
        missing = self.cached()[1] or [name for name in needed or () if name not in names]
        lacking = f"no {_some(missing)}" if missing else "no weights of it" if snapshot else "nothing of it"
        revision = snapshot.name if snapshot and missing else self.revision
        unnamed = [re.sub(r"(\.\w+)\.index\.json$", r"-*\1", name) for name in missing if name.endswith(".index.json")]
        patterns = dict.fromkeys(re.sub(r"-\d+-of-", "-*-of-", name) for name in missing) if len(missing) > 4 else missing
        includes = [word for pattern in [*patterns, *unnamed] or USUAL for word in ("--include", pattern)]
        command = shlex.join(["hf", "download", self.repo_id, "--revision", revision, *includes])
        other = "" if missing else " (or 'pytorch_model*.bin', of a model without safetensors)"
        remedy = f"{'Fetch' if needed is None else 'Run this again, or fetch'} it into that directory with: {command}{other}"
        return Problem(self.subject, f"{why}{lacking} in the cache {self.cache}", "every file of the checkpoint", remedy)

    def _failed(self, error: BaseException, needed: Collection[str]) -> Problem:
        from huggingface_hub import constants, errors

        if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
            error = error.__cause__
        hub, status = constants.ENDPOINT, getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, errors.RevisionNotFoundError):
            return Problem(self.subject, f"no such revision on {hub}", "a branch, a tag or a commit", "Check --revision")
        if isinstance(error, errors.GatedRepoError) or status == 403:
            remedy = f"Ask for access or accept the licence at {hub}/{self.repo_id}, then log in with `hf auth login`"
            return Problem(self.subject, f"a model that {hub} does not give to this account ({status})", "access to it", remedy)
        if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
            found = f"no such model on {hub}, or one that this account may not see ({status})"
            remedy = "Check the name; log in with `hf auth login` if it is private or gated"
            return Problem(self.subject, found, "a directory, a file, or a model of the Hub", remedy)
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return self.incomplete(f"no download from {hub} ({reason}) and ", needed)


def _choose(names: Iterable[str]) -> _Weights | None:
    """Return the files of the best format that `names` has any weights of; None where it has none."""
    names = set(names)
    for index, file in FORMATS:
        if index in names or file in names:
            return _Weights(("config.json", index), index=index) if index in names else _Weights(("config.json",), (file,))
    for folder in ("", "original/"):
        parts = [int(match[2]) for match in map(META.fullmatch, names) if match and (match[1] or "") == folder]
        if parts:
            files = tuple(f"{folder}consolidated.{part:02}.pth" for part in range(max(parts) + 1))
            return _Weights((f"{folder}params.json",), files, folder=folder)
    return None


def _some(names: Collection[str]) -> str:
    return ", ".join(list(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
