"""What runs in a child process: a command from its first to its last line, with a fault put in beforehand.

    code, said = run("train", words, kill_at, 7)      dies instead of its 7th flush or rename: code is -9

A child is forked from a server that has imported everything once: it takes half a second, not six. A fault
is a function of this file and its arguments.
"""

import gc
import math
import multiprocessing
import os
import resource
import runpy
import select
import signal
import sys
import tempfile
import threading
import time
import types
from multiprocessing import forkserver
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import bitsandbytes  # noqa: F401  (this and the next two: for the children, once)
import pyarrow.parquet  # noqa: F401
import torch
import transformers.models.gemma2.modeling_gemma2  # noqa: F401
from tqdm.std import TqdmDefaultWriteLock
from transformers.utils import logging

import infer  # noqa: F401
import train  # noqa: F401
from minarena import model, step
from minarena.ensemble import parts, predict
from minarena.files import run as run_files
from minarena.files.base import load_backbone
from minarena.model import PreferenceModel
from minarena.runtime import launch, memory
from minarena.tiny import write_tiny

REPOSITORY = Path(__file__).parent.parent
FORKS = multiprocessing.get_context("forkserver")
SERVER_SAID = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (as long as the process)


def start_server() -> None:
    """Before anything else starts the one fork server that a process has, without what the children need."""
    path = f"{REPOSITORY}:{REPOSITORY / 'tests'}"  # the server's own sys.path lacks it while it imports
    stderr = os.dup(2)
    os.dup2(SERVER_SAID.fileno(), 2)
    with patch.dict(os.environ, {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}):
        FORKS.set_forkserver_preload(["children"])
        forkserver.ensure_running()
    os.dup2(stderr, 2)
    os.close(stderr)


def warm() -> None:
    """What transformers does at a process's first model (a third of a second), before the children are
    forked.

    Without bars: tqdm's lock would then be one for all children, and a child that is killed while it holds
    the lock would stop all others for ever.
    """
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        load_backbone(write_tiny(folder), torch.device("cpu"), torch.float32)
    logging.enable_progress_bar()
    gc.collect()
    gc.freeze()  # else the first collection in each child copies all that the children share: 0.4 s
    assert threading.active_count() == 1 and not hasattr(TqdmDefaultWriteLock, "mp_lock")


if any("multiprocessing.forkserver" in word for word in sys.orig_argv):  # in the server
    warm()


def begin(script: str, words: list[str], said: str | Path, fault=None, *arguments):
    """Start the command; the process."""
    start_server()
    child = FORKS.Process(target=command, args=(script, words, str(said), fault, arguments))
    try:
        with patch.dict(sys.modules, __main__=ModuleType("__main__")):  # else each child imports pytest again
            child.start()
    except (EOFError, ConnectionError) as error:
        SERVER_SAID.seek(0)
        raise RuntimeError(f"the server of forked children ended:\n{SERVER_SAID.read()}") from error
    return child


def run(script: str, words: list[str], fault=None, *arguments) -> tuple[int, str]:
    """(exit code, what it said). Through a pipe: small_files() must not stop it from saying why it stops."""
    with tempfile.TemporaryDirectory() as folder:
        os.mkfifo(f"{folder}/said")
        reader = os.open(f"{folder}/said", os.O_RDONLY | os.O_NONBLOCK)
        child = begin(script, words, f"{folder}/said", fault, *arguments)
        parts = []
        while child.is_alive() or (select.select([reader], [], [], 0)[0] and parts[-1:] != [b""]):
            if select.select([reader], [], [], 0.05)[0]:
                parts.append(os.read(reader, 65536))
        os.close(reader)
        child.join()
        return child.exitcode, b"".join(parts).decode()


def command(script: str, words: list[str], said: str, fault, arguments: tuple) -> None:
    handle = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
    sys.argv = [str(REPOSITORY / f"{script}.py"), *words]
    if fault:
        fault(*arguments)
    runpy.run_path(sys.argv[0], run_name="__main__")


# ------------------------------------------------------------------------------------------------- faults


def at_write(number: int, fault) -> None:
    """Call `fault` in place of the process's flush or rename of that number (from 1); then all is as ever."""
    calls = iter(range(1, number + 1))

    def either(real):
        return lambda *arguments: fault() if next(calls, 0) == number else real(*arguments)

    for name in ("fsync", "rename", "replace"):
        setattr(os, name, either(getattr(os, name)))


def kill_at(number: int) -> None:
    at_write(number, lambda: os.kill(os.getpid(), signal.SIGKILL))


