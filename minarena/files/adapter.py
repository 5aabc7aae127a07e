"""The trained part, LoRA and head, on a model and on disk.

On disk it is PEFT's own format (https://github.com/huggingface/peft): adapter_config.json and
adapter_model.safetensors, whose names are ours behind "base_model.model.". PEFT loads these files and this
file loads PEFT's. Loading is strict: a tensor that is missing, left over or of another shape is an error that
names it, for a head that is quietly fresh predicts noise. Refused by name: what PEFT can do and LoRALinear
cannot (DoRA, ranks that differ, ...).
"""

import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minarena.lora import PROJECTIONS, layer_number
from minarena.model import AdapterConfig, adapter_tensors, attach_adapter_

PREFIX = "base_model.model."
KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal")  # init_lora_weights that leave W alone
NOT_HANDLED = {"use_dora": False, "fan_in_fan_out": False, "bias": "none"}  # as a plain LoRA has them
NOT_HANDLED |= {"rank_pattern": {}, "alpha_pattern": {}}


def save_adapter(folder: str | Path, model: nn.Module, config: AdapterConfig, base: str) -> None:
    """Write the two files; `base` is recorded as the name of the base model."""
    layers = 1 + max(layer_number(name) for name in adapter_tensors(model))
    peft_config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": base,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(PROJECTIONS),
        "layers_to_transform": list(range(config.freeze_layers, layers)) if config.freeze_layers else None,
        "modules_to_save": ["score"],
        "use_rslora": False,
        "inference_mode": True,
        **NOT_HANDLED,
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + name: tensor.contiguous() for name, tensor in adapter_tensors(model).items()}
    save_file(tensors, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
    (Path(folder) / "adapter_config.json").write_text(json.dumps(peft_config, indent=2) + "\n")


def is_finite(tensor: Tensor) -> bool:
    """Neither NaN nor infinity in it; unlike isfinite() this makes no copies of a large tensor."""
    return not tensor.numel() or all(bound.isfinite().item() for bound in tensor.aminmax())


def read_peft(folder: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """PEFT's settings as stored, the tensors by our names, on the CPU; ValueError if either is unusable."""
    try:
        stored = json.loads((Path(folder) / "adapter_config.json").read_text())
        tensors = load_file(Path(folder) / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError, RecursionError) as error:
        pickled = (Path(folder) / "adapter_model.bin").exists()
        remedy = ": of a pickled adapter_model.bin PEFT makes one" * pickled
        raise ValueError(f"{folder}: not a usable adapter: {error}{remedy}") from error
    if not isinstance(stored, dict) or stored.get("peft_type") != "LORA":
        raise ValueError(f"{folder}/adapter_config.json: its peft_type is not LORA")
    for key, kind in (("r", int), ("lora_alpha", int | float)):
        if not isinstance(stored.get(key), kind) or not 0 < stored[key] < math.inf:
            raise ValueError(f"{folder}/adapter_config.json: {key} {stored.get(key)!r}: must be above 0")
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{folder}/adapter_model.safetensors: {name} is stored as {tensor.dtype}")
        if not is_finite(tensor):
            raise ValueError(f"{folder}/adapter_model.safetensors: {name} has values that are not finite")
    return stored, tensors


def read_adapter(folder: str | Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The adapter's settings and its tensors by our names, on the CPU; ValueError if either is unusable."""
    stored, tensors = read_peft(folder)
    for key, plain in NOT_HANDLED.items():
        if stored.get(key, plain) not in (plain, None):
            raise ValueError(f"{folder}/adapter_config.json: {key} {stored[key]!r} is not handled")
    targets = stored.get("target_modules")
    if not isinstance(targets, list) or set(map(str, targets)) != set(PROJECTIONS):
        raise ValueError(f"{folder}/adapter_config.json: target_modules {targets}: not the seven projections")
    if stored.get("init_lora_weights") not in KEEPS_BASE:
        raise ValueError(f"{folder}: init_lora_weights {stored['init_lora_weights']!r} changed the base, too")
    r, layers, dropout = stored["r"], stored.get("layers_to_transform") or 0, stored.get("lora_dropout", 0.0)
    layers = layers if isinstance(layers, list) else [layers]
    for key, fits in (  # before matrices of that size are made
        ("r", type(r) is int and any(r in tensor.shape for tensor in tensors.values())),
        ("lora_dropout", isinstance(dropout, int | float) and 0 <= dropout < 1),
        ("layers_to_transform", all(isinstance(layer, int) for layer in layers)),
    ):
        if not fits:
            raise ValueError(f"{folder}/adapter_config.json: {key} {stored[key]!r} does not fit the tensors")
    return AdapterConfig(
        r=r,
        alpha=stored["lora_alpha"] * (math.sqrt(r) if stored.get("use_rslora") else 1),  # alpha / sqrt r
        dropout=dropout,
        freeze_layers=min(layers),
        head="linear" if "score.weight" in tensors else "mlp",
    ), tensors


def load_adapter_(model: nn.Module, folder: str | Path, **changes) -> AdapterConfig:
    """Put the adapter in `folder` onto `model` in place, whatever adapter it had; returns its settings.

    changes: fields of AdapterConfig that the file does not fix (dropout, head_dropout). Raises ValueError
    that names the first tensor that is missing, left over, or of another shape (another base, rank or number
    of labels).
    """
    config, tensors = read_adapter(folder)
    config = AdapterConfig(**{**asdict(config), **changes})
    attach_adapter_(model, config)
    wanted = adapter_tensors(model)
    for name in sorted(wanted.keys() ^ tensors.keys()):
        problem = "is missing" if name in wanted else "has no place in this model"
        raise ValueError(f"{folder}: tensor {name} {problem}: an adapter of another base or head?")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            shapes = f"{tuple(tensor.shape)}, this model needs {tuple(wanted[name].shape)}"
            raise ValueError(
                f"{folder}: tensor {name} is {shapes}: an adapter of another base, rank or number of labels"
            )
        wanted[name].copy_(tensor)
    return config
