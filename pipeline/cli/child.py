"""`python -m pipeline.cli.child convert JOBFILE --log_format json`: the command line, in a process that never outlives its parent.

It begins when the parent says so, with its pid, once the store knows the child's: a parent that was killed before leaves nothing
that works. Standard input ends with the parent, and so does the child: at once, as after `kill -9`, from which a conversion goes on
where it was. On Linux the kernel sees to that too, for a process that is stopped.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from pipeline.jobs.parent import end_with_parent, word


def main() -> None:
    """Wait for the parent's word, then be the command line."""
    end_with_parent()
    # A parent that had said it and was gone before that call is not the parent any more.
    if os.read(0, 64) != word(os.getppid()):
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
