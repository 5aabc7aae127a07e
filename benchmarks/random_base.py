"""A base of any size with random 8-bit weights, random rows, and the figures that the speed scripts print.

Speed and memory depend on shapes, not on what was learnt, so no download is needed: the model is made on the
meta device (no memory), then each projection is drawn and quantized by bitsandbytes on its own, on the GPU:
about a second for 9B. What it is not good for: quality, and LLM.int8's outliers, which random weights lack.
"""

import argparse
import json
import platform
import resource

import numpy as np
import torch
from torch import nn

from minarena.batching import real_tokens
from minarena.fast import blocks
from minarena.fast.packing import padded_length
from minarena.files.durable import commit
from minarena.lora import PROJECTIONS
from minarena.tiny import tiny_config

MEASURED_CEILING = 700  # TFLOP/s: bf16 products of 9B's shapes alone on an H100 gave 670-790
GEMMA2 = dict(head_dim=256, query_pre_attn_scalar=256, sliding_window=4096, vocab_size=256_000)
SHAPES = {
    "9b": GEMMA2 | dict(hidden_size=3584, intermediate_size=14336, num_hidden_layers=42),
    "2b": GEMMA2 | dict(hidden_size=2304, intermediate_size=9216, num_hidden_layers=26),
    "smollm2": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, vocab_size=49_152),
    "tiny": {},
}
HEADS = {"9b": (16, 8), "2b": (8, 4), "smollm2": (9, 3), "tiny": (4, 2)}  # of queries, of keys and values


def shape_config(shape: str, **changes):
    """transformers' configuration: Gemma-2 at 9b, 2b and tiny; SmolLM2-135M's Llama at smollm2."""
    from transformers import LlamaConfig

    heads, kv_heads = HEADS[shape]
    settings = SHAPES[shape] | dict(num_attention_heads=heads, num_key_value_heads=kv_heads) | changes
    if shape == "smollm2":
        return LlamaConfig(**dict(max_position_embeddings=8192, pad_token_id=0) | settings)
    return tiny_config(**dict(initializer_range=0.02) | settings)


def random_model(
    shape: str, device: torch.device, dtype: torch.dtype, attention: str, kind: str, **changes
) -> nn.Module:
    """A frozen transformers model on `device`: random weights, projections as bitsandbytes' Linear8bitLt.

    dtype: of embeddings and norms. attention: transformers' attn_implementation. kind: the Auto class that
    makes it, AutoModel or AutoModelForSequenceClassification (replace its head, which stays on the meta
    device).
    """
    model = model_without_weights(shape, device, dtype, attention, kind, **changes)
    torch.manual_seed(0)
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if leaf in PROJECTIONS:
            setattr(model.get_submodule(parent), leaf, random_int8(module, device))
        elif isinstance(module, nn.Embedding):
            weight = torch.empty(module.weight.shape, dtype=dtype, device=device).normal_(std=0.02)
            module.weight = nn.Parameter(weight)
        elif leaf.endswith("norm"):  # Gemma-2 multiplies by 1 + weight, Llama by weight
            start = torch.full(module.weight.shape, float(shape == "smollm2"), dtype=dtype, device=device)
            module.weight = nn.Parameter(start)
    model.is_loaded_in_8bit = True  # what transformers' loader sets and PEFT reads
    return model.requires_grad_(False)


def model_without_weights(
    shape: str, device: torch.device, dtype: torch.dtype, attention: str, kind: str, **changes
) -> nn.Module:
    """random_model's model with its parameters on the meta device and its buffers on `device`."""
    import transformers

    def made(**smaller):
        config = shape_config(shape, **changes | smaller)
        return getattr(transformers, kind).from_config(config, attn_implementation=attention, dtype=dtype)

    with torch.device("meta"):
        model = made()
    # what __init__ computes (rotary frequencies, Gemma's scale of the embeddings) comes from one small layer
    small = dict(made(num_hidden_layers=1, intermediate_size=8, vocab_size=8).named_buffers())
    for name, _ in list(model.named_buffers()):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, small[name].to(device))
    return model


def random_int8(linear: nn.Linear, device: torch.device) -> nn.Module:
    """A Linear8bitLt (threshold 6.0, the recipe's) of the same shape; `.to` would not quantize on a GPU."""
    import bitsandbytes as bnb

    C_out, C_in = linear.weight.shape
    new = bnb.nn.Linear8bitLt(C_in, C_out, bias=False, has_fp16_weights=False, threshold=6.0, device="meta")
    weight = torch.randn(C_out, C_in, device=device) * 0.02
    new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)._quantize(device)
    return new


