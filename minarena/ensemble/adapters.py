"""Trained adapters: found in their folders, and the options and the base that all of them agree on.

    adapters = [find_adapter("runs/ab"), find_adapter("runs/x:ba")]
    device = resolve(config, adapters, world)       config.model, max_length ..: as the adapters were trained
    base = check_base(config, adapters, typed)      its fingerprint; another base of the same name is refused

One base serves all, so what was not typed must be the same in all their records. What it does not do: load
weights (judge.py).
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from minarena.config import UNRECORDED, InferConfig, TrainConfig, choices
from minarena.dist import World
from minarena.files.base import base_fingerprint, check_folder, ids_changed
from minarena.files.durable import read_record
from minarena.files.fingerprint import differences
from minarena.model import default_dtype
from minarena.runtime.console import say


@dataclass
class TrainedAdapter:
    """An adapter's folder, the order it was trained in (ab, ba, both), its train_config.json ({} if none)."""

    folder: str
    order: str
    record: dict


def find_adapter(argument: str) -> TrainedAdapter:
    """`DIR` or `DIR:ba` -> the adapter; an order in the argument wins over the recorded one.

    Raises ValueError where there is no finished adapter, or where its record is damaged.
    """
    orders = choices(TrainConfig, "order")
    folder, _, order = argument.rpartition(":")
    if order not in orders:
        folder, order = argument, ""
    if not (Path(folder) / "adapter_config.json").is_file():
        unfinished = (Path(folder) / "train_config.json").exists()
        reason = "its training is unfinished" if unfinished else "no adapter_config.json there"
        raise ValueError(f"--adapter {folder}: {reason}")
    home = Path(folder).resolve()  # the record of a checkpoint stands in its run's folder
    path = (home.parent if home.name.startswith("checkpoint-") else home) / "train_config.json"
    record = read_record(path) if path.exists() else {}
    order = order or record.get("order", UNRECORDED["order"])
    if order not in orders:
        raise ValueError(f"{path}: order {order!r}: must be ab, ba or both")
    model, length = record.get("model", "tiny"), record.get("max_length", UNRECORDED["max_length"])
    fits = {
        "model": isinstance(model, str) and model,
        "max_length": isinstance(length, int) and length >= 8,
    }
    for name in ("truncation", "matmul"):
        fits[name] = record.get(name, UNRECORDED[name]) in choices(TrainConfig, name)
    for name, right in fits.items():
        if not right:
            raise ValueError(f"{path}: {name} {record[name]!r}: not what train.py writes")
    return TrainedAdapter(folder, order, record)


def resolve(config: InferConfig, adapters: list[TrainedAdapter], world: World) -> torch.device:
    """Fill in, in place, what was not typed: as the adapters were trained; returns the device."""
    for adapter in adapters:
        if not adapter.record:
            unknown = f"{adapter.folder}: no train_config.json, taken as order {adapter.order}"
            say(f"{unknown} (DIR:ba = otherwise)")
    for name in ("model", "max_length", "truncation", "matmul"):
        if getattr(config, name) is None:
            setattr(config, name, recorded(adapters, name))
    check_folder(config.model)
    device = world.device()
    config.dtype = config.dtype or default_dtype(device, training=False)
    return device


def recorded(adapters: list[TrainedAdapter], name: str):
    """An option as the adapters were trained; all must agree, because one base serves them."""
    values = {adapter.folder: adapter.record.get(name, UNRECORDED.get(name)) for adapter in adapters}
    flag = "--" + name.replace("_", "-")
    if len(set(values.values())) > 1:
        raise ValueError(f"the adapters were trained with different {flag}: {values}: give {flag}")
    value = next(iter(values.values()))
    if value is None:
        raise ValueError(f"{flag} is needed: the adapters have no train_config.json that would tell")
    return value


def check_base(config: InferConfig, adapters: list[TrainedAdapter], typed: bool) -> dict[str, str]:
    """The base's fingerprint; ValueError where an adapter was trained on another base of the same name.

    typed: --model was given; then a line says that the base is another.
    """
    now = base_fingerprint(config.model)
    for adapter in adapters:
        before = adapter.record.get("base")
        changed = differences(before, now)
        if changed:
            words = f"{adapter.folder}: its base had other {' and '.join(changed)} than {config.model} has"
            if not typed:
                raise ValueError(f"{words}: type --model {config.model} if that is meant")
            say(words)
        if adapter.record and before is None and ids_changed(config.model):
            say(f"{adapter.folder}: trained with other token ids, transformers' own, than tokenizer.json's")
    return now
