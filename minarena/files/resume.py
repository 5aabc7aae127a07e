"""Resume an interrupted run; the result is the one of an uninterrupted run.

    record = check_same_options(out, options)         ValueError where this would be another run
    finished_result(out, record)                      what the run printed, if nothing is left to do
    load_checkpoint_(out, model, optimizer)           (steps done, token budget): weights and optimiser
                                                      state are those after these steps

Runs outlive code: a key that a run's record lacks counts as the value that gave the old behaviour, and keys
that are no longer options are ignored. Nothing is ever unpickled. What it does not do: go on from another
run's adapter (--init-adapter does).
"""

import json
import math
from dataclasses import asdict, fields
from itertools import takewhile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from minarena.config import TrainConfig
from minarena.data import JUDGED_BY
from minarena.files.adapter import read_adapter
from minarena.files.checkpoint import find_checkpoints
from minarena.files.durable import file_record, read_record, write_text
from minarena.model import adapter_tensors
from minarena.runtime.console import first_line, say

OPTIONS = {field.name: field for field in fields(TrainConfig)}
# What counts where a record lacks it: the option's default; the reading of chosen / rejected files had no key
BEFORE = asdict(TrainConfig()) | {"reading": 1}
# What does not decide the result, beside such options; `path` is compared once the base is loaded
NOT_COMPARED = {"world_size", "path", "token_budget_used", "int8_columns"}


def check_same_options(out: str, options: dict) -> dict:
    """The record of the run in `out`; ValueError where these options would not go on with it, naming one."""
    path = Path(out) / "train_config.json"
    if not path.exists() and not find_checkpoints(out):
        raise ValueError(f"--resume: no run in {out}: leave --resume away, or give the run's --out")
    recorded = read_record(path)
    for name in sorted(options.keys() - NOT_COMPARED):
        option = OPTIONS.get(name)
        if name not in recorded and name not in BEFORE:  # this code records more than the run's did
            continue
        before = recorded.get(name, BEFORE.get(name))
        if before != options[name] and not (option and option.metadata["may_change"]):
            change = f"{name} was {before!r}, now it is {options[name]!r}"
            raise ValueError(f"--resume: {change}: a resumed run keeps its options")
    return recorded


def finished_result(out: str, record: dict) -> dict:
    """What train.py printed at the end of the finished run in `out`, without speed. record:
    train_config.json."""
    last = next((event for event in reversed(read_log(out)) if event.get("event") == "eval"), {})
    figures = {name: last[name] for name in ("ab", "ba", "mean") if name in last}
    trained = figures.get(JUDGED_BY[record["order"]], {})
    result = {"out": out, "order": record["order"], "steps": last.get("step"), "rows": record["rows"]}
    return result | {"eval": {**trained, **figures}}


def load_checkpoint_(out: str, model: nn.Module, optimizer) -> tuple[int, int | None]:
    """Load the newest good checkpoint's weights and optimiser state, in place; returns (steps done, token
    budget).

    A damaged checkpoint is named on the way and the one before is taken. Where there are none, the run was
    cut off before its first: returns 0. Raises ValueError where there are some and none can be read.
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
        return 0, None
    for name, parameter in wanted.items():
        parameter.copy_(weights[name])
    state = {}
    for name, value in [*tensors.items(), *stored["optimizer"].items()]:
        index, _, key = name.partition("/")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return stored["step"], stored.get("token_budget")


def truncate_log(out: str, done: int) -> None:
    """Drop what log.jsonl has from after step `done`, because it is done again, and lines that cannot be
    read, such as a last line that was cut off itself."""
    path, saved = Path(out) / "log.jsonl", {"event": "save", "step": done}
    if not done:
        write_text("", path)
        return
    before = takewhile(lambda event: event != saved, read_log(out))
    events = [event for event in before if event.get("step", math.inf) <= done]
    steps = sum(event.get("event") == "step" for event in events)
    if steps != done:
        say(f"{path} is damaged: of the {done:,} steps that were done it has {steps:,}")
    write_text("".join(json.dumps(event) + "\n" for event in [*events, saved]), path)


def read_log(out: str) -> list[dict]:
    """The events of a run so far; {} for a line that cannot be read, such as one that is being written."""
    path = Path(out) / "log.jsonl"
    if not path.exists():
        return []
    return [parse_line(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]


def parse_line(line: str) -> dict:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return {}
