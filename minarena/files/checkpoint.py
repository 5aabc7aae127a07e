"""What a run writes while it goes on: its log and its checkpoints. (resume.py reads them back.)

A checkpoint is a folder checkpoint-N (N steps done): the adapter in PEFT's format, so that it can be used as
one, and the optimiser's state. The order of rows and the dropout masks follow from (seed, step) and need no
state (batching.py, step.py). A checkpoint is written under another name, flushed to disk and renamed: a
folder with the final name is whole. Checksums notice what a disk does to it later; the checkpoint before is
then taken. Nothing is ever pickled: tensors are safetensors, all else is JSON.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from minarena.files.adapter import save_adapter
from minarena.files.durable import TMP_SUFFIX, file_record, flush_to_disk, naming_os_errors
from minarena.model import AdapterConfig

KEPT = 2  # newest checkpoints; the older one is needed if the newer one is damaged


def log_event(out: str, event: str, step: int, **values) -> None:
    """Append one line to log.jsonl."""
    path = Path(out) / "log.jsonl"
    with naming_os_errors(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"event": event, "step": step, **values}) + "\n")


def save_checkpoint(
    out: str,
    step: int,
    model: nn.Module,
    optimizer,
    config: AdapterConfig,
    base: str,
    token_budget: int | None = None,
) -> None:
    """Write out/checkpoint-{step}, log it, and delete all older ones but the newest two.

    token_budget: of the steps to come; with dropout on it decides their masks.

    Raises OSError that names the folder where it cannot be written.
    """
    final, tmp = Path(out) / f"checkpoint-{step}", Path(out) / TMP_SUFFIX
    with naming_os_errors(final, tmp):
        shutil.rmtree(tmp, ignore_errors=True)
        save_adapter(tmp, model, config, base)
        tensors, plain = {}, {}
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in flatten_state(state):
                # clone: bitsandbytes' states share a table, and safetensors refuses that
                if isinstance(value, torch.Tensor):
                    tensors[f"{index}/{key}"] = value.detach().cpu().clone()
                else:
                    plain[f"{index}/{key}"] = value
        save_file(tensors, tmp / "optimizer.safetensors")
        state = {"step": step, "token_budget": token_budget, "optimizer": plain}
        (tmp / "state.json").write_text(json.dumps(state), encoding="utf-8")
        sums = {file.name: file_record(file)["sha256"] for file in tmp.iterdir()}
        (tmp / "checksums.json").write_text(json.dumps(sums), encoding="utf-8")
        # the log, too: its lines up to this step are never written again
        for path in [*tmp.iterdir(), tmp, *Path(out).glob("log.jsonl")]:
            flush_to_disk(path)
        shutil.rmtree(final, ignore_errors=True)  # there only if it was damaged
        tmp.rename(final)
        flush_to_disk(Path(out))
    log_event(out, "save", step)
    for old in [path for path in find_checkpoints(out) if steps_of(path) <= step][KEPT:]:
        shutil.rmtree(old)


def flatten_state(state: dict):
    """(name, value) pairs of an optimiser's state; bitsandbytes nests its own, and takes it back flat."""
    for key, value in state.items():
        yield from value.items() if isinstance(value, dict) else [(key, value)]


def find_checkpoints(out: str) -> list[Path]:
    """The checkpoints in `out`, newest first."""
    found = [path for path in Path(out).glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    return sorted(found, key=steps_of, reverse=True)


def steps_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])
