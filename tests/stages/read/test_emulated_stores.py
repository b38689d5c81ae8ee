"""Checkpoints in Google's and Microsoft's object stores, as their emulators play them: the bytes of the directory itself."""

from __future__ import annotations

import base64
import datetime
import hmac
import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from urllib.request import Request, urlopen

import obstore
import pytest

from pipeline import convert
from tests.pipeline.watching.web import free_port
from tests.support import checkpoints
from tests.support.directories import contents
from tests.support.s3_server import forget_clients
from tests.support.witness import wait

pytestmark = pytest.mark.nightly
CONFIG = {**checkpoints.LLAMA, "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 1024}
# The account that every Azurite has, by its documentation.
ACCOUNT, KEY = "devstoreaccount1", "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@pytest.fixture(autouse=True)
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkpoints.write(tmp_path / "model", CONFIG)
    forget_clients()
    yield tmp_path / "model"
    forget_clients()


@contextmanager
def running(program: str, remedy: str, port: int, *words: str) -> Iterator[None]:
    """An emulator in a process, listening at a port."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"no {program} here: {remedy}")
    process = subprocess.Popen([found, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def listening() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait(listening, 30)
        yield
    finally:
        process.kill()
        process.wait()


def same(tmp_path: Path, url: str, model: Path) -> None:
    for name, source in (("far", url), ("near", model)):
        convert(model_dir=source, output_dir=tmp_path / name, tp_size=2, scheduler="threads")
    assert contents(tmp_path / "far") == contents(tmp_path / "near")


def test_microsofts(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    for name, value in {
        "AZURE_STORAGE_USE_EMULATOR": "true",
        "AZURITE_BLOB_STORAGE_URL": f"http://127.0.0.1:{port}",
        "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
        "AZURE_STORAGE_ACCOUNT_KEY": KEY,
    }.items():
        monkeypatch.setenv(name, value)
    words = ("--silent", "--inMemoryPersistence", "--skipApiVersionCheck", "--blobPort", str(port))
    with running("azurite-blob", "npm install -g azurite", port, *words):
        _make_container(port)
        store = obstore.store.from_url("az://box/models/m")
        for path in model.iterdir():
            obstore.put(store, path.name, path.read_bytes())
        same(tmp_path, "az://box/models/m", model)


def _make_container(port: int) -> None:
    now, kind = f"{datetime.datetime.now(datetime.UTC):%a, %d %b %Y %H:%M:%S GMT}", "application/octet-stream"
    version, place = "2021-08-06", f"{ACCOUNT}/box"
    text = f"PUT\n\n\n\n\n{kind}\n\n\n\n\n\n\nx-ms-date:{now}\nx-ms-version:{version}\n/{ACCOUNT}/{place}\nrestype:container"
    signature = base64.b64encode(hmac.new(base64.b64decode(KEY), text.encode(), sha256).digest()).decode()
    headers = {"x-ms-date": now, "x-ms-version": version, "Content-Type": kind, "Authorization": f"SharedKey {ACCOUNT}:{signature}"}
    urlopen(Request(f"http://127.0.0.1:{port}/{place}?restype=container", b"", headers, method="PUT")).close()


def test_googles(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    nobody = {"gcs_base_url": url, "disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(nobody))
    words = ("-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-public-host", f"127.0.0.1:{port}", "-backend", "memory")
    with running("fake-gcs-server", "one file of its releases on GitHub", port, *words):
        kind = {"Content-Type": "application/json"}
        urlopen(Request(f"{url}/storage/v1/b?project=p", json.dumps({"name": "box"}).encode(), kind)).close()
        for path in model.iterdir():
            place = f"{url}/upload/storage/v1/b/box/o?uploadType=media&name=models/m/{path.name}"
            urlopen(Request(place, path.read_bytes(), {"Content-Type": "application/octet-stream"})).close()
        same(tmp_path, "gs://box/models/m", model)
