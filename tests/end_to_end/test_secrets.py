"""Credentials go to the store and nowhere else: nothing that is printed, written, served or recorded has one in it."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest

import stages.read.object_store
from pipeline import convert
from pipeline.errors import BadInput, SourceChanged, WriteFailed
from pipeline.planning.job import make_job
from tests.pipeline.watching.web import fetch, free_port
from tests.support import checkpoints
from tests.support.commands import COMMAND, headrace
from tests.support.directories import contents
from tests.support.range_server import Served, range_server
from tests.support.s3_server import forget_clients
from tests.support.witness import wait

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIASHOWNTONOBODY123",
    "AWS_SECRET_ACCESS_KEY": "s3-secret/shown+to=nobody",
    "AWS_SESSION_TOKEN": "session-token-shown-to-nobody",
    "HF_TOKEN": "hf_showntonobody",
    "AZURE_STORAGE_ACCOUNT_KEY": "YXp1cmUtc2hvd24tdG8tbm9ib2R5",
    "GOOGLE_SERVICE_ACCOUNT_KEY": '{"private_key": "google-shown-to-nobody"}',
}
IN_URLS = ("user-shown-to-nobody", "password-shown-to-nobody")
# A signature is made of the key, and lets whoever has it do the same again.
FORBIDDEN = [*SECRETS.values(), *IN_URLS, "google-shown-to-nobody", "AWS4-HMAC-SHA256", "X-Amz-Signature"]
CONFIG = {**checkpoints.LLAMA, "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 512}


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A store with a model at s3://bucket/m, and one that it lets nobody read."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setattr(stages.read.object_store, "ATTEMPTS", 2)
    monkeypatch.setattr(stages.read.object_store, "FIRST_PAUSE_SECONDS", 0.01)
    checkpoints.write(tmp_path / "served/bucket/m", CONFIG)
    with range_server(tmp_path / "served") as served:
        host = urlsplit(served.url).netloc
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{':'.join(IN_URLS)}@{host}")
        forget_clients()
        yield served
    forget_clients()


def clean(where: str, text: str | bytes) -> None:
    """No secret is in a text, as it is, in a URL, or in JSON."""
    content = text.encode() if isinstance(text, str) else text
    for secret in FORBIDDEN:
        for form in {secret, quote(secret), quote(secret, safe=""), json.dumps(secret)[1:-1]}:
            assert form.encode() not in content, f"{secret} in {where}"


def all_clean(place: Path, *ours: str) -> int:
    """No secret is in a file below a directory, nor in its name, but for those that the test wrote; returns how many there are."""
    files = [path for path in place.rglob("*") if path.is_file() and path.name not in ours]
    for path in files:
        clean(str(path), path.read_bytes())
        clean("a name", str(path))
    return len(files)


def said(*words: object, code: int = 0) -> str:
    """What a command printed, which is clean; it ends with `code`."""
    ran = headrace(*words)
    assert ran.code == code, ran
    clean(f"what {words[0]} printed", ran.out + ran.err)
    return ran.out + ran.err


@pytest.mark.usefixtures("bucket")
def test_what_commands_print_and_write(tmp_path: Path) -> None:
    source, out = ("--model_dir", "s3://bucket/m"), ("--output_dir", tmp_path / "out")
    assert "s3://bucket/m" in said("inspect", "s3://bucket/m") + said("plan", *source, *out)
    assert json.loads(said("plan", *source, *out, "--json"))
    said("plan", *source, *out, "--graph", tmp_path / "graph.svg")
    assert '"event": "finished"' in said("convert", *source, *out, "--scheduler", "threads", "--log_format", "json")
    convert(model_dir=tmp_path / "served/bucket/m", output_dir=tmp_path / "near", scheduler="threads")
    assert contents(tmp_path / "out") == contents(tmp_path / "near")
    assert json.loads((tmp_path / "out/headrace.json").read_text())["source"]["path"] == "s3://bucket/m"
    said("verify", tmp_path / "out", "--source", "s3://bucket/m")
    said("report", tmp_path / "out", "--output", tmp_path / "report.html")
    said("convert", *source, *out, "--scheduler", "threads")
    # The requests had what they must not show.
    assert all_clean(tmp_path) > 8


@pytest.mark.parametrize("status", [403, 404, *(pytest.param(n, marks=pytest.mark.nightly) for n in (400, 401, 500))])
def test_errors_of_a_server_that_repeats_what_it_is_asked(tmp_path: Path, bucket: Served, status: int) -> None:
    source, out = ("--model_dir", "s3://bucket/m"), ("--output_dir", tmp_path / "out")
    said("plan", *source, *out)
    bucket.echo = status
    assert "s3://bucket/m" in said("plan", *source, *out, code=2)
    said("inspect", "s3://bucket/m", code=2)
    bucket.echo = 0

    class Begun:
        def started(self, *_: object) -> None:
            bucket.echo = status

        def advanced(self, *_: object) -> None: ...

        def finished(self) -> None: ...

    expected = SourceChanged if status == 404 else WriteFailed
    with pytest.raises(expected, match="s3://bucket/m") as caught:
        convert(model_dir="s3://bucket/m", output_dir=tmp_path / "out", scheduler="threads", listener=Begun())
    clean("the error", f"{caught.value} {caught.value!r}")
    all_clean(tmp_path)


USER, PASSWORD = IN_URLS
WITH = f"//{USER}:{PASSWORD}@host/m"


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize(
    "words",
    [
        ("--model_dir", f"s3:{WITH}"),
        ("--model_dir", f"https://:{PASSWORD}@host/m"),
        ("--model_dir", f"https://host/m?X-Amz-Signature={PASSWORD}"),
        ("--model_dir", f"gs:{WITH}"),
        ("--model_dir", f"https://[{PASSWORD}/m"),
        ("--model_dir", "MODEL", "--scratch", f"s3:{WITH}"),
        ("--model_dir", "MODEL", "--scratch", f"s3:{WITH}", "--scratch_after", "read"),
    ],
)
def test_addresses_with_secrets_are_refused_and_not_repeated(tmp_path: Path, words: tuple[str, ...]) -> None:
    given = [str(tmp_path / "served/bucket/m") if word == "MODEL" else word for word in words]
    for command in ("plan", "convert"):
        assert "a URL with a secret in it" in said(command, *given, "--output_dir", tmp_path / "out", code=2)
    all_clean(tmp_path)


@pytest.mark.parametrize("url", [f"s3:{WITH}", f"s3://bucket/m?X-Amz-Signature={PASSWORD}", f"gs://host/m#{PASSWORD}"])
@pytest.mark.parametrize("command", ["verify", "report", "unlock", "generate"])
def test_outputs_at_addresses_with_secrets_neither(command: str, url: str) -> None:
    more = ("--prompt", "a") if command == "generate" else ()
    assert "a URL without a user, password or query" in said(command, url, *more, code=2)


@pytest.mark.usefixtures("bucket")
def test_tables_of_clusters_and_watches(tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    options = f'hosts = ["127.0.0.1"]\nconnect_options = {{ password = "{PASSWORD}" }}'
    for table in (f'class = "none.SSHCluster"\n{options}', f'class = "distributed.LocalCluster"\n{options}', options):
        job.write_text(f'model_dir = "served/bucket/m"\noutput_dir = "out"\n[cluster]\n{table}\n')
        said("convert", job, code=2)
    job.write_text(f'model_dir = "served/bucket/m"\noutput_dir = "out"\ncluster = "{PASSWORD}"\n')
    said("plan", job, code=2)
    job.write_text(f'model_dir = "served/bucket/m"\noutput_dir = "out"\n[cluster]\nclass = "distributed.LocalCluster"\n{options}\n')
    said("plan", job)
    said("plan", job, "--json")
    with pytest.raises(BadInput) as caught:
        make_job({"model_dir": "m", "output_dir": "o", "cluster": {"class": 3, "password": PASSWORD}})
    clean("a refusal", str(caught.value))
    (tmp_path / "schedule.toml").write_text(f"""
