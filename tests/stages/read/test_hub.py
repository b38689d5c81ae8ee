"""stages/read/hub.py: which directory, which files, and what is said where the cache and the Hub do not have them.

The first half lays caches out by hand and lets nothing connect. The second runs the module in processes of its own, as
huggingface_hub reads the environment when it is imported, against a server that speaks as much of the Hub's API as it asks for.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import BadInput
from stages.read import hub, open_source
from tests.support import checkpoints

REPO = "org/name"
SHA, OLD = "5d0f2e8a7c" * 4, "0a1b2c3d4e" * 4
SMALL = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def index(*shards: str) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": {f"layer.{n}.weight": shard for n, shard in enumerate(shards)}}).encode()


def contents(*names: str, shards: tuple[str, ...] = SHARDS) -> dict[str, bytes]:
    """Something for each file: its name over and over, or for an index one of these shards."""
    return {name: index(*shards) if name.endswith(".index.json") else name.encode() * 999 for name in names}


# --- names ---


@pytest.mark.parametrize("text", ["org/name", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "a/b", "o_1/_x", f"{'o' * 96}/{'n' * 96}"])
def test_an_id_of_the_hub(text: str) -> None:
    assert hub.is_hub_id(text)


NO_IDS = r"""
    name org/ /name org/name/ ./name ../name ~/name org/name/more /abs/path org/na--me org/na..me org/name.git org/-name org/name.
    org/na+me org\name C:/name hf://org/name s3://org/name örg/name
"""


@pytest.mark.parametrize("text", [*NO_IDS.split(), "", "org/na me", "org/name\n", f"org/{'n' * 97}"])
def test_not_an_id_of_the_hub(text: str) -> None:
    assert not hub.is_hub_id(text)


@given(st.text("ab-_.1g", max_size=8), st.text("ab-_.1git", max_size=8))
def test_the_hubs_own_client_agrees(org: str, name: str) -> None:
    try:
        validate_repo_id(f"{org}/{name}")
    except HFValidationError:
        assert not hub.is_hub_id(f"{org}/{name}")
    else:
        assert hub.is_hub_id(f"{org}/{name}")


# --- the cache by itself ---


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, which nothing may leave."""
    connected = []

    def refuse(_: socket.socket, address: Any) -> None:
        connected.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield tmp_path / "hub"
    assert not connected


def lay(cache: Path, files: dict[str, bytes], *, sha: str = SHA, refs: tuple[str, ...] = ("main",)) -> Path:
    """A snapshot as huggingface_hub lays it out: links into blobs, and refs that name the commit."""
    home = cache / "models--org--name"
    snapshot = home / "snapshots" / sha
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir(exist_ok=True)
    for name, content in files.items():
        blob = home / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        path = snapshot / name
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(os.path.relpath(blob, path.parent))
    for ref in refs:
        path = home / "refs" / ref
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(sha)
    return snapshot


def problem(revision: str | None = None, *, download: bool = False) -> str:
    """The one problem that `find` reports."""
    with pytest.raises(BadInput) as caught:
        hub.find(REPO, revision, download)
    (only,) = caught.value.problems
    assert only.subject == f"{REPO}, revision {revision or 'main'}"
    return str(only)


def command(said: str) -> list[str]:
    """The words of the command that a problem proposes."""
    return shlex.split(said.partition(" directory with: ")[2].partition(" (or ")[0])


def includes(*names: str) -> list[str]:
    return [word for name in names for word in ("--include", name)]


COMPLETE: dict[str, tuple[str, ...]] = {
    "one file": ("config.json", "model.safetensors"),
    "shards": ("config.json", INDEX, *SHARDS),
    "with companions and others": (*SMALL, INDEX, *SHARDS, "README.md", "consolidated.safetensors"),
    "pickles": ("config.json", "pytorch_model.bin"),
    "Meta": ("params.json", "consolidated.00.pth", "consolidated.01.pth", "tokenizer.model"),
}


