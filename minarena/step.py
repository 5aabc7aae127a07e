"""One optimiser step and one prediction, as functions that train.py and infer.py call in order.

    compute = Compute(torch.bfloat16, pad_id=0, token_budget=8192)
    loss, grad_norm = train_step(model, optimizer, share, lr_at(step, steps, 2e-4, 0.025), compute)
    p = predict_p_first(model, rows, compute)           P(the answer shown first wins), (rows,)

What is optimised and logged is the weighted mean, over a step's rows on all ranks, of the cross-entropy
between the label and the two logits. How the rows are cut into micro-batches does not change it, up to
rounding (and dropout's masks, which are drawn a micro-batch at a time). metrics.py evaluates the same
quantity, unweighted and without label smoothing.

    token ids of rows -> micro-batch (B, T) -> hidden (B, T, C) -> last token (B, C) -> logits (B, 2) -> loss

What it does not do: choose the rows of a step (batching.py), or decide when to save (train.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import log_softmax
from tqdm import tqdm

from minarena.batching import collate, micro_batches
from minarena.dist import SINGLE_PROCESS, World
from minarena.model import PreferenceModel
from minarena.rows import Batch


@dataclass
class Compute:
    """Settings that change rounding, speed and dropout's masks, and nothing else."""

    dtype: torch.dtype = torch.float32  # of the products, under autocast
    pad_id: int = 0
    token_budget: int = 4096  # tokens of a micro-batch, padding included
    halve_on_oom: bool = False  # --token-budget auto: runtime/memory.py may halve token_budget, in place


def make_compute(
    token_budget: int | str, device: torch.device, dtype: torch.dtype, pad_id: int, training: bool
) -> Compute:
    """The settings of `--token-budget`. auto: 8,192 tokens to train on a GPU, 4,096 on a CPU, 16,384 to
    predict; halved where the GPU's memory is full."""
    if token_budget != "auto":
        return Compute(dtype, pad_id, token_budget)
    tokens = 16384
    if training:
        tokens = 8192 if device.type == "cuda" else 4096
    return Compute(dtype, pad_id, tokens, halve_on_oom=True)


