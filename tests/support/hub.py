"""A cache of huggingface_hub laid out by hand, and a server that speaks as much of the Hub's API as the client asks for."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

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


def command(said: str) -> list[str]:
    """The words of the command that a problem proposes."""
    return shlex.split(said.partition(" directory with: ")[2].partition(" (or ")[0])


def includes(*names: str) -> list[str]:
    return [word for name in names for word in ("--include", name)]


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
    variables: dict[str, str] = field(default_factory=dict)  # of the clients' environment, over those below
    authorizations: set[str | None] = field(default_factory=set)  # what requests came with

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
            **self.variables,
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
        self.hub.authorizations.add(self.headers.get("Authorization"))
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


@contextmanager
def serving(home: Path) -> Iterator[Hub]:
    """A Hub while it serves, and its home, which is that of the clients too."""
    result = Hub(home)
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
