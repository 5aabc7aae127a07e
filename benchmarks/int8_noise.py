"""What `--matmul int8` changes by rounding activations: hidden states, LoRA's gradients, fifty losses.

    python benchmarks/int8_noise.py --model SmolLM2-135M --data train.parquet --eval-data valid.parquet
    python benchmarks/int8_noise.py --losses

On a real base: the last hidden state of held-out rows against the float base in fp32, for several numbers of
outlier columns, found on the fixed texts or on rows of --data; and the gradient of every lora_A and lora_B
against exact products of the same int8 weights. Products are plain PyTorch in fp32 (RoundedProduct). On a GPU
bitsandbytes' LLM.int8, fp16 inside, stands beside them.

--losses: fifty steps of a small Gemma-2 (four layers, soft-cap, every other with a window) on the same rows
from the same start, dropout off: in fp32, then as train.py computes on this device, by dequantized weights
and int8 by int8.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.random_base import print_result
from minarena.fast.path import take_fast_path_
from minarena.files.base import load_backbone
from minarena.files.outliers import (
    COLUMN_PAIRS,
    COLUMNS,
    last_hidden,
    outlier_columns,
    relative_change,
    use_columns_,
)
from minarena.files.pairs import read_pairs
from minarena.files.tokenizer import load_tokenizer
from minarena.lora import layer_number
from minarena.model import (
    DTYPES,
    AdapterConfig,
    PreferenceModel,
    attach_adapter_,
    default_dtype,
    residual_dtype,
)
from minarena.optim import make_optimizer
from minarena.rows import Batch
from minarena.runtime.console import run_command, say
from minarena.step import Compute, train_step
from minarena.text import encode
from minarena.tiny import byte_tokenizer, demo_pairs, write_tiny

KS = [0, 8, 32, 64, 128]
LONGEST = 512  # tokens of a row


def main(argv: list[str] | None = None) -> dict:
    options = parse(argv)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if options.losses:
        result = {"losses": fifty_losses(device)}
    else:
        tokenizer = load_tokenizer(options.model)
        tables = {"fixed": demo_pairs(COLUMN_PAIRS, seed=0), "data": read_pairs([options.data], COLUMN_PAIRS)}
        texts = {name: encode(tokenizer, table, LONGEST) for name, table in tables.items()}
        held_out = read_pairs([options.eval_data], options.rows)
        rows = encode(tokenizer, held_out, LONGEST)
        result = {"hidden": hidden_errors(options.model, device, rows, texts)}
        chosen = rows[: options.gradient_rows], held_out["label"].to_numpy()[: options.gradient_rows]
        result["gradients"] = gradient_errors(options.model, device, *chosen, texts["fixed"])
    print_result(vars(options), result)
    return result


def hidden_errors(model: str, device: torch.device, rows: list, texts: dict[str, list]) -> dict[str, float]:
    """The median over rows of |h - h of the float base| / |h of the float base|, for each product."""
    exact = last_hidden(load_backbone(model, device, torch.float32, quantize=False), rows)
    base, errors = load_backbone(model, device, torch.float32), {}

    def measure(name: str, backbone: nn.Module) -> None:
        error = relative_change(last_hidden(backbone, rows), exact).median().item()
        errors[name] = round(error, 4)
        say(f"last hidden state, {name}: {errors[name]:.4f}")

    measure("dequant", base)
    for k in KS:
        found = {name: outlier_columns(base, some, k) for name, some in texts.items()}
        for name in found if k else ["fixed"]:
            use_columns_(base, found[name])
            measure(f"int8, {k} columns of the {name} texts", base)
        shared = [
            len(set(a.tolist()) & set(found["data"][n].tolist())) / max(k, 1)
            for n, a in found["fixed"].items()
        ]
        errors[f"shared columns, {k}"] = round(float(np.mean(shared)), 3)
    if device.type == "cuda":
        measure("LLM.int8", load_backbone(model, device, torch.float16, matmul="llm-int8"))
    return errors


def gradient_errors(model: str, device: torch.device, rows: list, labels: np.ndarray, texts: list) -> dict:
    """LoRA's gradients of one step against exact products: cosine and relative error, whole and by matrix."""
    exact = gradients(load_backbone(model, device, torch.float32), rows, labels)
    found = {}
    products = ["int8, 0 columns", f"int8, {COLUMNS} columns"]
    if device.type == "cuda":
        products.append("LLM.int8")
    for name in products:
        backbone = load_backbone(
            model, device, torch.float32, matmul="llm-int8" if name == "LLM.int8" else "dequant"
        )
        if name.startswith("int8"):
            use_columns_(backbone, outlier_columns(backbone, texts, int(name.split()[1])))
        got = gradients(backbone, rows, labels)
        cosines = {key: torch.cosine_similarity(got[key], exact[key], dim=0).item() for key in exact}
        relative = {key: ((got[key] - exact[key]).norm() / exact[key].norm()).item() for key in exact}
        one, other = torch.cat(list(got.values())), torch.cat(list(exact.values()))
        worst = min(cosines, key=cosines.get)
        found[name] = {
            "cosine": torch.cosine_similarity(one, other, dim=0).item(),
            "relative": ((one - other).norm() / other.norm()).item(),
            "median_cosine": float(np.median(list(cosines.values()))),
            "median_relative": float(np.median(list(relative.values()))),
            "worst": worst,
            "worst_cosine": cosines[worst],
            "worst_relative": max(relative.values()),
            "cosine_by_layer": by_layer(cosines),
        }
        say(f"gradients, {name}: " + ", ".join(f"{k} {v}" for k, v in list(found[name].items())[:-1]))
    return found