@pytest.mark.parametrize("names", COMPLETE.values(), ids=COMPLETE)
@pytest.mark.parametrize("download", [False, True])
def test_a_whole_cache_answers_by_itself(cache: Path, names: tuple[str, ...], download: bool) -> None:
    snapshot = lay(cache, contents(*names))
    assert hub.find(REPO, None, download) == snapshot


def test_metas_folder_is_the_checkpoint_where_nothing_else_is(cache: Path) -> None:
    snapshot = lay(cache, contents("config.json", "original/params.json", "original/consolidated.00.pth"))
    assert hub.find(REPO, None, False) == snapshot / "original"


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "refs/pr/7", SHA])
def test_revisions_of_the_cache(cache: Path, revision: str | None) -> None:
    lay(cache, contents("config.json", "model.safetensors"), sha=OLD, refs=("old",))
    snapshot = lay(cache, contents("config.json", "model.safetensors", "README.md"), refs=("main", "v1.0", "refs/pr/7"))
    assert hub.find(REPO, revision, False) == snapshot
    assert hub.find(REPO, "old", False).name == hub.find(REPO, OLD, False).name == OLD


def test_what_is_found_opens_as_a_checkpoint(cache: Path, tmp_path: Path) -> None:
    tensors = checkpoints.write(tmp_path / "model", checkpoints.LLAMA, shards=2)
    lay(cache, {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()})
    source = open_source(hub.find(REPO, None, False))
    assert source.tensors.keys() == tensors.keys()


def test_safetensors_are_chosen_though_pickles_are_whole(cache: Path) -> None:
    lay(cache, contents("config.json", INDEX, SHARDS[0], "pytorch_model.bin"))
    assert SHARDS[1] in problem()


def test_a_shard_that_is_missing(cache: Path) -> None:
    lay(cache, contents("config.json", INDEX, SHARDS[0]))
    said = problem()
    assert f"found no {SHARDS[1]} in the cache {cache};" in said
    # By the commit: `main` may be another one by now, of which the cache holds nothing.
    assert command(said) == ["hf", "download", REPO, "--revision", SHA, *includes(SHARDS[1])]


def test_a_link_whose_blob_is_gone_is_missing(cache: Path) -> None:
    snapshot = lay(cache, contents("config.json", INDEX, *SHARDS))
    (snapshot / SHARDS[0]).resolve().unlink()
    assert f"found no {SHARDS[0]} in" in problem()


def test_a_configuration_that_is_missing(cache: Path) -> None:
    lay(cache, contents("model.safetensors"))
    assert "found no config.json in" in problem()


def test_many_missing_shards_are_one_pattern(cache: Path) -> None:
    shards = tuple(f"model-{n:05}-of-00030.safetensors" for n in range(1, 31))
    lay(cache, contents("config.json", INDEX, shards[4], shards=shards))
    said = problem()
    assert f"found no {', '.join(shards[:4])} and 25 more in" in said
    assert command(said)[5:] == includes("model-*-of-00030.safetensors")


def test_nothing_cached(cache: Path) -> None:
    said = problem("v2")
    assert f"found nothing of it in the cache {cache};" in said
    assert command(said) == ["hf", "download", REPO, "--revision", "v2", *includes(*hub.USUAL)]


def test_a_configuration_alone(cache: Path) -> None:
    lay(cache, contents(*SMALL))
    said = problem()
    assert "found no weights of it in" in said
    assert "pytorch_model*.bin" in said


@pytest.mark.parametrize("revision", ["v2", OLD, "../../../etc", "/etc/passwd", "nul\0", "x" * 5000])
def test_a_revision_that_the_cache_does_not_have(cache: Path, revision: str) -> None:
    lay(cache, contents("config.json", "model.safetensors"))
    assert "found nothing of it in" in problem(revision)


@pytest.mark.parametrize("text", ["", "../../../..", "main", SHA[:10], "\udcff"])
def test_a_ref_that_is_no_commit(cache: Path, text: str) -> None:
    lay(cache, contents("config.json", "model.safetensors"))
    (cache / "models--org--name/refs/main").write_bytes(text.encode(errors="surrogateescape"))
    assert "found nothing of it in" in problem()


