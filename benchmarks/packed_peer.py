"""The fastest stack that public packages give for this work, on train_speed.py's rows.

    python benchmarks/packed_peer.py --shape 9b                              torch.compile on every layer
    python benchmarks/packed_peer.py --shape 9b --compile off --liger on     Liger's kernels instead
    python benchmarks/packed_peer.py --shape 9b --float8 rowwise             torchao's fp8 for frozen products
    python benchmarks/packed_peer.py --shape tiny --max-length 300 --token-budget 1024 --steps 2     on a CPU

What computes is theirs: transformers' Gemma-2 classifier with FlexAttention over packed rows (position_ids
that start anew, as TRL and axolotl pack), PEFT's LoRA, torch.compile or Liger, torchao, bitsandbytes' 8-bit
AdamW. The base is bf16, 18.5 GB at 9B: nothing is dequantized, which favours the peer. LoRA is bf16 as
well, where minarena's is fp32. minarena lends the rows, their deal to micro-batches and the head.

Every micro-batch is filled up to --token-budget with one row more, so that all have one shape:
FlexAttention under torch.compile may compile again for each new length.
"""

import argparse
import faulthandler
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks import random_base as base
from benchmarks.train_speed import SEED
from minarena.batching import real_tokens
from minarena.fast.packing import packed_micro_batches
from minarena.lora import PROJECTIONS
from minarena.model import make_head
from minarena.runtime.console import run_command


def main(argv: list[str] | None = None) -> dict:
    options = parse(argv)
    faulthandler.dump_traceback_later(90, repeat=True)  # where a compiler stands that does not come back
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = with_public_kernels(bf16_classifier(options, device, dtype), options).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(trained, device)
    count = (options.warmup + options.steps) * options.batch_size
    rows = base.random_rows(count, model.config.vocab_size, SEED, options.max_length)
    labels = np.random.default_rng(SEED).integers(0, 2, count)
    fills = []

    def step(number: int) -> tuple[int, float]:
        """(real tokens, seconds) of an optimiser step: forward, backward, clip, AdamW"""
        chosen = slice(number * options.batch_size, (number + 1) * options.batch_size)
        mine, answers = rows[chosen], labels[chosen]
        base.wait()
        start, loss = time.perf_counter(), 0.0
        piles = packed_micro_batches([len(row) for row in mine], options.token_budget)
        for pile in piles:
            logits = packed_logits(model, [mine[i] for i in pile], options.token_budget, device)
            target = torch.as_tensor(answers[pile], device=device)
            part = cross_entropy(logits, target, reduction="sum") / options.batch_size
            part.backward()
            loss += part.detach()
        nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the peer's loss is not finite at step {number}")
        base.wait()
        seconds = time.perf_counter() - start
        fills.append(real_tokens(mine) / (len(piles) * options.token_budget))
        print(f"step {number}: {real_tokens(mine)} tokens, {seconds:.3f} s, loss {loss:.3f}", file=sys.stderr)
        return real_tokens(mine), seconds

    warmup = [step(i) for i in range(options.warmup)]
    timed = [step(i) for i in range(options.warmup, options.warmup + options.steps)]
    weights = sum(m.weight.numel() for name, m in model.named_modules() if name.endswith("base_layer"))
    result = base.speed_figures(*zip(*timed, strict=True), 4 * weights)
    result |= {"peak_gib": base.peak_gib(), "fill": round(float(np.mean(fills[options.warmup :])), 3)}
    result |= {"warmup_seconds": [round(seconds, 2) for _, seconds in warmup]}
    names = [name for name in ("peft", "liger_kernel", "torchao", "bitsandbytes") if name in sys.modules]
    result |= {"versions": {name: getattr(sys.modules[name], "__version__", "?") for name in names}}
    base.print_result(vars(options), result)
    return result


