"""Going on with a run that was cut off, as if it had not been: the same options, its log, its newest good
checkpoint.

    compare(out, options)                    ValueError where the run would not be the one begun
    finished(out)                            its result, if nothing is left to do
    done = restore_(out, model, optimizer)   steps done: weights, optimiser state and log are those after them

Nothing is ever unpickled. What it does not do: go on from another run's adapter (--init-adapter does).
"""

import json
import math
from itertools import takewhile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from minarena.files.adapter import read_adapter
from minarena.files.checkpoint import FINISHED, find_checkpoints
from minarena.files.durable import file_record, read_record, write_text
from minarena.model import adapter_tensors
from minarena.runtime.console import first_line, say

# What a resumed run may change: nothing of it decides the result.
MAY_CHANGE_ON_RESUME = {
    "out",
    "resume",
    "swap",
    "eval_every",
    "save_every",
    "token_budget",
    "log_to",
    "versions",
    "commit",
}
MAY_CHANGE_ON_RESUME |= {"world_size", "path"}  # path: compared when it is known, after the base is loaded


def check_same_options(out: str, options: dict) -> dict:
    """The record of the run in `out`; ValueError where these options would not go on with it, naming one."""
    path = Path(out) / "train_config.json"
    if not path.exists() and not find_checkpoints(out):
        raise ValueError(f"--resume: no run in {out}: leave --resume away, or give the run's --out")
    begun = read_record(path)
    for name in sorted((options.keys() | begun.keys()) - MAY_CHANGE_ON_RESUME):
        if begun.get(name) != options.get(name):
            change = f"{name} was {begun.get(name)!r}, now it is {options.get(name)!r}"
            raise ValueError(f"--resume: {change}: a resumed run keeps its options")
    return begun


def finished_result(out: str) -> dict | None:
    """What train.py printed at the end of a finished run, without speed; None of an unfinished one."""
    if not (Path(out) / FINISHED).exists():
        return None
    record = read_record(Path(out) / "train_config.json")
    last = next((event for event in reversed(read_log(out)) if event.get("event") == "eval"), {})
    figures = {name: last[name] for name in ("ab", "ba", "mean") if name in last}
    own = figures.get(record["order"].replace("both", "mean"), {})  # the order trained
    say(f"{out} is finished, nothing is left to do. Its results: python -m minarena.report {out}")
    result = {"out": out, "order": record["order"], "steps": last.get("step"), "rows": record["rows"]}
    return result | {"eval": {**own, **figures}}


def load_checkpoint_(out: str, model: nn.Module, optimizer, writes: bool = True) -> int:
    """Put the newest good checkpoint's weights and optimiser state into place; returns the steps done.

    A damaged one is named on the way and the one before is taken. writes: whether the log is cut to these
    steps, which one rank of several does. Raises ValueError where there are some and
    none can be read; where there are none, the run was cut off before its first and begins again.
    """
    reasons = []
    for folder in find_checkpoints(out):
        try:
            for name, digest in read_record(folder / "checksums.json").items():
                if file_record(folder / name)["sha256"] != digest:
                    raise ValueError(f"{name} is not what was written")
            stored = read_record(folder / "state.json")
            tensors = load_file(folder / "optimizer.safetensors")
            weights, wanted = read_adapter(folder)[1], adapter_tensors(model)
            if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in wanted.items()}:
                raise ValueError("its tensors are those of another model")
            break
        except (OSError, ValueError, SafetensorError) as error:
            reasons.append(f"{folder} is damaged: {first_line(error)}")
            say(reasons[-1])
    else:
        if reasons:
            raise ValueError(f"--resume: no usable checkpoint in {out}. {' '.join(reasons)}")
        say(f"{out} has no checkpoint yet: the run begins again at its first step")
        if writes:
            write_text("", Path(out) / "log.jsonl")
        return 0
    for name, parameter in wanted.items():
        parameter.copy_(weights[name])
    state = {}
    for name, value in [*tensors.items(), *stored["optimizer"].items()]:
        index, _, key = name.partition("/")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if writes:
        cut_log(out, stored["step"])
    return stored["step"]


def cut_log(out: str, done: int) -> None:
    """Drop what log.jsonl has from after the checkpoint of step `done`, for that is done again, and what
    cannot be read, such as a last line that was cut off itself."""
    path, saved = Path(out) / "log.jsonl", {"event": "save", "step": done}
    before = takewhile(lambda event: event != saved, read_log(out))
    events = [event for event in before if event.get("step", math.inf) <= done]
    steps = sum(event.get("event") == "step" for event in events)
    if steps != done:
        say(f"{path} is damaged: of the {done:,} steps that were done it has {steps:,}")
    write_text("".join(json.dumps(event) + "\n" for event in [*events, saved]), path)


def read_log(out: str) -> list[dict]:
    """The events of a run so far; a line that cannot be read, as one that is being written, is {}."""
    path = Path(out) / "log.jsonl"
    return [readable(line) for line in path.read_text(errors="replace").splitlines()] if path.exists() else []


def readable(line: str) -> dict:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return {}