@pytest.mark.parametrize("content", [b"", b"[]", b'{"weight_map": 3}', b'{"weight_map": {"a": 1}}', b"[" * 99999, b"\xff"])
def test_an_index_that_is_none_is_left_to_the_source(cache: Path, content: bytes) -> None:
    snapshot = lay(cache, {**contents("config.json"), INDEX: content})
    assert hub.find(REPO, None, False) == snapshot


@pytest.mark.parametrize("shard", ["../../../secret", "/etc/nothing", "x" * 5000, "nul\0"])
def test_an_index_that_leads_out(cache: Path, shard: str) -> None:
    lay(cache, {**contents("config.json"), INDEX: index(shard)})
    assert "found no " in problem()


def test_parts_of_meta_that_are_missing(cache: Path) -> None:
    lay(cache, contents("consolidated.01.pth", "consolidated.03.pth"))
    assert "found no params.json, consolidated.00.pth, consolidated.02.pth in" in problem()


def test_offline_it_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    said = problem(download=True)
    assert f"found HF_HUB_OFFLINE set and nothing of it in the cache {cache};" in said
    assert command(said)[:3] == ["hf", "download", REPO]
    snapshot = lay(cache, contents("config.json", "model.safetensors"))
    assert hub.find(REPO, None, True) == snapshot


# --- a Hub ---

RUN = """
import json, sys
from pipeline.errors import BadInput
from stages.read import hub
results = []
for repo, revision, download in json.loads(sys.argv[1]):
    try:
        results.append(str(hub.find(repo, revision, download)))
    except BadInput as error:
        assert error.exit_code == 2 and len(error.problems) == 1
        results.append("problem: " + str(error.problems[0]))
print(json.dumps(results))
"""


