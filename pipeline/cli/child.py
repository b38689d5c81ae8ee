"""Run the command line in a process that never outlives its parent: `python -m pipeline.cli.child PARENT convert JOBFILE`.

On Linux the kernel kills it when the thread that made it ends, even while it is stopped (SIGSTOP). Everywhere its standard input is
a pipe that closes when the parent is gone, which ends it at once; a later run resumes the conversion.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Tie this process to its parent, then run the command line. Exits with 3 where the parent is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(sys.argv.pop(1)):
        sys.exit(3)
    threading.Thread(target=_follow, name="headrace-parent", daemon=True).start()
    from pipeline.cli import main as command_line

    command_line()


def _follow() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
