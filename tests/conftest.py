"""What all tests share."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.places import DATA
from tests.support.quantized_checkpoints import VARIANTS

# A change is judged by the same examples each time, people by new ones, and a night looks for those that are rare.
settings.register_profile("default", deadline=None, print_blob=True, max_examples=50)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.register_profile("nightly", settings.get_profile("default"), max_examples=1000)
settings.load_profile("ci" if os.environ.get("CI") else "default")

# A shell's background jobs ignore Ctrl-C, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Tests make many small files, and a virtual disk may take a millisecond for each: by day they are in memory, where that has room
# for the largest models of two tests at once, and runs the scripts that some tests write.
MEMORY, ROOM_BYTES = Path("/dev/shm"), 8 << 30


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "not nightly" and MEMORY.is_dir() and not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC:
        available = re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())
        if available and min(int(available[1]) << 10, shutil.disk_usage(MEMORY).free) >= ROOM_BYTES:
            os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


# Else each of the hundreds of processes that tests start would compile all modules again, as no installed command does.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Nor need they threads of NumPy's, which wait for work at full speed for a tenth of a second.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@pytest.fixture
def data() -> Path:
    return DATA


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    """Threads that share the work on matrices as small as those of tests only wait for one another."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests in this process need not survive a power cut; those that kill a process run it as it is."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(os, "fdatasync", lambda _: None)


# Sweeps over all packed formats: by day they try one or two forms of each, and by night the others, too.
SWEEPS = (
    "end_to_end/test_cache_in_formats.py",
    "end_to_end/test_dequantized_formats.py",
    "end_to_end/test_fused_and_mixed_formats.py",
    "end_to_end/test_kept_codes.py",
    "end_to_end/test_memory_quantized.py",
    "end_to_end/test_numbers_to_codes.py",
    "end_to_end/test_packed_experts.py",
    "end_to_end/test_quantized_runs.py",
    "end_to_end/test_requantize.py",
    "pipeline/planning/test_auto_dtype.py",
    "pipeline/planning/bad_input/test_hostile_values.py",
    "pipeline/reporting/test_verify_formats.py",
    "stages/test_quantize.py",
)


# Where a test is a run, of a process or of all stages: by day every second of its parameters is tried, by night all. Goldens and
# families against transformers, which say which model comes out, are tried whole.
HALVED = tuple(
    f"/tests/{name}"
    for name in (
        *("end_to_end/", "stages/read/", "stages/test_quantize.py", "stages/verify/contract/"),
        *(f"pipeline/{name}/" for name in ("calibration", "engine", "jobs", "reporting", "run", "sinks", "watching")),
    )
)
WHOLE = ("/test_family_forward.py",)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen: Counter[str] = Counter()
    for item in items:
        given = item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
        place = item.path.as_posix()
        if place.endswith(SWEEPS) and any(isinstance(each, str) and each in VARIANTS for each in given):
            item.add_marker("nightly")
        if given and any(each in place for each in HALVED) and not place.endswith(WHOLE) and not item.get_closest_marker("nightly"):
            name = item.nodeid.partition("[")[0]
            if seen[name] % 2:
                item.add_marker("nightly")
            seen[name] += 1
