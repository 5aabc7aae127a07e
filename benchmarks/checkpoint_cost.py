"""Seconds that one checkpoint takes: written, flushed to the disk, renamed; and read again.

    python benchmarks/checkpoint_cost.py --shape 9b --folder runs/cost      2.7 GB of disk; deleted at the end

The trained part of a 9B (r 64 and the mlp head, 222,500,098 parameters) is in memory as random numbers, with
the state of bitsandbytes' 8-bit AdamW, also random. On a GPU the copies from it come on top: not in here. The
disk decides, so run it on the one that the checkpoints will be on.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from bitsandbytes.optim import AdamW8bit
from torch import nn
from transformers import AutoModel

from benchmarks.random_base import SHAPES, print_result, shape_config
from minarena.files.checkpoint import save_checkpoint
from minarena.files.resume import load_checkpoint_
from minarena.model import AdapterConfig, PreferenceModel, attach_adapter_
from minarena.optim import trainable


def trained_part(shape: str) -> tuple[nn.Module, AdapterConfig, torch.optim.Optimizer]:
    """A model of which only what is trained takes memory, and its optimiser with a full state."""
    with torch.device("meta"):
        backbone = AutoModel.from_config(shape_config(shape)).requires_grad_(False)
        model = PreferenceModel(backbone, nn.Identity())
    config = AdapterConfig(r=64)
    attach_adapter_(model, config)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                setattr(module, name, nn.Parameter(torch.randn(parameter.shape)))
    optimizer = AdamW8bit(trainable(model), lr=0.0, weight_decay=0.0)
    for i, parameter in enumerate(trainable(model)):
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, i)
        for name in ("state1", "state2"):
            state = optimizer.state[parameter][name]
            state.random_(0, 256) if state.dtype == torch.uint8 else state.normal_()
    return model, config, optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="9b")
    parser.add_argument("--folder", required=True)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    model, config, optimizer = trained_part(options.shape)
    Path(options.folder).mkdir(parents=True)
    saved, read = [], []
    try:
        for step in range(1, options.repeats + 1):
            start = time.perf_counter()
            save_checkpoint(options.folder, step, model, optimizer, config, options.shape)
            saved.append(round(time.perf_counter() - start, 2))
        size = sum(file.stat().st_size for file in Path(options.folder, f"checkpoint-{step}").iterdir())
        start = time.perf_counter()
        load_checkpoint_(options.folder, model, optimizer)
        read.append(round(time.perf_counter() - start, 2))
    finally:
        shutil.rmtree(options.folder)
    result = {"parameters": sum(p.numel() for p in trainable(model)), "bytes": size}
    print_result(vars(options), result | {"save_seconds": saved, "resume_seconds": read})


if __name__ == "__main__":
    main()