@dataclass
class Hub:
    """Repositories behind HTTP, by name; what was asked for; and what to do instead of sending a file, or of anything else."""

    home: Path
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    # By name of a repository or of a file: what answers in place of the server, and is done with it if it says so.
    instead: dict[str, Callable[[Handler, bytes], bool]] = field(default_factory=dict)
    endpoint: str = ""

    @property
    def cache(self) -> Path:
        return self.home / "hub"

    @property
    def environment(self) -> dict[str, str]:
        mine = {name: value for name, value in os.environ.items() if not re.match("HF_|HUGGING|TRANSFORMERS_", name)}
        return {
            **mine,
            "HF_HOME": str(self.home),
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "*",
            "no_proxy": "*",
        }

    def start(self, *requests: tuple[str, str | None, bool]) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", "-c", RUN, json.dumps(requests)]
        return subprocess.Popen(command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def find(self, *requests: tuple[str, str | None, bool]) -> list[str]:
        """The directory or the problem of each request, all in one process."""
        with self.start(*requests) as process:
            out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        results: list[str] = json.loads(out)
        return results

    def find_one(self, repo: str = REPO, revision: str | None = None, *, download: bool = True) -> str:
        (result,) = self.find((repo, revision, download))
        return result

    def fetched(self) -> list[str]:
        """The files whose content was asked for, in order of their names."""
        return sorted(line.split("/resolve/")[1].split("/", 1)[1] for line in self.log if re.match("GET .*/resolve/", line))


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append(f"{self.command} {path}")
        match = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+)/(revision|tree|resolve)/([^/]+|refs/pr/\d+)(?:/(.*))?", path)
        assert match, path
        repo, kind, revision, file = match.groups()
        if repo in self.hub.instead and self.hub.instead[repo](self, b""):
            return
        if repo not in self.hub.repos:
            self.refuse(404, "RepoNotFound")
        elif revision not in ("main", SHA):
            self.refuse(404, "RevisionNotFound")
        elif kind == "revision":
            self.answer({"id": repo, "sha": SHA, "siblings": [{"rfilename": name} for name in self.hub.repos[repo]]})
        elif kind == "tree":
            files = self.hub.repos[repo].items()
            self.answer([{"type": "file", "path": name, "size": len(data), "oid": etag(data)} for name, data in files])
        elif file not in self.hub.repos[repo]:
            self.refuse(404, "EntryNotFound")
        else:
            self.send_file(file, self.hub.repos[repo][file])

    def answer(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send(200, {"Content-Length": str(len(body)), "Content-Type": "application/json"}, body)

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        self.send(status, {"Content-Length": "0", **({"X-Error-Code": code} if code else {}), "X-Error-Message": message}, b"")

    def send_file(self, name: str, data: bytes) -> None:
        headers = {"ETag": f'"{etag(data)}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        status, body = 200, data
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            status, body = 206, data[int(asked[1]) :]
            headers["Content-Range"] = f"bytes {asked[1]}-{len(data) - 1}/{len(data)}"
        headers["Content-Length"] = str(len(body))
        if self.command == "GET" and name in self.hub.instead:
            self.send(status, headers, b"")
            if self.hub.instead[name](self, body):
                return
            self.wfile.write(body)
        else:
            self.send(status, headers, body)

    def send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on standard error."""


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Hub]:
    result = Hub(tmp_path / "home")
    http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": result}))
    result.endpoint = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield result
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


OTHERS = """
    pytorch_model.bin pytorch_model.bin.index.json README.md .gitattributes model.onnx onnx/model.onnx onnx/tokenizer.json rust.ot
    consolidated.safetensors name.Q4_K_M.gguf original/params.json original/consolidated.00.pth original/tokenizer.model tf_model.h5
    model-00001-of-00009.safetensors model.safetensors.bak training_args.bin adapter_config.json adapter_model.safetensors
"""
PICKLES = ("config.json", "vocab.json", "merges.txt", "chat_template.jinja", "pytorch_model.bin.index.json", *SHARDS)
META = tuple(f"original/{name}" for name in ("params.json", "consolidated.00.pth", "consolidated.01.pth", "tokenizer.model"))


def test_only_what_is_needed_is_fetched_and_once(server: Hub) -> None:
    server.repos[REPO] = contents(*SMALL, INDEX, *SHARDS, *OTHERS.split())
    first, second = server.find((REPO, None, True), (REPO, "main", False))
    assert first == second == str(server.cache / "models--org--name/snapshots" / SHA)
    assert server.fetched() == sorted([*SMALL, INDEX, *SHARDS])
    assert {path.name for path in Path(first).iterdir()} == {*SMALL, INDEX, *SHARDS}
    assert all((Path(first) / name).read_bytes() == server.repos[REPO][name] for name in (*SMALL, INDEX, *SHARDS))
    server.log.clear()
    assert server.find((REPO, None, True), (REPO, SHA, True), (REPO, "main", True)) == [first] * 3
    assert server.log == []


@pytest.mark.parametrize(
    ("held", "needed", "folder"),
    [
        (("config.json", "model.safetensors", *OTHERS.split()), ("config.json", "model.safetensors"), ""),
        ((*PICKLES, "pytorch_model.bin", "training_args.bin"), PICKLES, ""),
        ((*META, "README.md", "LICENSE"), META, "/original"),
    ],
    ids=["one file", "pickles", "Meta"],
)
def test_other_formats(server: Hub, held: tuple[str, ...], needed: tuple[str, ...], folder: str) -> None:
    server.repos[REPO] = contents(*held)
    assert server.find_one(revision=SHA) == f"{server.cache}/models--org--name/snapshots/{SHA}{folder}"
    assert server.fetched() == sorted(needed)


def test_a_cache_that_lacks_a_shard_is_filled(server: Hub) -> None:
    server.repos[REPO] = contents("config.json", INDEX, *SHARDS)
    snapshot = lay(server.cache, contents("config.json", INDEX, SHARDS[0]))
    assert server.find_one() == str(snapshot)
    assert server.fetched() == [SHARDS[1]]


def test_a_branch_that_moved_while_the_cache_was_incomplete(server: Hub) -> None:
    server.repos[REPO] = contents("config.json", "model.safetensors")
    lay(server.cache, contents("config.json", INDEX, SHARDS[0]), sha=OLD)
    assert server.find_one().endswith(SHA)


@pytest.mark.parametrize(
    ("small", "weights"),
    [(("config.json", INDEX, "tokenizer.json"), SHARDS), (META[:1] + META[-1:], META[1:-1])],
    ids=["safetensors", "Meta"],
)
@pytest.mark.parametrize("stuck", [0, 1])
def test_a_download_that_is_killed(server: Hub, small: tuple[str, ...], weights: tuple[str, ...], stuck: int) -> None:
    server.repos[REPO] = contents(*small, *weights)
    half, killed = threading.Event(), threading.Event()

    def hang(handler: Handler, body: bytes) -> bool:
        handler.wfile.write(body[: len(body) // 2])
        half.set()
        assert killed.wait(30)
        return True

    server.instead[weights[stuck]] = hang
    with server.start((REPO, None, True)) as process:
        assert half.wait(30)
        process.kill()
    killed.set()
    server.instead.clear()
    assert set(small) < set(server.fetched())
    server.log.clear()
    said, found = server.find((REPO, None, False), (REPO, None, True))
    assert weights[stuck] in command(said)
    assert all(
        (server.cache / f"models--org--name/snapshots/{SHA}" / name).read_bytes() == server.repos[REPO][name] for name in weights
    )
    assert found.startswith(str(server.cache))
    assert set(server.fetched()) <= set(weights)  # the small files were whole


def test_a_connection_that_breaks(server: Hub) -> None:
    server.repos[REPO] = contents("config.json", "model.safetensors")
    broken = []

    def half(handler: Handler, body: bytes) -> bool:
        broken.append(body)
        handler.wfile.write(body[: len(body) // 2])
        if len(broken) > 1:
            handler.wfile.write(body[len(body) // 2 :])
        return True

    server.instead["model.safetensors"] = half
    first, second = server.find((REPO, None, True), (REPO, None, True))
    # Later versions of huggingface_hub go on by themselves.
    assert first == second or command(first) == ["hf", "download", REPO, "--revision", SHA, *includes("model.safetensors")]
    assert (Path(second) / "model.safetensors").read_bytes() == server.repos[REPO]["model.safetensors"]
    assert len(broken) == 2


def test_what_the_hub_refuses(server: Hub) -> None:
    server.repos["org/there"] = contents("config.json", "model.safetensors")
    server.repos["org/gated"] = contents("config.json", "model.safetensors")

    def refusing(status: int, code: str = "", message: str = "", path: str = "/") -> Callable[[Handler, bytes], bool]:
        def refuse(handler: Handler, _: bytes) -> bool:
            if path in handler.path:
                handler.refuse(status, code, message)
            return path in handler.path

        return refuse

    def nonsense(handler: Handler, _: bytes) -> bool:
        handler.send(200, {"Content-Type": "text/html"}, b"<html>Log in to the hotel's network</html>")
        return True

    server.instead |= {
        "org/private": refusing(401, "RepoNotFound"),
        "org/token": refusing(401, "", "Invalid credentials in Authorization header"),
        "org/hidden": refusing(404),
        "org/forbidden": refusing(403),
        # Everybody sees the names; the files are for those who have accepted the licence.
        "org/gated": refusing(403, "GatedRepo", path="/resolve/"),
        "org/broken": refusing(500),
        "org/hotel": nonsense,
    }
    names = ("missing", "private", "token", "hidden", "forbidden", "gated", "broken", "hotel")
    found = server.find(("org/there", "v9", True), ("org/there", OLD, True), *((f"org/{name}", None, True) for name in names))
    revision, commit, *rest = found
    said = dict(zip(names, rest, strict=True))
    assert revision == (
        f"problem: org/there, revision v9: found no such revision on {server.endpoint}; "
        "expected a branch, a tag or a commit. Check --revision"
    )
    assert f"found no such revision on {server.endpoint}" in commit
    for name, status in {"missing": 404, "private": 401, "token": 401, "hidden": 404}.items():
        assert f"org/{name}, revision main: found no such model on {server.endpoint}" in said[name]
        assert f"({status})" in said[name]
        assert "`hf auth login`" in said[name]
    for name in ("forbidden", "gated"):
        assert f"found a model that {server.endpoint} does not give to this account (403)" in said[name]
        assert f"licence at {server.endpoint}/org/{name}, then log in with `hf auth login`" in said[name]
    for name in ("broken", "hotel"):
        assert f"found no download from {server.endpoint} (" in said[name]
        assert f"nothing of it in the cache {server.cache}" in said[name]
        assert command(said[name])[:5] == ["hf", "download", f"org/{name}", "--revision", "main"]


def test_repositories_without_what_headrace_reads(server: Hub) -> None:
    server.repos |= {
        "org/gguf": contents("README.md", "name.Q4_K_M.gguf"),
        "org/bare": contents("model.safetensors"),
        "org/void": {},
        "org/torn": contents("config.json", INDEX, SHARDS[0]),
    }
    gguf, bare, void, torn = server.find(*((f"org/{name}", None, True) for name in ("gguf", "bare", "void", "torn")))
    assert "found README.md, name.Q4_K_M.gguf; expected config.json and weights" in gguf
    assert "`hf download org/gguf FILE --local-dir DIRECTORY`" in gguf
    assert "found model.safetensors; expected config.json and weights" in bare
    assert "found no files; expected config.json and weights" in void
    assert f"found no {SHARDS[1]} in the repository;" in torn
    assert SHARDS[0] not in server.fetched()


def test_a_list_of_files_that_the_cache_keeps(server: Hub) -> None:
    """Later versions of huggingface_hub keep it from the start of a download, by whomever."""
    server.repos[REPO] = contents("config.json", "model.safetensors", "README.md")
    server.repos["org/meta"] = contents(*META)
    server.repos["org/shards"] = contents("config.json", INDEX, *SHARDS)
    script = """
from huggingface_hub import snapshot_download
snapshot_download("org/name", allow_patterns="config.json")
snapshot_download("org/shards", allow_patterns="config.json")
snapshot_download("org/meta", allow_patterns=["*.json", "*.00.pth"])
"""
    subprocess.run([sys.executable, "-c", script], env=server.environment, check=True)
    one, shards, meta = server.find(*((f"org/{name}", None, False) for name in ("name", "shards", "meta")))
    assert "found no model.safetensors in" in one
    assert command(shards)[5:] == includes(INDEX, "model-*.safetensors")
    assert "found no original/consolidated.01.pth in" in meta


def test_a_server_that_is_down(server: Hub) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        server.endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        snapshot = lay(server.cache, contents("config.json", INDEX, SHARDS[0]))
        empty, partial, commit = server.find(("org/other", None, True), (REPO, None, True), (REPO, SHA, True))
        assert f"org/other, revision main: found no download from {server.endpoint} (Connect" in empty
        assert f"nothing of it in the cache {server.cache};" in empty
        for said in (partial, commit):
            assert f"no {SHARDS[1]} in the cache {server.cache};" in said
            assert command(said) == ["hf", "download", REPO, "--revision", SHA, *includes(SHARDS[1])]
        (snapshot / SHARDS[1]).write_bytes(b"weights")
        assert server.find_one() == str(snapshot)


def test_the_commands_that_it_proposes(server: Hub) -> None:
    """`hf` run as a problem says makes the next look at the cache succeed."""
    server.repos[REPO] = contents(*SMALL, INDEX, *SHARDS, *OTHERS.split())
    hf = [sys.executable, "-P", "-m", "huggingface_hub.cli.hf"]
    for _ in range(2):
        said = server.find_one(download=False)
        subprocess.run(hf + command(said)[1:], env=server.environment, check=True, capture_output=True)
        found = Path(server.find_one(download=False))
        assert found.name == SHA
        (found / SHARDS[0]).resolve().unlink()  # the second time it is of one shard
        (found / SHARDS[0]).unlink()
    assert "pytorch_model.bin" not in server.fetched()
