"""A run's folder: claim it, log to it, save checkpoints and the result. (resume.py reads all that.)

Nothing in it is ever pickled: tensors are safetensors, all else is JSON.

A checkpoint is a folder checkpoint-N (N steps done) with the adapter in PEFT's format, so it can be used as
one, and the optimiser's state. The order of rows and the dropout masks follow from (seed, step) and need no
state (batching.py, step.py). It is written under another name, flushed and renamed: a folder with the final
name is whole. What a disk does to it later is noticed by its checksums, and the one before is taken.
"""

import json
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from minarena.files.adapter import save_adapter
from minarena.files.durable import (
    RECORDED,
    TMP_SUFFIX,
    commit,
    file_record,
    flush_to_disk,
    naming_os_errors,
    replace_durably,
    write_text,
)
from minarena.model import AdapterConfig

KEPT = 2  # newest checkpoints; the older of the two is for the case that the newer is damaged
FINISHED = "adapter_config.json"  # in a run's folder it tells that the run is finished: it is written last


def create_run_folder(out: str, options: dict) -> None:
    """Take the folder of a new run: it gets train_config.json (options, versions, commit).

    Raises ValueError where it holds another run.
    """
    folder = Path(out)
    if (folder / FINISHED).exists():
        raise ValueError(f"--out {out} holds a finished run: give another --out, or delete it")
    if find_checkpoints(out) or ((folder / "log.jsonl").exists() and (folder / "log.jsonl").stat().st_size):
        raise ValueError(f"--out {out} holds an unfinished run: --resume goes on; or give another --out")
    versions = {"python": platform.python_version()} | {name: version(name) for name in RECORDED}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: {error.strerror}: give another --out") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--out {out}: cannot be written to: give another --out")
    record = options | {"versions": versions, "commit": commit()}
    write_text(json.dumps(record, indent=2) + "\n", folder / "train_config.json")


def log_event(out: str, event: str, step: int, **values) -> None:
    """Append one line to log.jsonl."""
    path = Path(out) / "log.jsonl"
    with naming_os_errors(path), open(path, "a") as file:
        file.write(json.dumps({"event": event, "step": step, **values}) + "\n")


def save_checkpoint(
    out: str, step: int, model: nn.Module, optimizer, config: AdapterConfig, base: str
) -> None:
    """Write out/checkpoint-{step} and delete all older ones but the newest two."""
    final, aside = Path(out) / f"checkpoint-{step}", Path(out) / TMP_SUFFIX
    with naming_os_errors(final, aside):
        shutil.rmtree(aside, ignore_errors=True)
        save_adapter(aside, model, config, base)
        tensors, plain = {}, {}
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in flatten_state(state):
                # clone: bitsandbytes' states share a table, and safetensors refuses that
                if isinstance(value, torch.Tensor):
                    tensors[f"{index}/{key}"] = value.detach().cpu().clone()
                else:
                    plain[f"{index}/{key}"] = value
        save_file(tensors, aside / "optimizer.safetensors")
        (aside / "state.json").write_text(json.dumps({"step": step, "optimizer": plain}))
        sums = {file.name: file_record(file)["sha256"] for file in aside.iterdir()}
        (aside / "checksums.json").write_text(json.dumps(sums))
        # the log, too: its lines up to this step are never written again
        for path in [*aside.iterdir(), aside, *Path(out).glob("log.jsonl")]:
            flush_to_disk(path)
        shutil.rmtree(final, ignore_errors=True)  # there only if it was damaged
        aside.rename(final)
        flush_to_disk(Path(out))
    log_event(out, "save", step)
    for old in [path for path in find_checkpoints(out) if steps_of(path) <= step][KEPT:]:
        shutil.rmtree(old)


def save_results(out: str, table, model: nn.Module, config: AdapterConfig, base: str) -> None:
    """Write the run's results: eval.parquet and the adapter."""
    folder, aside = Path(out), Path(out) / TMP_SUFFIX
    with naming_os_errors(folder, aside):
        shutil.rmtree(aside, ignore_errors=True)
        save_adapter(aside, model, config, base)
        table.to_parquet(aside / "eval.parquet", index=False)
        flush_to_disk(folder / "log.jsonl")
        for name in ("eval.parquet", "adapter_model.safetensors", FINISHED):
            replace_durably(aside / name, folder / name)
        aside.rmdir()


def flatten_state(state: dict):
    """(name, value) of an optimiser's state; bitsandbytes nests its own, and takes it back flat."""
    for key, value in state.items():
        yield from value.items() if isinstance(value, dict) else [(key, value)]


def find_checkpoints(out: str) -> list[Path]:
    """The checkpoints in `out`, newest first."""
    found = [path for path in Path(out).glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    return sorted(found, key=steps_of, reverse=True)


def steps_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])
