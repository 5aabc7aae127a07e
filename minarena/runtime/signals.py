"""Being asked to stop: SIGTERM (a spot instance that is taken away, a batch system) and Ctrl-C.

    with stop_requests() as numbers:
        for step in steps:
            ...                      # one step and its record
            if numbers: break        # [15] after SIGTERM, [2] after Ctrl-C: save, and exit with 128 + that

What it does not do: stop anything by itself, or count outside of the block, where both act as ever.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def catch_stop_signals(heard: bool = True) -> Iterator[list[int]]:
    """Gives a list that is empty until a signal comes; in the block a signal only adds its number to it.

    A Ctrl-C after the first signal ends the process at once. A second SIGTERM does not: `timeout` and some
    batch systems send two in a row. What was ignored before (nohup, a job in the background) stays ignored.
    heard: whether a line says so; of several ranks one does.
    """
    numbers = []

    def note(number: int, _frame) -> None:
        if heard and not numbers:  # not print(): a signal may come in the middle of another print
            os.write(2, b"\nStopping after this step, which is saved first; Ctrl-C stops at once.\n")
        numbers.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    before = {n: h for n in (signal.SIGTERM, signal.SIGINT) if (h := signal.getsignal(n)) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, note)
    try:
        yield numbers
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
