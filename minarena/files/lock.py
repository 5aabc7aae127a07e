"""One command at a time in a folder: a lock that ends with the process that holds it, however that dies.

    lock_folder("runs/ab")       ValueError where another process holds it
    unlock_folder("runs/ab")     at the end of the work

The lock is the operating system's (flock) on the folder itself, so no file is left behind. What it does not
do: lock where the system or the disk has no such locks (a line says so), or stop two threads of one process.
"""

import os
from pathlib import Path

from minarena.runtime.console import say

HELD: dict[Path, int] = {}  # resolved folder -> its open handle


def lock_folder(folder: str | Path) -> None:
    """Hold `folder` until unlock_folder or the end of this process; a process may ask for it again."""
    unlock_folder(folder)
    try:
        import fcntl  # there is none on Windows

        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise
    except BlockingIOError as error:
        remedy = "wait for its end, or give another name"
        raise ValueError(f"{folder} is in use by another command: {remedy}") from error
    except (ImportError, OSError):
        say(f"{folder} cannot be locked here: take care that no other command uses it meanwhile")
    else:
        HELD[Path(folder).resolve()] = handle


def unlock_folder(folder: str | Path) -> None:
    handle = HELD.pop(Path(folder).resolve(), None)
    if handle is not None:
        os.close(handle)
