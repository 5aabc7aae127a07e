"""Start the ranks of a torchrun job together, and end them together: if one fails, all exit, with one error.

    launch(command)      command() in this process, as one rank of several under torchrun

torchrun alone is not enough. It ends the processes of its own machine when one of them fails, by a SIGTERM,
which here means "save and stop", and after 30 s by force. It knows nothing of other machines. And an
all-reduce in which one rank is gone may wait for ever. So each rank holds a connection to the rank before it
and ends when the connection breaks: a process that dies of whatever cause ends the others in a moment. What
it does not do: notice a machine that loses its power (NCCL's timeout does, after 10 minutes).
"""

import contextlib
import os
import shlex
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as ranks

from minarena.dist import this_world


def launch(command: Callable, *arguments) -> None:
    """Call command(*arguments), under torchrun as one rank of several."""
    try:
        world = this_world()
    except ValueError as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from error
    if world.size > 1:
        run_rank(command, arguments, world.rank, world.size)
    else:
        command(*arguments)


def run_rank(command: Callable, arguments: tuple, rank: int, size: int) -> None:
    """Call command(*arguments) as one rank. Only rank 0 prints, except errors. Does not return after an error
    or an exit with a number."""
    store = next(iter(ranks.rendezvous("env://")))[0]  # torchrun's own, which outlives the ranks
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    ranks.init_process_group(backend, store=store, rank=rank, world_size=size)
    ring = ranks.new_group(backend="gloo", timeout=timedelta(days=365))  # silent until the end
    ending = threading.Lock()  # held by the thread that ends this process
    before, after = (rank - 1) % size, (rank + 1) % size
    watcher = threading.Thread(target=watch, args=(before, ring, store.clone(), ending), daemon=True)
    watcher.start()
    if rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for good)
        sys.stderr = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (read when it ends by an option)
    try:
        command(*arguments)
        ranks.barrier(ring)  # rank 0 may still be writing
    except BaseException as error:  # whatever it is, this process ends here
        end(error, ring, store, ending)
    ranks.send(torch.zeros(1), after, group=ring)
    watcher.join()
    ranks.destroy_process_group()


def watch(before: int, ring, store, ending: threading.Lock) -> None:
    """End this process when the rank `before` it has gone without its last message."""
    try:
        ranks.recv(torch.zeros(1), src=before, group=ring)
    except RuntimeError:  # the connection is closed
        with ending:
            report_first_failure(store, f"\nrank {before} has gone: killed? (out of memory?)")
            os._exit(1)


def end(error: BaseException, ring, store, ending: threading.Lock) -> None:
    """End this process, which ends the others. By force: Python's own end waits for pending collectives."""
    if isinstance(error, RuntimeError):
        # a collective also raises RuntimeError when a peer died: wait, so that watch() can report the peer
        time.sleep(3)
    with ending:
        code = (error.code or 0) if isinstance(error, SystemExit) else None
        # below 128: argument parsing ended this rank (all ranks, or one machine's with another command)
        if code in range(128):
            if rank := ranks.get_rank():
                time.sleep(3)  # gives rank 0 time to print the same error first
                sys.stderr.seek(0)
                report_first_failure(
                    store, f"rank {rank}: {shlex.join(sys.argv)}\n{sys.stderr.read()}".rstrip()
                )
            else:
                report_first_failure(store, "")
                time.sleep(3)  # a rank that begins later ends by itself, too
        elif isinstance(code, int):  # a signal: all ranks end with it
            with contextlib.suppress(RuntimeError):  # rank 0 could not save, and has said so
                ranks.barrier(ring)
        else:
            known = isinstance(error, SystemExit)
            report_first_failure(store, code if known else "".join(traceback.format_exception(error)))
            code = 1
        sys.stdout.flush()
        os._exit(code)


def report_first_failure(store, words: str) -> None:
    """Print `words` if this is the first rank to fail: later failures are consequences. "": was printed."""
    try:
        first = store.add("failed", 1) == 1
    except RuntimeError:  # the store has gone with its machine: better said twice than never
        first = True
    if first and words:
        print(words, file=sys.__stderr__, flush=True)