def bf16_classifier(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """transformers' Gemma-2 classifier with random weights in `dtype` and minarena's MLP head."""
    # FlexAttention has no backward on a CPU; eager attention takes the same mask of packed rows
    attention = "flex_attention" if device.type == "cuda" else "eager"
    changes = dict(use_cache=False, num_labels=2)
    if options.layers:
        changes["num_hidden_layers"] = options.layers
    kind = "AutoModelForSequenceClassification"
    model = base.model_without_weights(options.shape, device, dtype, attention, kind, **changes)
    torch.manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        new = torch.empty(parameter.shape, dtype=dtype, device=device)
        new = new.zero_() if parent.endswith("norm") else new.normal_(std=0.02)  # Gemma's norm: 1 + weight
        setattr(model.get_submodule(parent), leaf, nn.Parameter(new, requires_grad=False))
    model.score = make_head("mlp", model.config.hidden_size, 0.1).to(device)
    return model


def with_public_kernels(model: nn.Module, options: argparse.Namespace) -> nn.Module:
    """Liger's kernels, PEFT's LoRA, torchao's fp8 and torch.compile, as asked."""
    from peft import LoraConfig, get_peft_model

    if options.liger == "on":
        from liger_kernel.transformers import apply_liger_kernel_to_gemma2

        apply_liger_kernel_to_gemma2(rope=True, fused_linear_cross_entropy=False, model=model)
    lora = dict(r=64, lora_alpha=4, lora_dropout=0.05, target_modules=list(PROJECTIONS))
    config = LoraConfig(**lora, modules_to_save=["score"], task_type="SEQ_CLS")
    peft = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(model.dtype)
    if options.float8 != "off":
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        settings = Float8LinearConfig.from_recipe_name(options.float8)
        frozen = dict(module_filter_fn=lambda module, name: name.endswith("base_layer"))
        convert_to_float8_training(peft, config=settings, **frozen)
    peft.enable_input_require_grads()  # so that the first layer has the same graph as the others
    if options.checkpointing == "on":
        peft.gradient_checkpointing_enable({"use_reentrant": False})
    if options.compile == "on":
        import torch._functorch.config as functorch

        functorch.activation_memory_budget = options.memory_budget
        torch._dynamo.config.recompile_limit = 64
        for layer in peft.base_model.model.model.layers:
            layer.compile()
    return peft


def packed_logits(model: nn.Module, rows: list[np.ndarray], budget: int, device: torch.device) -> Tensor:
    """Logits (rows, 2), fp32, of rows that lie one after the other in `budget` tokens."""
    lengths = [len(row) for row in rows]
    lengths.append(budget - sum(lengths))  # a row of padding, which no other sees
    ids = np.zeros((1, budget), dtype=np.int64)
    ids[0, : budget - lengths[-1]] = np.concatenate(rows)
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    last = torch.from_numpy(np.cumsum(lengths[:-1]) - 1).to(device)
    classifier = model.base_model.model
    ids, positions = (torch.from_numpy(x).to(device) for x in (ids, positions))
    hidden = classifier.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    return classifier.score(hidden[0, last].float())


def make_optimizer(trained: list[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    if device.type == "cpu":
        return torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
    import bitsandbytes as bnb

    return bnb.optim.AdamW8bit(trained, lr=2e-4, weight_decay=0.0)


def parse(argv: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--shape", choices=["9b", "2b", "tiny"], default="tiny")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before: compilation")
    parser.add_argument("--batch-size", type=int, default=16, help="rows a step")
    parser.add_argument("--max-length", type=int, default=2200, help="tokens of the longest row")
    parser.add_argument("--token-budget", type=int, default=7424, help="tokens a micro-batch; fp8: of 16")
    parser.add_argument("--compile", choices=["on", "off"], default="on", help="torch.compile of each layer")
    parser.add_argument("--memory-budget", type=float, default=0.8, help="of activations torch.compile keeps")
    parser.add_argument(
        "--liger", choices=["on", "off"], default="off", help="RMSNorm, GEGLU, rotary kernels"
    )
    parser.add_argument("--float8", choices=["rowwise", "tensorwise", "off"], default="off")
    parser.add_argument("--checkpointing", choices=["on", "off"], default="off")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
