"""Run the command line in a process that never outlives its parent: `python -m pipeline.cli.child convert JOBFILE`.

The child starts to work only when it reads its parent's pid from standard input, which the parent writes once the jobs' store has
recorded the child's pid. A parent that is killed before that leaves no child at work. When the parent ends, standard input is
closed, and the child kills itself at once; a later run resumes the conversion. On Linux the kernel also kills it, even while it is
stopped (SIGSTOP).
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from pipeline.jobs.parent import end_with_parent, word


def main() -> None:
    """Wait for the parent's pid on standard input, then run the command line. Exits with 3 where the parent is gone."""
    end_with_parent()
    # If the parent wrote its pid and died before the call above, this process has another parent now.
    if os.read(0, 64) != word(os.getppid()):
        sys.exit(3)
    threading.Thread(target=_follow, name="headrace-parent", daemon=True).start()
    # Imported only now, so that a child without a parent does no work.
    from pipeline.cli import main as command_line

    command_line()


def _follow() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
