"""Stop cleanly on SIGTERM (spot instance reclaimed, batch system) and Ctrl-C.

    with catch_stop_signals() as numbers:
        for step in steps:
            ...                      # one step and its record
            if numbers: break        # [15] after SIGTERM, [2] after Ctrl-C: save, exit with 128 + the number

What it does not do: stop anything by itself, or change what a signal does outside the block.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def catch_stop_signals(announce: bool = True) -> Iterator[list[int]]:
    """Yields a list that is empty until a signal comes; inside the block a signal only adds its number to it.

    A Ctrl-C after the first signal ends the process at once. A second SIGTERM does not: `timeout` and some
    batch systems send two in a row. A signal that was ignored before (nohup, a job in the background) stays
    ignored. Outside the main thread Python allows no handlers: both signals keep their usual effect.
    announce: whether a line says so; of several ranks one does.
    """
    numbers, handlers = [], {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    caught = [number for number, handler in handlers.items() if handler != signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():
        yield numbers
        return

    def note(number: int, _frame) -> None:
        if announce and not numbers:  # not print(): a signal may come in the middle of another print
            os.write(2, b"\nStopping after this step, which is saved first; Ctrl-C stops at once.\n")
        numbers.append(number)
        if signal.SIGINT in caught:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    for number in caught:
        signal.signal(number, note)
    try:
        yield numbers
    finally:
        for number in caught:
            signal.signal(number, handlers[number])
