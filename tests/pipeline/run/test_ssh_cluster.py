"""A cluster that a job's table starts over SSH: on this machine, by an sshd with keys of its own."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import convert
from tests.support import checkpoints
from tests.support.commands import headrace
from tests.support.directories import contents
from tests.support.places import ROOT
from tests.support.witness import wait

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
pytestmark = [pytest.mark.nightly, pytest.mark.skipif(SSHD is None, reason="no sshd here: apt-get install openssh-server")]


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[str]:
    """How to reach an sshd of our own, as the options of a [cluster] table."""
    pytest.importorskip("asyncssh")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "known").write_text(f"[127.0.0.1]:{port} {(tmp_path / 'host.pub').read_text()}")
    settings = [
        f"Port {port}", "ListenAddress 127.0.0.1", f"HostKey {tmp_path}/host", f"AuthorizedKeysFile {tmp_path}/user.pub",
        "StrictModes no", "UsePAM no", "PasswordAuthentication no", f"PidFile {tmp_path}/pid", f"SetEnv PYTHONPATH={ROOT}",
    ]  # fmt: skip
    (tmp_path / "sshd_config").write_text("\n".join(settings) + "\n")
    if not os.geteuid():  # where a daemon of root's gives up its rights
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    daemon = subprocess.Popen([str(SSHD), "-D", "-e", "-f", str(tmp_path / "sshd_config")], stderr=subprocess.DEVNULL)

    def listening() -> bool:
        assert daemon.poll() is None
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait(listening, 20)
    keys = f'client_keys = ["{tmp_path}/user"], known_hosts = "{tmp_path}/known"'
    yield f'connect_options = {{ port = {port}, username = "{getpass.getuser()}", {keys} }}'
    daemon.terminate()
    daemon.wait()


def test_a_job_runs_on_the_machines_that_its_table_reaches_by_ssh(tmp_path: Path, connection: str) -> None:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    (tmp_path / "job.toml").write_text(f'''
model_dir = "model"
output_dir = "out"
tp_size = 2
[cluster]
class = "dask.distributed.SSHCluster"
hosts = ["127.0.0.1", "127.0.0.1", "127.0.0.1"]
remote_python = "{sys.executable}"
scheduler_options = {{ port = 0, dashboard = false }}
worker_options = {{ nthreads = 1, local_directory = "{tmp_path}/dask" }}
{connection}
''')
    ran = headrace("convert", tmp_path / "job.toml")
    assert ran.code == 0, ran.err
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "alone", tp_size=2, scheduler="threads")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_a_host_that_lets_nobody_in_is_a_refusal_that_says_so(tmp_path: Path, connection: str) -> None:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    refused = connection.replace(f'"{tmp_path}/user"', f'"{tmp_path}/host"')
    table = f'class = "dask.distributed.SSHCluster"\nhosts = ["127.0.0.1", "127.0.0.1"]\n{refused}'
    (tmp_path / "job.toml").write_text(f'model_dir = "model"\noutput_dir = "out"\n[cluster]\n{table}\n')
    ran = headrace("convert", tmp_path / "job.toml")
    assert (ran.code, "Permission denied for user" in ran.err) == (2, True), ran.err
    assert not (tmp_path / "out").exists()
