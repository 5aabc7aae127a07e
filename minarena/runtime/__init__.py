"""A job: what surrounds a computation that runs for hours, on one machine or on several.

    console.py    what a person reads on stderr, and the one line in which a command ends
    interrupt.py  Ctrl-C before there is a command: while its libraries are imported
    warn.py       what is odd about the rows, said before anything slow
    memory.py     out of GPU memory: the same work again in smaller pieces
    signals.py    SIGTERM and Ctrl-C: finish the step, save, stop
    launch.py     the ranks of a torchrun job start together and end together
    track.py      --log-to: the log, also in TensorBoard or Weights & Biases

Imports the method (the files directly in minarena/), and no other wing.
"""
