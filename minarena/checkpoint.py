"""A run's folder: claim it, log to it, save and restore checkpoints.

Nothing in it is ever pickled: tensors are safetensors, all else is JSON.

A checkpoint is a folder checkpoint-N (N steps done) with the adapter in PEFT's format, so it can be used as
one, and the optimiser's state. The order of rows and the dropout masks follow from (seed, step) and need no
state (batching.py, step.py). It is written under another name, flushed and renamed: a folder with the final
name is whole.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from minarena.adapter import AdapterConfig, adapter_tensors, read_adapter, save_adapter

RECORDED = ("torch", "transformers", "bitsandbytes", "safetensors", "numpy", "pandas", "ftfy")
# What a resumed run may change: nothing of it decides the result.
FREE = {"out", "resume", "swap", "eval_every", "save_every", "token_budget", "log_to", "versions", "commit"}
KEPT = 2  # newest checkpoints; the older of the two is for the case that the newer is damaged


def claim(out: str, options: dict) -> None:
    """Take a run's folder: a new one gets train_config.json (options, versions, commit); on --resume compare.

    Raises ValueError where it holds another run, or where the resumed run would not be the one begun.
    """
    folder = Path(out)
    versions = {"python": platform.python_version()} | {name: version(name) for name in RECORDED}
    record = options | {"versions": versions, "commit": commit()}
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"--out {out} holds a finished run: give another --out, or delete it")
    if options["resume"]:
        if not find_checkpoints(out):
            raise ValueError(
                f"--resume: no checkpoint in {out}: leave --resume away, or give the run's --out"
            )
        try:
            begun = json.loads((folder / "train_config.json").read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"--resume: {folder}/train_config.json is damaged: {error}") from error
        for name in sorted(record.keys() - FREE):
            if begun.get(name) != record[name]:
                change = f"{name} was {begun.get(name)!r}, now it is {record[name]!r}"
                raise ValueError(f"--resume: {change}: a resumed run keeps its options")
    elif (folder / "log.jsonl").exists() and (folder / "log.jsonl").stat().st_size:  # a step was done
        remedy = "--resume goes on" if find_checkpoints(out) else "it has no checkpoint yet: delete it"
        raise ValueError(f"--out {out} holds an unfinished run: {remedy}, or give another --out")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "train_config.json").write_text(json.dumps(record, indent=2) + "\n")


def commit() -> str | None:
    """The commit of this code, with a + where its tree is changed; None outside git."""
    folder = str(Path(__file__).parent)
    git = ["git", "-C", folder, "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def open_log(out: str, done: int) -> Callable:
    """A function that appends one event to log.jsonl.

    What stands there from after the checkpoint of step `done` is dropped: a run that was cut off does that
    again. So is a last line that was cut off itself.
    """
    path = Path(out) / "log.jsonl"
    kept, last = [], json.dumps({"event": "save", "step": done})
    for line in path.read_text().splitlines() if done and path.exists() else []:
        if not line.endswith("}") or json.loads(line)["step"] > done or line == last:
            break
        kept.append(line)
    path.write_text("".join(line + "\n" for line in kept + [last] * bool(done)))

    def log(event: str, step: int, **values) -> None:
        with open(path, "a") as file:
            file.write(json.dumps({"event": event, "step": step, **values}) + "\n")

    return log


def save_checkpoint(
    out: str, step: int, model: nn.Module, optimizer, config: AdapterConfig, base: str
) -> None:
    """Write out/checkpoint-{step} and delete all but the newest two."""
    final = Path(out) / f"checkpoint-{step}"
    aside = Path(out) / f"unfinished-{step}"
    shutil.rmtree(aside, ignore_errors=True)
    save_adapter(aside, model, config, base)
    tensors, plain = {}, {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in flat(state):
            # clone: bitsandbytes' states share a table, and safetensors refuses that
            if isinstance(value, torch.Tensor):
                tensors[f"{index}/{key}"] = value.detach().cpu().clone()
            else:
                plain[f"{index}/{key}"] = value
    save_file(tensors, aside / "optimizer.safetensors")
    (aside / "state.json").write_text(json.dumps({"step": step, "optimizer": plain}))
    for file in aside.iterdir():
        flush_to_disk(file)
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    flush_to_disk(Path(out))
    for old in find_checkpoints(out)[KEPT:]:
        shutil.rmtree(old)


def flat(state: dict):
    """(name, value) of an optimiser's state; bitsandbytes nests its own, and takes it back flat."""
    for key, value in state.items():
        yield from value.items() if isinstance(value, dict) else [(key, value)]


def flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def find_checkpoints(out: str) -> list[Path]:
    """The checkpoints in `out`, newest first."""
    found = [
        path for path in Path(out).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()
    ]
    return sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-")))


def restore_(out: str, model: nn.Module, optimizer) -> int:
    """Put the newest good checkpoint's weights and optimiser state into place; returns the steps done.

    A damaged one is named on the way and the one before is taken. Raises ValueError where none can be read.
    """
    reasons = []
    for folder in find_checkpoints(out):
        try:
            stored = json.loads((folder / "state.json").read_text())
            tensors = load_file(folder / "optimizer.safetensors")
            weights, wanted = read_adapter(folder)[1], adapter_tensors(model)
            if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in wanted.items()}:
                raise ValueError("its tensors are those of another model")
            break
        except (OSError, ValueError, SafetensorError) as error:
            reasons.append(f"{folder} is damaged: {error}")
            print(reasons[-1], file=sys.stderr)
    else:
        raise ValueError(f"--resume: no usable checkpoint in {out}. {' '.join(reasons)}")
    for name, parameter in wanted.items():
        parameter.copy_(weights[name])
    state = {}
    for name, value in [*tensors.items(), *stored["optimizer"].items()]:
        index, _, key = name.partition("/")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return stored["step"]
