"""A run's folder: what train.py writes, and which rank writes it.

    run = Run.open(out, world, record, resume)          a new folder, or the run that --resume goes on with
    first = run.start_(model, optimizer, adapter, config, compute)     steps that are done already
    for step in run.progress(first, steps):
        with run.saving_on_failure(step, names): ...    one optimiser step
        run.log_step(step, tokens, loss=loss, lr=lr)
        run.save(step + 1)
    run.finish(table, model, adapter, base)             eval.parquet and the adapter

The folder holds train_config.json (every option), log.jsonl, the newest two checkpoints and, once the run is
finished, eval.parquet and the adapter. Only rank 0 writes; every method may be called on every rank. What it
does not do: train. It owns no loop and never calls train_step.
"""

import json
import math
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from minarena.config import TrainConfig
from minarena.dist import World
from minarena.files.adapter import save_adapter
from minarena.files.base import base_fingerprint, ids_changed
from minarena.files.checkpoint import find_checkpoints, log_event, save_checkpoint
from minarena.files.durable import (
    RECORDED,
    TMP_SUFFIX,
    commit,
    flush_to_disk,
    naming_os_errors,
    replace_durably,
    write_text,
)
from minarena.files.fingerprint import differences
from minarena.files.lock import lock_folder, unlock_folder
from minarena.files.resume import (
    check_same_options,
    finished_result,
    load_checkpoint_,
    read_log,
    truncate_log,
)
from minarena.model import AdapterConfig
from minarena.runtime.console import say
from minarena.runtime.track import also_to
from minarena.step import Compute

FINISHED = "adapter_config.json"  # written last: a folder that has it is a finished run


def create_run_folder(out: str) -> None:
    """Make the folder of a new run; ValueError where it holds another run or cannot be written to."""
    folder = Path(out)
    if (folder / FINISHED).exists():
        raise ValueError(f"--out {out} holds a finished run: give another --out, or delete it")
    if find_checkpoints(out) or ((folder / "log.jsonl").exists() and (folder / "log.jsonl").stat().st_size):
        raise ValueError(f"--out {out} holds an unfinished run: --resume goes on; or give another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: {error.strerror}: give another --out") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--out {out}: cannot be written to: give another --out")