def preference_loss(logits: Tensor, p_first: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with soft labels, in nats and fp32.

    logits (B, 2), p_first (B,) = P(the first answer wins); returns (B,).
    """
    p = p_first * (1 - label_smoothing) + label_smoothing / 2
    log_p = log_softmax(logits.float(), dim=-1)
    return -p * log_p[:, 0] - (1 - p) * log_p[:, 1]


def weighted_loss(logits: Tensor, p_first: Tensor, weights: Tensor, label_smoothing: float) -> Tensor:
    """What a micro-batch adds to the loss: sum(weights * cross-entropy), a 0-dim fp32 tensor.

    weights (B,): of the rows, divided by the weights of the whole step.
    """
    return (preference_loss(logits, p_first, label_smoothing) * weights).sum()


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The forward pass computes in `dtype`; fp32 is no autocast at all."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def without_cudnn_attention():
    """A context in which SDPA does not use cuDNN, whose backward gives NaN with a mask at some widths.

    https://github.com/pytorch/pytorch/issues/196678. Keep it around the backward as well: recomputed layers
    select an attention kernel again.
    """
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def cut_micro_batches(
    model: PreferenceModel, rows: Sequence[np.ndarray], token_budget: int
) -> list[np.ndarray]:
    """Positions in `rows` of each micro-batch: packed ones on the fast path, padded ones elsewhere."""
    cut = model.fast.micro_batches if model.fast else micro_batches
    return cut([len(row) for row in rows], token_budget)


def row_logits(model: PreferenceModel, rows: Sequence[np.ndarray], compute: Compute) -> Tensor:
    """Logits (B, 2), fp32, of B rows of token ids: one micro-batch."""
    if model.fast:
        return model.fast.logits(model, rows)
    device = next(model.parameters()).device
    with autocast(device, compute.dtype):
        return model(*collate(rows, compute.pad_id, device))


def seed_dropout(seed: int, step: int, rank: int = 0) -> None:
    """Seed torch's global generator from (seed, step, rank): a resumed run needs no generator state."""
    torch.manual_seed(
        int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    )


def accumulate_(
    model: PreferenceModel,
    rows: Sequence[np.ndarray],
    p_first: Tensor,
    weights: Tensor,
    label_smoothing: float,
    compute: Compute,
) -> Tensor:
    """Forward and backward of one micro-batch: add its gradient to every p.grad, in place; returns its loss.

    p_first and weights (rows,), on the CPU.
    """
    device = next(model.parameters()).device
    p_first, weights = (x.to(device, non_blocking=True) for x in (p_first, weights))
    with without_cudnn_attention():
        loss = weighted_loss(row_logits(model, rows, compute), p_first, weights, label_smoothing)
        loss.backward()
    return loss.detach()


def train_step(
    model: PreferenceModel,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    lr: float,
    compute: Compute,
    *,
    max_grad_norm: float = 1.0,
    label_smoothing: float = 0.0,
    dropout_seed: tuple[int, ...] | None = None,
    world: World = SINGLE_PROCESS,
) -> tuple[float, float]:
    """Update the weights once; returns (loss, gradient norm).

    batch: this rank's share of the step's rows, perhaps none. The loss is sum(w_i ce_i) / sum(w_i) over the
    rows of all ranks. Exact accumulation: each row's weight is divided once by the weights of the whole step;
    micro-batches and ranks then only add, whatever their size. max_grad_norm: of the L2 norm over all ranks;
    0: no clipping. The norm returned is the one before clipping. dropout_seed: arguments of seed_dropout,
    which draw the same masks again as long as the rows are cut alike; None leaves torch's generator as it is.

    Raises, with the weights untouched: torch.OutOfMemoryError in forward or backward (it may be called
    again), MemoryError in the all-reduce or the clipping (one rank alone cannot repeat these),
    FloatingPointError for a bad number. With the weights half updated: ValueError, after which nothing may be
    saved.
    """
    if dropout_seed is not None:
        seed_dropout(*dropout_seed)
    target = torch.as_tensor(batch.p_first, dtype=torch.float32)
    weights = torch.as_tensor(batch.weights, dtype=torch.float32) / batch.total_weight
    model.train()
    optimizer.zero_grad(set_to_none=False)  # gradients are views of one vector: flatten_parameters_
    loss = torch.zeros((), device=next(model.parameters()).device)
    add_gradient_ = model.fast.accumulate_ if model.fast and model.fast.accumulate_ else accumulate_
    for chosen in cut_micro_batches(model, batch.rows, compute.token_budget):
        rows = [batch.rows[i] for i in chosen]
        loss += add_gradient_(model, rows, target[chosen], weights[chosen], label_smoothing, compute)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        world.all_reduce_(*(p.grad for p in parameters), loss)
        grad_norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm or float("inf"))
        loss, grad_norm = torch.stack([loss, grad_norm]).tolist()  # the step's last wait for the device
    except torch.OutOfMemoryError as error:
        raise MemoryError("out of GPU memory after the backward: try a smaller --token-budget") from error
    if not np.isfinite([loss, grad_norm]).all():
        raise FloatingPointError(f"loss {loss}, gradient norm {grad_norm}")
    for group in optimizer.param_groups:
        group["lr"] = lr
    try:
        optimizer.step()
    except torch.OutOfMemoryError as error:
        raise ValueError("out of GPU memory in the optimiser: weights half updated, not saved") from error
    return loss, grad_norm


@torch.no_grad()
def predict_p_first(
    model: PreferenceModel,
    rows: Sequence[np.ndarray],
    compute: Compute,
    label: str | None = None,
    names: Sequence[str] | None = None,
    stop: Sequence = (),
) -> np.ndarray | None:
    """P(the answer shown first wins) of each row of token ids, in the order given: (rows,) float64.

    Dropout is off. label: the text of a progress bar; None shows none. names: the rows' ids (None: their
    positions), which the FloatingPointError names where a logit is not finite. stop: the numbers of stop
    signals; as soon as it holds one, None is returned.
    """
    model.eval()
    p = np.full(len(rows), np.nan)
    hidden = True if label is None else None  # None: where stderr is no terminal
    with tqdm(total=len(rows), desc=label, unit="row", disable=hidden, leave=False) as bar:
        for chosen in cut_micro_batches(model, rows, compute.token_budget):
            if stop:
                return None
            with without_cudnn_attention():
                logits = row_logits(model, [rows[i] for i in chosen], compute).double()  # (B, 2)
            # an infinite logit would pass as a probability of 0 or 1: its margin becomes NaN
            margin = logits[:, 0] - logits[:, 1]  # (B,)
            p[chosen] = torch.where(margin.isfinite(), margin.sigmoid(), torch.nan).cpu().numpy()
            bar.update(len(chosen))
    bad = np.flatnonzero(~np.isfinite(p))
    if len(bad):
        which = [i if names is None else names[i] for i in bad[:5].tolist()]
        raise FloatingPointError(f"logits that are not finite for {len(bad)} of {len(p)} rows: {which}")
    return p