def projection_weights(model: nn.Module) -> int:
    """Weights of the seven projections of all layers: 8.32e9 at 9b. They cost 2 FLOP a token and weight."""
    bases = (m for name, m in model.named_modules() if name.removesuffix(".base_layer").endswith(PROJECTIONS))
    return sum(m.in_features * m.out_features for m in bases if hasattr(m, "in_features"))


def random_rows(rows: int, vocabulary: int, seed: int, max_length: int = 2200) -> list[np.ndarray]:
    """Rows of random ids. Lengths are near the real data's (mean 1,242 there): lognormal, median 950, sigma
    0.75, clipped to 32..2200; a smaller max_length scales all of it. Ids 0-3 are special and stay out. The
    first rows are the same however many are drawn: lengths and ids come from generators of their own."""
    of_lengths, of_ids = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    lengths = np.clip(of_lengths.lognormal(np.log(950), 0.75, rows), 32, 2200) * max_length / 2200
    return [of_ids.integers(4, vocabulary, max(2, int(n)), dtype=np.int32) for n in lengths]


def fill(rows: list[np.ndarray], batches: list, packed: bool = False) -> float:
    """Share of real tokens in `batches` (row numbers), padded to the longest, or packed as the fast path
    does."""
    if packed:
        slots = sum(padded_length(len(rows[i])) for batch in batches for i in batch)
    else:
        slots = sum(len(batch) * max(len(rows[i]) for i in batch) for batch in batches)
    return round(real_tokens(rows[i] for batch in batches for i in batch) / slots, 3)


def speed_figures(tokens: list[int], seconds: list[float], flop_a_token: float) -> dict:
    """Figures over several steps or passes of `tokens` real tokens that took `seconds`.

    flop_a_token: of the frozen products alone (4 a weight in training: forward and gradient of the input; 2
    in inference), so tflops says how far from those products' own speed everything is.
    """
    speeds = np.array(tokens) / np.array(seconds)
    tflops = float(np.median(speeds)) * flop_a_token / 1e12
    return {
        "tokens_per_second": round(float(np.median(speeds)), 1),
        "min": round(float(speeds.min()), 1),
        "max": round(float(speeds.max()), 1),
        "all_tokens_by_all_seconds": round(sum(tokens) / sum(seconds), 1),
        "seconds_each": round(float(np.median(seconds)), 4),
        "tokens_each": round(float(np.mean(tokens)), 1),
        "times_measured": len(seconds),
        "tflops_of_base": round(tflops, 2),
        "share_of_ceiling": round(tflops / MEASURED_CEILING, 3),
    }


def peak_gib() -> float:
    """Most memory held so far: a GPU's tensors, or on a CPU the resident process."""
    on_gpu = torch.cuda.is_available()
    peak = (
        torch.cuda.max_memory_allocated()
        if on_gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return round(peak / 2**30, 2)


def count_exchanged_() -> list[int]:
    """The bytes of each tensor that is handed to all_reduce from here on: a list that grows."""
    real, counts = torch.distributed.all_reduce, []

    def all_reduce(tensor, *arguments, **keywords):
        counts.append(tensor.nbytes)
        return real(tensor, *arguments, **keywords)

    torch.distributed.all_reduce = all_reduce
    return counts


def wait() -> None:
    """Until the GPU has done what was asked: without it, only the asking is timed."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def add_card_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shared-memory", type=int, metavar="KIB", help="blocks of a GPU with less: 99, 163")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="use no more of this GPU's memory")


def be_smaller_card_(options: argparse.Namespace) -> None:
    """Take the kernels' blocks and the memory of the smaller card that the options name, in this process.

    Its speed is this GPU's. A 24 GB card has 23.7 GiB, of which CUDA itself takes about half a GiB.
    """
    if options.shared_memory:
        blocks.shared_memory = lambda device: options.shared_memory
    if options.gpu_memory:
        limit, real = int(options.gpu_memory * 2**30), torch.cuda.mem_get_info
        torch.cuda.set_per_process_memory_fraction(limit / real()[1])

        def mem_get_info():  # what fit_layers_ reads
            return min(real()[0], limit - torch.cuda.memory_reserved()), limit

        torch.cuda.mem_get_info = mem_get_info


def print_result(options: dict, result: dict) -> None:
    """The script's last line: figures, options, device, versions and commit as one JSON object."""
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps(result | {"options": options, "device": device, "commit": commit()} | versions))
