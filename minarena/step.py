"""One optimiser step and one evaluation, as functions that train.py calls in order.

The quantity that is optimised, logged and evaluated is the same: the mean over a step's rows of the
cross-entropy between the label and the two logits. It does not depend on how the rows are cut into
micro-batches.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import log_softmax
from tqdm import tqdm

from minarena.batching import collate, micro_batches
from minarena.dist import SINGLE_PROCESS, World


def preference_loss(logits: Tensor, p_first: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with soft labels, in nats and fp32.

    logits (B, 2), p_first (B,) = P(the first answer wins); returns (B,).
    """
    p = p_first * (1 - label_smoothing) + label_smoothing / 2
    log_p = log_softmax(logits.float(), dim=-1)
    return -p * log_p[:, 0] - (1 - p) * log_p[:, 1]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The forward pass computes in `dtype`; fp32 is no autocast at all."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def without_cudnn_attention():
    """A context in which SDPA leaves cuDNN alone, whose backward gives NaN with a mask at some widths.

    https://github.com/pytorch/pytorch/issues/196678. It goes round the backward, too: recomputed layers
    choose their kernel again.
    """
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def cut_micro_batches(model: nn.Module, rows: Sequence[np.ndarray], token_budget: int) -> list[np.ndarray]:
    """Positions in `rows` of each micro-batch: packed ones on the fast path, padded ones elsewhere."""
    fast = getattr(model, "fast", None)
    return (fast.cut if fast else micro_batches)([len(row) for row in rows], token_budget)


def logits_of(model: nn.Module, rows: Sequence[np.ndarray], pad_id: int, dtype: torch.dtype) -> Tensor:
    """Logits (B, 2) of B rows of token ids, in fp32."""
    if getattr(model, "fast", None):
        return model.fast.logits(model, rows)
    device = next(model.parameters()).device
    with autocast(device, dtype):
        return model(*collate(rows, pad_id, device))


def seed_dropout(seed: int, step: int, rank: int = 0) -> None:
    """Seed torch's global generator from (seed, step, rank): a resumed run needs no generator state."""
    torch.manual_seed(
        int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    )


def accumulate_(
    model: nn.Module,
    rows: Sequence[np.ndarray],
    p_first: Tensor,
    weights: Tensor,
    label_smoothing: float,
    *,
    pad_id: int,
    dtype: torch.dtype,
) -> Tensor:
    """Add the gradient of sum(weights * cross-entropy) of one micro-batch; returns that sum, detached.

    p_first and weights (rows,), on the CPU.
    """
    device = next(model.parameters()).device
    p_first, weights = (x.to(device, non_blocking=True) for x in (p_first, weights))
    with without_cudnn_attention():
        logits = logits_of(model, rows, pad_id, dtype)
        loss = (preference_loss(logits, p_first, label_smoothing) * weights).sum()
        loss.backward()
    return loss.detach()


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[np.ndarray],
    p_first: np.ndarray,
    *,
    lr: float,
    token_budget: int,
    pad_id: int,
    dtype: torch.dtype = torch.float32,
    max_grad_norm: float = 1.0,
    label_smoothing: float = 0.0,
    row_weights: np.ndarray | None = None,
    total_weight: float | None = None,
    world: World = SINGLE_PROCESS,
) -> tuple[float, float]:
    """Update the weights once; returns (loss, gradient norm).

    rows: token ids of the step's rows; p_first (rows,): their labels, as P(the answer shown first wins).
    row_weights (rows,), 1 where not given: the loss is sum(w_i ce_i) / sum(w_i). Exact accumulation: each
    micro-batch adds its SUM divided by the weights of the whole step, so unequal micro-batches do not count
    equally; nor do ranks. world: rows are this rank's share, perhaps none, total_weight is the sum of w_i
    over all ranks. Raises FloatingPointError before the weights are touched when a number is bad.
    """
    w = torch.ones(len(rows)) if row_weights is None else torch.as_tensor(row_weights, dtype=torch.float32)
    target, w = torch.as_tensor(p_first, dtype=torch.float32), w / (total_weight or w.sum())
    model.train()
    optimizer.zero_grad(set_to_none=False)  # gradients have their place (flat_)
    loss = torch.zeros((), device=next(model.parameters()).device)
    add = getattr(model, "accumulate", None) or accumulate_
    for chosen in cut_micro_batches(model, rows, token_budget):
        part = [rows[i] for i in chosen], target[chosen], w[chosen]
        loss += add(model, *part, label_smoothing, pad_id=pad_id, dtype=dtype)
    tuned = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        world.all_reduce_(*(p.grad for p in tuned), loss)
        grad_norm = nn.utils.clip_grad_norm_(tuned, max_grad_norm or float("inf"))
        loss, grad_norm = torch.stack([loss, grad_norm]).tolist()  # the step's one wait for the device
    except torch.OutOfMemoryError as error:  # before the sum a rank could do its share again
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
    model: nn.Module,
    rows: Sequence[np.ndarray],
    *,
    token_budget: int,
    pad_id: int,
    dtype: torch.dtype = torch.float32,
    label: str | None = None,
    names: Sequence[str] | None = None,
) -> np.ndarray:
    """P(the answer shown first wins) of each row of token ids, in the order given: (rows,) float64.

    Dropout is off. label: the text of a progress bar; None shows none. names: the rows' ids (none: their
    positions), for the FloatingPointError where a logit is not finite.
    """
    model.eval()
    p = np.full(len(rows), np.nan)
    with tqdm(total=len(rows), desc=label, unit="row", disable=label is None or None, leave=False) as bar:
        for chosen in cut_micro_batches(model, rows, token_budget):
            with without_cudnn_attention():
                logits = logits_of(model, [rows[i] for i in chosen], pad_id, dtype).double()  # (B, 2)
            margin = logits[:, 0] - logits[:, 1]  # an infinite one would pass as a probability of 0 or 1
            p[chosen] = torch.where(margin.isfinite(), margin.sigmoid(), torch.nan).cpu().numpy()
            bar.update(len(chosen))
    bad = np.flatnonzero(~np.isfinite(p))
    if len(bad):
        which = [i if names is None else names[i] for i in bad[:5].tolist()]
        raise FloatingPointError(f"logits that are not finite for {len(bad)} of {len(p)} rows: {which}")
    return p


def real_tokens(rows: Iterable[np.ndarray]) -> int:
    """Tokens without padding: what every tokens-a-second figure of this project counts."""
    return sum(map(len, rows))
