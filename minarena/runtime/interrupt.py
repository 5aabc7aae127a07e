"""Ctrl-C while a command imports its libraries, which takes seconds: one line, as later, and no traceback.

    one_line_on_ctrl_c("train.py")      before the first slow import of a script

So this file imports nothing slow itself. What it does not do: catch Ctrl-C once the command runs
(console.run_command does).
"""

import os
import sys


def one_line_on_ctrl_c(name: str) -> None:
    """From now on a KeyboardInterrupt that nothing catches ends this process with a line and status 130."""

    def hook(kind, error, trace) -> None:
        if kind is not KeyboardInterrupt:
            return sys.__excepthook__(kind, error, trace)
        print(f"\n{name}: stopped; nothing was written", file=sys.stderr, flush=True)
        os._exit(130)  # Python would end by the signal itself, which is not run_command's status

    sys.excepthook = hook