def signal_in_step(number: int, *signals: int) -> None:
    """The signals come in the middle of the training step of that number (from 1)."""
    real, calls = step.train_step, iter(range(1, number + 1))

    def train_step(*arguments, **keywords):
        if next(calls, 0) == number:
            for each in signals:
                os.kill(os.getpid(), each)
        return real(*arguments, **keywords)

    step.train_step = train_step


def small_parts() -> None:
    """infer.py in parts of five rows."""
    parts.PART = predict.PART = 5


def kill_in_small_parts(number: int) -> None:
    small_parts()
    kill_at(number)


def signal_in_part(number: int, sent: int) -> None:
    """The same, and the signal comes in the part of that number (from 1)."""
    small_parts()
    real, calls = memory.predict_p_first, iter(range(1, number + 1))

    def predict_p_first(*arguments, **keywords):
        if next(calls, 0) == number:
            os.kill(os.getpid(), sent)
        return real(*arguments, **keywords)

    memory.predict_p_first = predict_p_first


def small_files(limit: int) -> None:
    """As on a full disk: no file can grow beyond `limit` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


# --------------------------------------------------------------------------------------- several of them


def run_ranks(size: int, script: str, words: list[str], folder: Path, faults: dict | None = None) -> list:
    """[(exit code, what it said)] of each rank, set up as torchrun does it. faults: rank -> (fault, arguments
    ...). What does not end within ten minutes hangs, and is killed: -9. (A rank takes a second, on a machine
    with much other work ten.)"""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started = []
    for rank in range(size):
        fault = (faults or {}).get(rank, ())
        told = (as_rank, rank, size, store.port, *fault)
        started.append(begin(script, words, folder / f"said{rank}", *told))
    end = time.monotonic() + 600
    for child in started:
        child.join(max(0, end - time.monotonic()))
        child.kill()
        child.join()
    return [
        (child.exitcode, (folder / f"said{rank}").read_text(encoding="utf-8"))
        for rank, child in enumerate(started)
    ]


def as_rank(rank: int, size: int, port: int, fault=None, *arguments) -> None:
    names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({name: str(value) for name, value in names.items()})
    if fault:
        fault(*arguments)


def in_step(number: int, what, *arguments) -> None:
    """what(*arguments) is called at the beginning of the training step of that number (from 1)."""
    real, calls = step.train_step, iter(range(1, number + 1))

    def train_step(*positional, **keywords):
        if next(calls, 0) == number:
            what(*arguments)
        return real(*positional, **keywords)

    step.train_step = train_step


def fail(message: str) -> None:
    raise ValueError(message)


def bad_number(number: int) -> None:
    """The logits of the model's call of that number (from 1) are NaN."""
    real, calls = PreferenceModel.forward, iter(range(1, number + 1))

    def forward(*arguments):
        return real(*arguments) * (math.nan if next(calls, 0) == number else 1)

    PreferenceModel.forward = forward


def little_memory(tokens: int) -> None:
    """Micro-batches of more than `tokens` do not fit."""
    real = PreferenceModel.forward

    def forward(self, ids, mask):
        if ids.numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, ids, mask)

    PreferenceModel.forward = forward


def other_start() -> None:
    """LoRA and head start from another seed."""
    real = model.attach_adapter_
    model.attach_adapter_ = lambda model, config, seed=0: real(model, config, seed + 1)


def with_environment(environment: dict[str, str]) -> None:
    os.environ.update(environment)


def imported_anew(environment: dict[str, str]) -> None:
    """huggingface_hub, which reads its settings when it is imported, with these."""
    with_environment(environment)
    for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
        del sys.modules[name]


def other_words(*words: str) -> None:
    sys.argv += words


def end_together(folder: str, rank: int, size: int) -> None:
    """What launch.py waits for by seconds, that the other ranks come to the same end, is waited for until
    they do, however slow they are."""

    def until_all_are_there(seconds: float) -> None:
        Path(folder, f"ends{rank}").touch()
        while not all(Path(folder, f"ends{other}").exists() for other in range(size)):
            time.sleep(0.01)

    launch.time = types.SimpleNamespace(sleep=until_all_are_there)


def stopped_slowly(number: int) -> None:
    """SIGTERM comes in that step, and a checkpoint takes five seconds longer. (Longer on a busy machine: the
    other rank has to wait however long it is, so no time is too long.)"""
    in_step(number, signal.raise_signal, signal.SIGTERM)
    slow_save(5)


def slow_save(seconds: float = 2) -> None:
    """A checkpoint takes that much longer, in which others could end. (A busy machine can only hide that they
    do: whoever waits as he should passes.)"""
    real = run_files.save_checkpoint
    run_files.save_checkpoint = lambda *words, **more: (time.sleep(seconds), real(*words, **more))
