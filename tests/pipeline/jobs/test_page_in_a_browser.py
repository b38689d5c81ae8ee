"""The page of a daemon in a browser, during a night."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

from tests.support import checkpoints
from tests.support.browser import browser, needed
from tests.support.commands import COMMAND
from tests.support.witness import Witness, wait

SECONDS = 60.0


@needed
def test_a_page_shows_what_runs_waits_ended_and_comes_next(tmp_path: Path) -> None:
    witness = Witness(tmp_path)
    checkpoints.write(tmp_path / "a<b>", checkpoints.LLAMA)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    limits = '["1GiB", "2GiB", "3GiB", "4GiB"]'
    (tmp_path / "batch.toml").write_text(
        f'[[matrix]]\nmodel_dir = "a<b>"\nmemory_limit = {limits}\noutput_dir = "o-{{memory_limit}}"\n'
        '[[job]]\nmodel_dir = "a<b>"\noutput_dir = "o-3"\ntp_size = 3\n'
    )
    (tmp_path / "schedule.toml").write_text(
        f'max_jobs = 2\n[http]\nlisten = "127.0.0.1:{port}"\n'
        '[[cron]]\nname = "nightly"\nat = "30 2 * * *"\nfiles = ["batch.toml"]\n'
        '[[interval]]\nname = "often"\nevery_seconds = 3600\nfiles = ["batch.toml"]\n'
    )
    witness.hold("o-2GiB", "middle-o-3GiB")
    command = [*COMMAND, "serve", str(tmp_path / "schedule.toml"), "--store", str(tmp_path / "history.db")]
    with subprocess.Popen(command, env=witness.environment) as daemon, browser() as tab:
        wait(lambda: witness.pids("middle", "o-3GiB"), SECONDS, witness.log)
        tab.open(f"http://127.0.0.1:{port}/headrace")
        text = tab.wait(lambda text: "Ended" in text and "o-4GiB" in text)
        assert "num_attention_heads 8; expected one of: 1, 2, 4, 8" in text, "the whole message"
        assert "nightly: 2" in text
        assert "02:30:00" in text
        for title, name in (("Running", "o-2GiB"), ("Waiting", "o-4GiB"), ("Ended", "o-1GiB")):
            section = f"[...document.querySelectorAll('section')].find(each => each.innerText.startsWith('{title}')).innerText"
            assert name in str(tab.evaluate(section)), title
        witness.let("o-2GiB", "middle-o-3GiB")
        tab.wait(lambda text: "Running none" in text and "Waiting none" in text)
        assert tab.evaluate("document.title") == "headrace"
        assert tab.logged == []
        daemon.terminate()
        assert daemon.wait() == 0