def write_record(out: str, record: dict) -> None:
    """Write train_config.json: the record, and versions, commit, device, date and command."""
    versions = {"python": platform.python_version()} | {name: version(name) for name in RECORDED}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    record = record | {"versions": versions, "commit": commit(), "device_name": gpu}
    record |= {"date": datetime.now().astimezone().isoformat(timespec="seconds")}
    record |= {"command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}
    write_text(json.dumps(record, indent=2) + "\n", Path(out) / "train_config.json")


def save_results(out: str, table: pd.DataFrame, model: nn.Module, config: AdapterConfig, base: str) -> None:
    """Write eval.parquet and the adapter."""
    folder, tmp = Path(out), Path(out) / TMP_SUFFIX
    with naming_os_errors(folder, tmp):
        shutil.rmtree(tmp, ignore_errors=True)
        save_adapter(tmp, model, config, base)
        table.to_parquet(tmp / "eval.parquet", index=False)
        flush_to_disk(folder / "log.jsonl")
        for name in ("eval.parquet", "adapter_model.safetensors", FINISHED):
            replace_durably(tmp / name, folder / name)
        tmp.rmdir()


@dataclass
class Run:
    out: str
    world: World
    record: dict  # what train_config.json says of the run
    resumed: dict | None = None  # what it said when the run began, with --resume
    result: dict | None = None  # of a run that was finished already
    write_checkpoint: Callable | None = None  # (step); start_ gives it model and optimiser
    write_log: Callable | None = None  # (event, step, **values)
    first: int = 0  # steps that were done before this process began
    saved: int = 0  # steps in the newest checkpoint
    tokens: int = 0  # trained on by this process
    started: float = 0.0  # seconds of time.perf_counter, when the first step began
    seconds: float = 0.0  # that all steps of this process took
    bar: tqdm | None = None
    compute: Compute | None = None  # what the steps are computed with

    @classmethod
    def open(cls, out: str, world: World, record: dict, resume: bool) -> "Run":
        """Claim the folder of a new run, before anything slow; with `resume` find the one that was begun.

        record: all that decides the result, options first. Raises ValueError where the folder holds another
        run, or, with `resume`, none with these options and this base.
        """
        run = cls(out, world, record)
        if not resume and run.writes:
            create_run_folder(out)
        elif resume:
            run.resumed = check_same_options(out, record)
        if run.writes:
            lock_folder(out)
        if resume:
            if (Path(out) / FINISHED).exists():
                run.result = finished_result(out, run.resumed)
                say(f"{out} is finished, nothing is left to do. Its results: python -m minarena.report {out}")
                unlock_folder(out)
        elif run.writes:
            write_record(out, record)  # --resume needs it; completed once the base is loaded
        if not run.result:
            run.record_base(record["model"])
        return run

    @property
    def writes(self) -> bool:
        """Whether this is the rank that writes."""
        return self.world.rank == 0

    def record_base(self, name: str) -> None:
        """Record what `--model name` is, by its contents.

        Raises ValueError where --resume would go on with another base, or with other token ids: a run from
        before fingerprints may have such (files/tokenizer.py).
        """
        self.record["base"] = base_fingerprint(name)
        if self.resumed is None:
            return  # record_computing writes it
        changed = differences(self.resumed.get("base"), self.record["base"])
        if changed:
            what = " and ".join(changed)
            raise ValueError(f"--resume: --model {name} is not what the run began with: its {what} changed")
        if "base" not in self.resumed and ids_changed(name):
            reason = "its ids were those of transformers' class, now they are tokenizer.json's"
            raise ValueError(f"--resume: --model {name}: {reason}: begin a new run")

    def record_computing(self, model: nn.Module, token_budget: int) -> None:
        """Record what is known once the base is loaded: path (fast or reference), token budget, int8 columns.

        Raises ValueError where --resume would change the path or the columns: they round in other places.
        """
        path, int8_columns = "fast" if model.fast else "reference", model.int8_columns
        self.record |= {"path": path, "token_budget_used": token_budget, "int8_columns": int8_columns}
        if self.resumed is None or not find_checkpoints(self.out):  # the run begins at its first step
            if self.writes:
                write_record(self.out, self.record)
        elif self.resumed.get("path", path) != path:
            before = self.resumed["path"]
            raise ValueError(f"--resume: the run was begun on the {before} path, this is the {path} one")
        elif self.resumed.get("int8_columns") != int8_columns:
            before, now = (str(x or "none") for x in (self.resumed.get("int8_columns"), int8_columns))
            raise ValueError(f"--resume: the outlier columns of --matmul int8 were {before}, now {now}")

    def start_(
        self, model: nn.Module, optimizer, adapter: AdapterConfig, config: TrainConfig, compute: Compute
    ) -> int:
        """Get ready to log and save this model; with --resume load the newest good checkpoint, in place.

        compute.token_budget: with `auto`, a resumed run goes on with the budget of its checkpoint. Returns
        the steps that are done already.
        """
        if self.resumed is not None:
            self.first, budget = load_checkpoint_(self.out, model, optimizer)
            self.saved = self.first
            if compute.halve_on_oom and budget:
                compute.token_budget = self.record["token_budget_used"] = budget
            if self.writes:
                truncate_log(self.out, self.first)
        self.compute = compute
        self.write_checkpoint = partial(
            save_checkpoint, self.out, model=model, optimizer=optimizer, config=adapter, base=config.model
        )
        self.write_log = partial(log_event, self.out)
        if config.log_to and self.writes:
            self.write_log = also_to(config.log_to, self.write_log, self.out, vars(config), self.first)
        return self.first

    def log(self, event: str, step: int, **values) -> None:
        if self.writes:
            self.write_log(event, step, **values)

    def has_eval(self, step: int) -> bool:
        """Whether the log has an evaluation after `step` steps; on every rank what rank 0's log says."""
        found = self.writes and any(
            event.get("event") == "eval" and event.get("step") == step for event in read_log(self.out)
        )
        return self.world.all_gather(found)[0] or step == 0

    def save(self, step: int) -> None:
        """Write checkpoint-{step}: `step` steps are done."""
        self.saved = step
        if self.writes:
            self.write_checkpoint(step, token_budget=self.compute.token_budget)

    def progress(self, first: int, steps: int) -> Iterator[int]:
        """The numbers of the steps to do, from 0, with a bar; without a terminal, with twenty lines."""
        self.started = time.perf_counter()
        self.bar = tqdm(range(first, steps), "train", initial=first, total=steps, unit="step", disable=None)
        yield from self.bar
        self.seconds = time.perf_counter() - self.started

    def log_step(self, step: int, tokens: int, seconds: float, **figures: float) -> None:
        """Log the step that was just done (from 1), and show it. tokens: real ones, of all ranks."""
        self.tokens += tokens
        if self.compute.token_budget != self.record["token_budget_used"]:  # it was halved
            self.record["token_budget_used"] = self.compute.token_budget
            if self.writes:
                write_record(self.out, self.record)
        speed = round(tokens / seconds, 1)
        self.log("step", step, **figures, seconds=round(seconds, 4), tokens_per_second=speed)
        speed = self.tokens / (time.perf_counter() - self.started)
        now = f"loss {figures['loss']:.4f}, lr {figures['lr']:.1e}, {speed:,.0f} tokens/s"
        self.bar.set_postfix_str(now)
        if self.bar.disable and step % math.ceil(self.bar.total / 20) == 0:
            say(f"step {step:,} of {self.bar.total:,}: {now}")

    @contextmanager
    def saving_on_failure(self, done: int, names: list[str] | None = None) -> Iterator[None]:
        """Save the `done` steps before the block where it fails with the weights untouched.

        A bad number and full memory raise before the weights change. names: the rows of the step in the
        block; the error then says them, the step and how to go on. None: the block is an evaluation.
        """
        try:
            yield
        except (FloatingPointError, MemoryError) as error:
            if done > self.saved:
                self.save(done)
            if names is None:
                raise
            if isinstance(error, FloatingPointError):
                self.world.all_gather(None)  # every rank has the error: wait until rank 0 has saved
            where = f"step {done + 1}, rows {names}"
            # of several ranks one alone may be out of memory: it cannot save for rank 0
            saved = not isinstance(error, MemoryError) or self.world.size == 1
            after = f"after step {done}" if saved else "from the newest checkpoint"
            going_on = f"; --resume goes on {after}" if done else ""  # else there is no checkpoint
            raise type(error)(f"{where}: {error}{going_on}") from error

    def finish(self, table: pd.DataFrame, model: nn.Module, adapter: AdapterConfig, base: str) -> None:
        """Write eval.parquet and the adapter; the folder is then free for other commands."""
        save_results(self.out, table, model, adapter, base)
        unlock_folder(self.out)

    def exit_stopped(self, number: int, steps: int) -> None:
        """End the process after signal `number`; the checkpoint is written already."""
        self.bar.close()
        unlock_folder(self.out)
        say(f"Stopped: {self.saved} of {steps} steps are saved; the same command with --resume goes on.")
        raise SystemExit(128 + number)
