"""Peak memory and time of quantize.py on a random checkpoint that does not fit into the memory it may take.

    python benchmarks/quantize_memory.py --shape 9b --folder big     28 GB of disk for the while, 865 MB more
                                                                     for the adapter; deleted at the end
    python benchmarks/quantize_memory.py --shape 2b --rank 0 --folder big      without an adapter

What counts is anonymous memory (RssAnon): pages of mapped files also show up in a process's resident size,
but the system takes them back whenever it needs them. It is sampled from outside, every 5 ms from the
process's first moment, so Python, torch and the tokenizer are in the peak. --tokenizer takes a real one's
folder: the demo's byte tokenizer, which is used else, is smaller than Gemma's by hundreds of MB.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from benchmarks.random_base import SHAPES, print_result, shape_config
from minarena.files.shards import Layout, cut_into_shards, write_index, write_shard
from minarena.files.tokenizer import load_tokenizer
from minarena.lora import PROJECTIONS
from minarena.tiny import byte_tokenizer

REPOSITORY = Path(__file__).parents[1]
SOURCE_SHARD = 5_000_000_000  # bytes, as the hub's own files


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    folder = Path(options.folder)
    folder.mkdir(parents=True)
    try:
        start = time.perf_counter()
        size = write_checkpoint(folder / "base", options.shape, options.tokenizer)
        command = ["--model", str(folder / "base"), "--out", str(folder / "8bit")]
        if options.rank:
            write_adapter(folder / "adapter", options.shape, options.rank)
            command += ["--adapter", str(folder / "adapter")]
        made = time.perf_counter() - start
        command = [sys.executable, "quantize.py", *command]
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        first, peak = watch(process)
        said = process.communicate()[0]
        if process.returncode:
            raise SystemExit(process.returncode)
        result = json.loads(said.splitlines()[-1])
    finally:
        shutil.rmtree(folder)
    figures = {"source_gb": size / 1e9, "written_gb": result["bytes"] / 1e9, "merged": result["merged"]}
    figures |= {"peak_anonymous_gb": (peak - first) / 1e9, "seconds": result["seconds"]}
    figures |= {"times_smaller_than_source": size / (peak - first), "seconds_to_make_source": made}
    print_result(vars(options), {name: round(value, 3) for name, value in figures.items()})


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--folder", required=True, help="is made for the checkpoint and deleted afterwards")
    parser.add_argument("--rank", type=int, default=64, help="of a random adapter to merge; 0 = none")
    parser.add_argument("--tokenizer", help="folder of the tokenizer to give to the checkpoint")
    return parser.parse_args(argv)


def watch(process: subprocess.Popen) -> tuple[int, int]:
    """(first, largest) bytes of anonymous memory of the running process."""
    samples = []
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        if "RssAnon:" in status:  # a process that has just ended has none
            samples.append(1024 * int(status.partition("RssAnon:")[2].split()[0]))
        time.sleep(0.005)
    return samples[0], max(samples)


def write_checkpoint(folder: Path, shape: str, tokenizer: str | None) -> int:
    """A causal language model in bf16 with random weights, shard by shard; returns its bytes."""
    from transformers import AutoModelForCausalLM

    folder.mkdir()
    config = shape_config(shape, dtype="bfloat16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}  # a tied head is not listed again
    layouts = [Layout(name, "BF16", size) for name, size in shapes.items()]
    shards = cut_into_shards([[layout] for layout in layouts], SOURCE_SHARD)
    for file, group in shards.items():
        write_shard(folder / file, group, random_tensors(group))
    write_index(folder, shards)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    (load_tokenizer(tokenizer) if tokenizer else byte_tokenizer()).save_pretrained(folder)
    return sum(layout.bytes() for layout in layouts)


def write_adapter(folder: Path, shape: str, r: int) -> None:
    """A random LoRA on all projections, in PEFT's format."""
    from transformers import AutoModel

    folder.mkdir()
    with torch.device("meta"):
        model = AutoModel.from_config(shape_config(shape))
    layouts = []
    for name, module in model.named_modules():
        if name.endswith(PROJECTIONS):
            prefix = f"base_model.model.model.{name}.lora_"
            layouts.append(Layout(f"{prefix}A.weight", "F32", (r, module.in_features)))
            layouts.append(Layout(f"{prefix}B.weight", "F32", (module.out_features, r)))
    write_shard(folder / "adapter_model.safetensors", layouts, random_tensors(layouts))
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 4, "target_modules": list(PROJECTIONS)}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def random_tensors(layouts: list[Layout]) -> Iterator[Tensor]:
    """Normal numbers of standard deviation 0.02; a block of 4M of them, turned, stands for all the rest."""
    block = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02
    for i, layout in enumerate(layouts):
        drawn = block.roll(i * 4099).to({"BF16": torch.bfloat16, "F32": torch.float32}[layout.dtype])
        count = torch.Size(layout.shape).numel()
        yield drawn.repeat(math.ceil(count / len(drawn)))[:count].view(layout.shape)


if __name__ == "__main__":
    main()