[[watch]]
name = "bucket"
path = "s3:{WITH}"
job = {{ output_dir = "out-{{model}}" }}
""")
    assert "a URL with a secret in it" in said("serve", tmp_path / "schedule.toml", "--store", tmp_path / "history.db", code=2)
    all_clean(tmp_path, "job.toml", "schedule.toml")


@pytest.mark.nightly
@pytest.mark.usefixtures("bucket")
def test_batches_the_daemon_its_pages_and_its_history(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "served/bucket/n", CONFIG, seed=1)
    for name, source in (("m", "s3://bucket/m"), ("missing", "s3://bucket/nothing"), ("asked", f"s3:{WITH}")):
        (tmp_path / f"{name}.toml").write_text(f'model_dir = "{source}"\noutput_dir = "out-{name}"\n')
    (tmp_path / "batch.toml").write_text('files = ["m.toml", "missing.toml"]\n')
    for more in ((), ("--json",), ("--log_format", "json")):
        said("batch", tmp_path / "batch.toml", *more, "--attempts", 1, code=2)
    # The file with a secret in it is refused, whatever asks for it.
    (tmp_path / "batch.toml").write_text('files = ["asked.toml"]\n')
    said("batch", tmp_path / "batch.toml", code=2)
    port = free_port()
    (tmp_path / "schedule.toml").write_text(f"""
[http]
listen = "127.0.0.1:{port}"
[retry]
attempts = 1
[[interval]]
name = "all"
every_seconds = 3600
files = ["m.toml", "n.toml", "missing.toml"]
""")
    (tmp_path / "n.toml").write_text('model_dir = "s3://bucket/n"\noutput_dir = "out-n"\n')
    store = tmp_path / "history.db"
    command = [*COMMAND, "serve", str(tmp_path / "schedule.toml"), "--store", str(store), "--log_format", "json"]
    with (tmp_path / "daemon.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as daemon:
        try:
            page = f"http://127.0.0.1:{port}"
            wait(lambda: (tmp_path / "out-n/config.json").exists(), 90, lambda: (tmp_path / "daemon.log").read_text())
            wait(lambda: "failed" in (listed := headrace("jobs", "--store", store).out) or "refused" in listed, 60)
            for path in ("/", "/metrics", *set(re.findall(r'href="(/[^"]+)"', fetch(page)[1]))):
                status, text = fetch(f"{page}{path}")
                assert (path, status) == (path, 200)
                clean(path, text)
            said("jobs", "--store", store)
            said("jobs", "--store", store, "--json")
        finally:
            daemon.terminate()
            daemon.wait()
    assert all_clean(tmp_path, "asked.toml") > 10
