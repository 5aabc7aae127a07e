"""Trained adapters: found in their folders, and the options and the base that all of them agree on.

    found = find_ensemble_(config, world)     of config.adapter: DIR, or DIR:ba; config's None: as in training
    base = check_base(found)                 its fingerprint; another base of the same name is refused

One base serves all, so what was not typed must be the same in all their records. What it does not do: load
weights (predict.py).
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from minarena.config import UNRECORDED, InferConfig, TrainConfig, choices
from minarena.dist import World
from minarena.files.adapter import require_adapter
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


@dataclass
class Ensemble:
    """Adapters over one base. config: model, max_length, truncation, matmul and dtype have values. typed:
    whether --model was typed."""

    adapters: list[TrainedAdapter]
    config: InferConfig
    device: torch.device
    typed: bool


def find_ensemble_(config: InferConfig, world: World) -> Ensemble:
    """Fills in, in place, what was not typed: as the adapters were trained."""
    adapters, typed = [find_adapter(argument) for argument in config.adapter], config.model is not None
    for adapter in adapters:
        if not adapter.record:
            order = f"taken as order {adapter.order} (DIR:ba = otherwise)"
            say(f"{adapter.folder}: no train_config.json, {order}")
    for name in ("model", "max_length", "truncation", "matmul"):
        if getattr(config, name) is None:
            setattr(config, name, recorded(adapters, name))
    check_folder(config.model)
    device = world.device()
    config.dtype = config.dtype or default_dtype(device, training=False)
    return Ensemble(adapters, config, device, typed)


def find_adapter(argument: str) -> TrainedAdapter:
    """`DIR` or `DIR:ba` -> the adapter; an order in the argument wins over the recorded one.

    Raises ValueError where there is no finished adapter, or where its record is damaged.
    """
    orders = choices(TrainConfig, "order")
    folder, _, order = argument.rpartition(":")
    if order not in orders:
        folder, order = argument, ""
    require_adapter(folder)
    home = Path(folder).resolve()  # the record of a checkpoint stands in its run's folder
    path = (home.parent if home.name.startswith("checkpoint-") else home) / "train_config.json"
    record = read_record(path) if path.exists() else {}
    order = order or record.get("order", UNRECORDED["order"])
    if order not in orders:
        raise ValueError(f"{path}: order {order!r}: must be ab, ba or both")
    model, length = record.get("model", "tiny"), record.get("max_length", UNRECORDED["max_length"])
    fits = {"model": isinstance(model, str) and model, "max_length": isinstance(length, int) and length >= 8}
    for name in ("truncation", "matmul"):
        fits[name] = record.get(name, UNRECORDED[name]) in choices(TrainConfig, name)
    for name, right in fits.items():
        if not right:
            raise ValueError(f"{path}: {name} {record[name]!r}: not what train.py writes")
    return TrainedAdapter(folder, order, record)


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


def check_base(found: Ensemble) -> dict[str, str]:
    """The base's fingerprint; ValueError where an adapter was trained on another base of the same name, or
    where --model was typed a line that says so."""
    now, model = base_fingerprint(found.config.model), found.config.model
    for adapter in found.adapters:
        before = adapter.record.get("base")
        changed = differences(before, now)
        if changed:
            words = f"{adapter.folder}: its base had other {' and '.join(changed)} than {model} has"
            if not found.typed:
                raise ValueError(f"{words}: type --model {model} if that is meant")
            say(words)
        if adapter.record and before is None and ids_changed(model):
            say(f"{adapter.folder}: trained with other token ids, transformers' own, than tokenizer.json's")
    return now
