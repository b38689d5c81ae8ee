"""Find a model of the Hugging Face Hub in the local cache, and download the files that are missing.

Only the files that a conversion reads are fetched (hub_files.py). The cache is read and filled by huggingface_hub, with its own
progress bars, tokens and environment.
"""

from __future__ import annotations

import glob
import re
import shlex
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import BadInput, Problem
from stages.read.hub_files import KNOWN, META, USUAL, choose, gguf_models

COMMIT = re.compile(r"[0-9a-f]{40}")


def find(model: str, revision: str | None, download: bool) -> Path:
    """Return where a model's files are in huggingface_hub's cache.

    Parameters
    ----------
    model
        `org/name`; of a repository with several GGUF models `org/name:TAG`, where TAG ends the name of one, such as Q4_K_M.
    revision
        A branch, tag or commit; None for `main`.
    download
        Fetch what the cache lacks. Where the cache has everything, the Hub is not asked whether a branch has moved.

    Returns
    -------
    Path
        The snapshot; its directory `original/` where that alone has weights, in Meta's format; or the first file of a GGUF model.

    Raises
    ------
    BadInput
        The cache lacks files that may not or cannot be fetched: offline, no such model or revision, no permission, or no weights.
    """
    from huggingface_hub import constants

    repo_id, _, tag = model.partition(":")
    revision = revision or constants.DEFAULT_REVISION
    request = _Request(repo_id, tag, revision, Path(constants.HF_HUB_CACHE).absolute(), f"{model}, revision {revision}")
    place, missing = request.cached()
    if place and not missing:
        return place
    if not download or constants.HF_HUB_OFFLINE:
        raise BadInput([request.incomplete("HF_HUB_OFFLINE set and " if download else "")])
    request.fetch()
    place, missing = request.cached()
    if not place or missing:  # where the network fails half-way, huggingface_hub may return what the cache held before
        raise BadInput([request.incomplete("an unfinished download and ", ())])
    return place


@dataclass(frozen=True)
class _Request:
    """A model and revision to find in, or fetch into, the cache. `subject`: its name in messages."""

    repo_id: str
    tag: str
    revision: str
    cache: Path
    subject: str

    def snapshot(self) -> tuple[Path | None, set[str]]:
        """Return the revision's directory in the cache and the files in it; None where the cache does not have the revision."""
        from huggingface_hub import snapshot_download

        with suppress(OSError, ValueError):
            # No pattern: or else a snapshot would be refused that lacks files which no conversion needs.
            snapshot = Path(
                snapshot_download(
                    self.repo_id, revision=self.revision, cache_dir=self.cache, local_files_only=True, allow_patterns=[]
                )
            )
            if COMMIT.fullmatch(snapshot.name):
                # A link whose blob is gone does not count as a file.
                return snapshot, {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}
        return None, set()

    def cached(self) -> tuple[Path | None, list[str]]:
        """Return the place to read and the files that it lacks; None for the place where the files' names are not known."""
        snapshot, names = self.snapshot()
        if snapshot is None:
            return None, []
        weights, known = choose(names, self.tag), names | self._listed(snapshot)
        if weights and any(map(META.fullmatch, weights.files)):
            weights = choose(filter(META.fullmatch, known))  # they do not say how many there are
        elif weights is None or not weights.first:  # nor does a GGUF file say whether it is the only one
            weights = choose(known, self.tag)
        needed = (*weights.first, *weights.named(snapshot)) if weights else ()
        return snapshot / weights.place if weights else None, [name for name in needed if name not in names]

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
            weights = choose(names, self.tag)
            if weights is None or not names.issuperset(weights.first):
                raise BadInput([self._unknown(names)])
            # By the branch, so that the cache knows which commit it is.
            snapshot = get([*weights.first, *weights.beside(names)] or weights.files[:1], self.revision)
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

    def _unknown(self, names: Collection[str]) -> Problem:
        """The problem of a repository whose files are no checkpoint, or several."""
        models = [Path(stem).name for stem, _ in gguf_models(names)]
        if len(models) > 1 or (models and self.tag):
            tag = re.split(r"[-.]", models[0])[-1]
            remedy = f"Name one by the end of its name, such as --model_dir {self.repo_id}:{tag}"
            expected = f"one that ends in {self.tag}" if self.tag else "one of them"
            return Problem(self.subject, f"GGUF models: {_some(models)}", expected, remedy)
        remedy = f"Fetch another kind with `hf download {self.repo_id} FILE --local-dir DIRECTORY`, and name its path"
        return Problem(self.subject, _some(sorted(names)) or "no files", KNOWN, remedy)

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
        usual = (f"*{self.tag}*.gguf",) if self.tag else USUAL
        includes = [word for pattern in [*patterns, *unnamed] or usual for word in ("--include", pattern)]
        command = shlex.join(["hf", "download", self.repo_id, "--revision", revision, *includes])
        other = "" if missing or self.tag else " (or 'pytorch_model*.bin', of a model without safetensors)"
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


def _some(names: Collection[str]) -> str:
    return ", ".join(list(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