def by_layer(cosines: dict[str, float]) -> list[float]:
    """The least cosine of each layer's matrices."""
    layers: dict[int, float] = {}
    for name, value in cosines.items():
        number = layer_number(name)
        layers[number] = min(round(value, 4), layers.get(number, 1.0))
    return [layers[number] for number in sorted(layers)]


def gradients(backbone: nn.Module, rows: list, labels: np.ndarray) -> dict[str, Tensor]:
    """name -> gradient (parameters,) float64, of every lora_A and lora_B of a new adapter whose lora_B is not
    zero. rows: token ids, one array a row; labels (rows,): 1.0 where the answer shown first wins. The loss is
    in nats, the mean over the rows."""
    model = PreferenceModel(backbone, nn.Identity())
    attach_adapter_(model, AdapterConfig(dropout=0.0, head_dropout=0.0), seed=1)
    tuned = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    torch.manual_seed(2)
    for name, p in tuned.items():
        if "lora_B" in name:
            p.data.copy_(torch.randn(p.shape) * 0.02)
    step(model, make_optimizer(model, 0.0), rows, labels, 0.0, torch.float32)
    return {name: p.grad.detach().flatten().double().clone() for name, p in tuned.items()}


def step(model, optimizer, rows, labels, lr: float, dtype: torch.dtype) -> float:
    """One optimiser step without clipping; returns its loss."""
    ones = np.ones(len(rows))
    compute = Compute(dtype, token_budget=4096)
    return train_step(
        model, optimizer, Batch(rows, labels, ones, ones.sum(), []), lr, compute, max_grad_norm=1e9
    )[0]


def fifty_losses(device: torch.device) -> dict[str, list[float]]:
    """The losses of fifty steps of 8 rows at lr 1e-3, for each product."""
    table = demo_pairs(400, seed=3)
    own = DTYPES[default_dtype(device, training=True)]
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_tiny(folder, num_hidden_layers=4)
        rows, labels = encode(byte_tokenizer(), table, LONGEST), table["label"].to_numpy()
        for name, dtype, fast in [
            ("fp32", torch.float32, False),
            ("dequant", own, True),
            ("int8", own, True),
        ]:
            backbone = load_backbone(folder, device, dtype)
            if name == "int8":
                use_columns_(backbone, outlier_columns(backbone, rows[:8], 8))
            model = PreferenceModel(backbone, nn.Identity(), residual_dtype(device, dtype))
            attach_adapter_(model, AdapterConfig(r=16, alpha=16, dropout=0.0, head_dropout=0.0), seed=1)
            if fast:
                take_fast_path_(model, dtype)
            optimizer = make_optimizer(model, 0.0)
            batches = [slice(8 * k, 8 * k + 8) for k in range(50)]
            losses[name] = [step(model, optimizer, rows[b], labels[b], 1e-3, dtype) for b in batches]
    for name in ("dequant", "int8"):
        difference = np.abs(np.subtract(losses[name], losses["fp32"]))
        say(f"{name} against fp32: {difference.mean():.4f} on average, {difference.max():.4f} at most")
    return losses


def parse(argv: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", help="folder of a float base")
    parser.add_argument("--data", help="rows on which outlier columns are found, beside the fixed texts")
    parser.add_argument("--eval-data", help="rows that are compared")
    parser.add_argument("--rows", type=int, default=64, help="rows of the hidden states")
    parser.add_argument("--gradient-rows", type=int, default=8, help="rows of the gradients")
    parser.add_argument("--losses", action="store_true", help="fifty losses of a small Gemma-2 instead")
    options = parser.parse_args(argv)
    if not options.losses and not (options.model and options.data and options.eval_data):
        parser.error("give --model, --data and --eval-data, or --losses")
    return options


if __name__ == "__main__":
    run_command(main)
