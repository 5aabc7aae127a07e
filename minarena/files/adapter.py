"""The trained part, LoRA and head, on a model and on disk.

On disk it is PEFT's own format (https://github.com/huggingface/peft): adapter_config.json and
adapter_model.safetensors, whose names are ours behind "base_model.model.". PEFT loads these files and this
file loads PEFT's. Loading is strict: a tensor that is missing, left over or of another shape is an error that
names it, because a head left at its random initialisation predicts noise without any error. Refused by name:
what PEFT can do and LoRALinear cannot (DoRA, ranks that differ, ...), and settings that we do not know.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minarena.files.shards import number_problem, text_name
from minarena.lora import PROJECTIONS, layer_number
from minarena.model import AdapterConfig, adapter_tensors, attach_adapter_

PREFIX = "base_model.model."
KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal")  # init_lora_weights that leave W alone
# A plain LoRA's settings, as save_adapter writes them
PLAIN = {"use_dora": False, "fan_in_fan_out": False, "bias": "none"}
PLAIN |= {"rank_pattern": {}, "alpha_pattern": {}}
# PEFT's settings that decide no number of a trained LoRA, or that are read by name. Every other one must be
# off: a setting of a later PEFT, or of another tool, may mean another product.
KNOWN = {"peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"}
KNOWN |= {"inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"}
KNOWN |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"}
KNOWN |= {"init_lora_weights", "loftq_config", "eva_config", "corda_config", "megatron_core"}
KNOWN |= {"runtime_config", "qalora_group_size", "ensure_weight_tying"}
KNOWN |= {"lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"}  # ms-swift's
# The tensors of a head, by its kind (model.make_head)
HEADS = {
    "linear": {"score.weight"},
    "mlp": {"score.1.weight", "score.1.bias", "score.4.weight", "score.4.bias"},
}


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
        **PLAIN,
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + name: tensor.contiguous() for name, tensor in adapter_tensors(model).items()}
    save_file(tensors, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
    text = json.dumps(peft_config, indent=2) + "\n"
    (Path(folder) / "adapter_config.json").write_text(text, encoding="utf-8")


def our_name(name: str) -> str:
    """`base_model.model.model.layers.0...` -> `model.layers.0...`, also of a bare backbone or a text part."""
    name = text_name(name.removeprefix(PREFIX))
    return f"model.{name}" if name.startswith("layers.") else name


def unsupported(stored: dict) -> str:
    """The first setting under which an adapter is more than W + scale * B A over the base's own W, or ""."""
    for key, value in stored.items():
        if key not in KNOWN and value and value != PLAIN.get(key):
            return f"{key} {value!r}"
    if stored.get("init_lora_weights") not in KEEPS_BASE:  # PiSSA and the like
        return f"init_lora_weights {stored['init_lora_weights']!r}, which changed the base, too,"
    return ""


def head_kind(folder: str | Path, tensors: dict[str, Tensor]) -> str:
    """linear or mlp, by the tensors' names; ValueError for another kind, which would be lost in part."""
    found = {name for name in tensors if name.startswith("score")}
    for kind, names in HEADS.items():
        if found <= names:
            return kind if found else "mlp"
    other = sorted(found - HEADS["mlp"])[0]
    raise ValueError(f"{folder}: {other} is of no head that we know: score.weight alone, or our two linears")


def require_adapter(folder: str | Path, option: str = "--adapter") -> None:
    """ValueError where the option names no finished adapter."""
    if not (Path(folder) / "adapter_config.json").is_file():
        unfinished = (Path(folder) / "train_config.json").exists()
        reason = "its training is unfinished" if unfinished else "no adapter_config.json there"
        raise ValueError(f"{option} {folder}: {reason}")


def read_peft(folder: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """PEFT's settings as stored, the tensors by our names, on the CPU; ValueError if either is unusable."""
    try:
        stored = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(Path(folder) / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError, RecursionError) as error:
        pickled = (Path(folder) / "adapter_model.bin").exists()
        remedy = ": of a pickled adapter_model.bin PEFT makes one" if pickled else ""
        raise ValueError(f"{folder}: not a usable adapter: {error}{remedy}") from error
    if not isinstance(stored, dict) or stored.get("peft_type") != "LORA":
        raise ValueError(f"{folder}/adapter_config.json: its peft_type is not LORA")
    for key, kind in (("r", int), ("lora_alpha", int | float)):
        if not isinstance(stored.get(key), kind) or not 0 < stored[key] < math.inf:
            raise ValueError(f"{folder}/adapter_config.json: {key} {stored.get(key)!r}: must be above 0")
    tensors = {our_name(name): tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{folder}/adapter_model.safetensors: {name} is stored as {tensor.dtype}")
        if number_problem(tensor):
            raise ValueError(f"{folder}/adapter_model.safetensors: {name} has values that are not finite")
    return stored, tensors


def read_adapter(folder: str | Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The adapter's settings and its tensors by our names, on the CPU; ValueError if either is unusable."""
    stored, tensors = read_peft(folder)
    where = f"{folder}/adapter_config.json"
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if stored.get(key)]
    problem = f"{patterns[0]} {stored[patterns[0]]!r}" if patterns else unsupported(stored)
    if problem:
        raise ValueError(f"{where}: {problem} is not handled")
    check_targets(where, stored)
    r, layers, dropout = stored["r"], stored.get("layers_to_transform") or 0, stored.get("lora_dropout", 0.0)
    layers = layers if isinstance(layers, list) else [layers]
    for key, fits in (  # before matrices of that size are made
        ("r", type(r) is int and any(r in tensor.shape for tensor in tensors.values())),
        ("lora_dropout", isinstance(dropout, int | float) and 0 <= dropout < 1),
        ("layers_to_transform", all(isinstance(layer, int) for layer in layers)),
    ):
        if not fits:
            raise ValueError(f"{where}: {key} {stored[key]!r} does not fit the tensors")
    return AdapterConfig(
        r=r,
        alpha=stored["lora_alpha"] * (math.sqrt(r) if stored.get("use_rslora") else 1),  # alpha / sqrt r
        dropout=dropout,
        freeze_layers=min((layer_number(name) for name in tensors if ".lora_" in name), default=0),
        head=head_kind(folder, tensors),
    ), tensors


def check_targets(where: str, stored: dict) -> None:
    """ValueError where a list of targets leaves one of the seven out, or has another.

    A target may be a module's whole name (PEFT's all-linear writes such). A pattern is not followed: the
    tensors decide, and load_adapter_ checks them.
    """
    targets = stored.get("target_modules")
    if isinstance(targets, str):
        return
    names = [str(target).rpartition(".")[2] for target in targets or []]
    if set(names) - set(stored.get("modules_to_save") or []) != set(PROJECTIONS):
        raise ValueError(f"{where}: target_modules {targets}: not the seven projections")


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
    odd = sorted(wanted.keys() ^ tensors.keys())
    if odd:
        problem = "is missing" if odd[0] in wanted else "has no place in this model"
        raise ValueError(f"{folder}: tensor {odd[0]} {problem}: an adapter of another base or head?")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            shapes = f"{tuple(tensor.shape)}, this model needs {tuple(wanted[name].shape)}"
            reason = "an adapter of another base, rank or number of labels"
            raise ValueError(f"{folder}: tensor {name} is {shapes}: {reason}")
        wanted[name].copy_(tensor)
    return config
