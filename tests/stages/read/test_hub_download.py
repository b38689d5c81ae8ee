"""Downloads from a server that plays the Hub, in processes of their own: huggingface_hub reads the environment at its import."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import checkpoints, gguf_files
from tests.support.hub import INDEX, OLD, REPO, SHA, SHARDS, SMALL, Handler, Hub, command, contents, includes, lay, serving


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Hub]:
    with serving(tmp_path / "home") as hub:
        yield hub


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
        "org/other": contents("README.md", "mmproj-name-f16.gguf", "model.onnx"),
        "org/bare": contents("model.safetensors"),
        "org/void": {},
        "org/torn": contents("config.json", INDEX, SHARDS[0]),
    }
    other, bare, void, torn = server.find(*((f"org/{name}", None, True) for name in ("other", "bare", "void", "torn")))
    assert "found README.md, mmproj-name-f16.gguf, model.onnx; expected config.json and weights" in other
    assert "`hf download org/other FILE --local-dir DIRECTORY`" in other
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


GGUFS = ("README.md", "config.json", "name-Q8_0.gguf", "name-Q4_K_M.gguf", "mmproj-name-F16.gguf", "imatrix_unsloth.gguf")
PARTS = tuple(f"BF16/name-BF16-0000{n}-of-00003.gguf" for n in (1, 2, 3))


def test_gguf_models_of_a_repository_are_told_by_the_end_of_their_name(server: Hub) -> None:
    """As people name them to llama.cpp; one model of a repository needs no tag."""
    server.repos["org/many"] = contents(*GGUFS, *PARTS)
    server.repos["org/one"] = contents("README.md", "tokenizer.json", *PARTS)
    one, four, parts, again = server.find(
        ("org/one", None, True), ("org/many:Q4_K_M", None, True), ("org/many:bf16", None, True), ("org/many:BF16", SHA, False)
    )
    assert one == f"{server.cache}/models--org--one/snapshots/{SHA}/{PARTS[0]}"
    assert four == f"{server.cache}/models--org--many/snapshots/{SHA}/name-Q4_K_M.gguf"
    assert parts == again == f"{server.cache}/models--org--many/snapshots/{SHA}/{PARTS[0]}"
    assert server.fetched() == sorted([*PARTS, *PARTS, "name-Q4_K_M.gguf"])


def test_several_gguf_models_without_a_tag_and_a_tag_of_none(server: Hub) -> None:
    """Also where one of them is in the cache: which is there says nothing of which is meant."""
    server.repos[REPO] = contents(*GGUFS)
    _, untagged, cached, other = server.find(
        (f"{REPO}:q8_0", None, True), (REPO, None, True), (REPO, None, False), (f"{REPO}:Q5_K_M", None, True)
    )
    for said, expected in ((untagged, "one of them"), (other, "one that ends in Q5_K_M")):
        assert f"found GGUF models: name-Q4_K_M, name-Q8_0; expected {expected}. Name one by the end of its name, such as" in said
        assert f"--model_dir {REPO}:Q4_K_M" in said
    assert "no weights of it in the cache" in cached
    assert server.fetched() == ["name-Q8_0.gguf"]


def test_a_part_of_a_gguf_model_that_the_cache_lacks(server: Hub) -> None:
    server.repos[REPO] = contents(*PARTS)
    lay(server.cache, contents(PARTS[0], PARTS[2]))
    said, found = server.find((f"{REPO}:BF16", None, False), (f"{REPO}:BF16", None, True))
    assert f"{REPO}:BF16, revision main: found no {PARTS[1]} in the cache" in said
    assert command(said)[5:] == includes(PARTS[1])
    assert found.endswith(PARTS[0])
    assert server.fetched() == [PARTS[1]]


def test_a_tagged_model_is_planned_converted_and_verified(server: Hub, tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "model.gguf", checkpoints.LLAMA, checkpoints.values(checkpoints.LLAMA), "Q8_0")
    server.repos[REPO] = {**contents(*GGUFS), "name-Q8_0.gguf": (tmp_path / "model.gguf").read_bytes()}

    def headrace(*words: str) -> subprocess.CompletedProcess[str]:
        run = [sys.executable, "-P", "-c", "from pipeline.cli import main; main()", *words]
        return subprocess.run(run, env=server.environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    job = ("--model_dir", f"{REPO}:q8_0", "--output_dir", "ranks", "--tp_size", "2")
    assert "found nothing of it in the cache" in headrace("plan", *job).stderr
    assert server.log == []
    assert headrace("convert", *job).returncode == 0
    assert server.fetched() == ["name-Q8_0.gguf"]
    assert headrace("plan", *job).returncode == 0
    assert headrace("verify", "ranks", "--source", f"{REPO}:q8_0").returncode == 0


@pytest.mark.parametrize("where", ["HF_TOKEN", "file", "nowhere"])
def test_the_token_is_the_one_that_people_are_logged_in_with(server: Hub, where: str) -> None:
    server.repos[REPO] = contents("config.json", "model.safetensors")
    if where == "HF_TOKEN":
        server.variables["HF_TOKEN"] = "hf_of_the_environment"
    elif where == "file":
        server.home.mkdir()
        (server.home / "token").write_text("hf_of_the_login\n")
    assert server.find_one().endswith(SHA)
    token = {"HF_TOKEN": "Bearer hf_of_the_environment", "file": "Bearer hf_of_the_login", "nowhere": None}[where]
    assert server.authorizations == {token}


@pytest.mark.parametrize("disabled", ["0", "1"])
def test_the_progress_bars_are_the_clients_own(server: Hub, disabled: str) -> None:
    server.repos[REPO] = contents("config.json", INDEX, *SHARDS)
    server.variables["HF_HUB_DISABLE_PROGRESS_BARS"] = disabled
    with server.start((REPO, None, True)) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert ("100%" in err) is (disabled == "0")


def test_offline_nothing_is_asked_for(server: Hub) -> None:
    server.repos[REPO] = contents("config.json", INDEX, *SHARDS)
    lay(server.cache, contents("config.json", INDEX, SHARDS[0]))
    server.variables["HF_HUB_OFFLINE"] = "1"
    assert f"found HF_HUB_OFFLINE set and no {SHARDS[1]} in the cache" in server.find_one()
    assert server.log == []


def test_a_name_that_is_none_of_the_hubs(server: Hub) -> None:
    bad, cached = server.find(("org/na--me", None, True), ("org/na..me", None, False))
    assert "org/na--me, revision main: found no download from" in bad
    assert "HFValidationError" in bad
    assert "org/na..me, revision main: found nothing of it in the cache" in cached
    assert server.log == []


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
