"""Out of GPU memory: try the step again with smaller micro-batches.

    one_step = partial(train_step, model, optimizer, batch, lr, compute)
    loss, grad_norm = retry_on_oom_(one_step, batch.rows, compute)

The rows of a step, or of a prediction, do not depend on the token budget. So a second try with half the
budget gives the same result up to rounding (with dropout on: other masks). What it does not do: look ahead,
or raise the budget again.
"""

import gc
import sys
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from minarena.batching import balance_by_tokens
from minarena.dist import World
from minarena.model import PreferenceModel
from minarena.runtime.console import say
from minarena.step import Compute, predict_p_first


def retry_on_oom_(attempt: Callable, rows: Sequence[np.ndarray], compute: Compute):
    """Call attempt(); after an out-of-memory error halve compute.token_budget and call it again.

    attempt: reads compute.token_budget, and may be called again after torch.OutOfMemoryError. rows: its token
    ids; a budget below the longest row changes nothing. The lower budget stays, for what is computed later.
    Raises MemoryError that names the budget to try, where compute.halve_on_oom is off or a single row is too
    long.
    """
    longest = max(map(len, rows), default=1)
    while True:
        budget = compute.token_budget
        lower = max(budget // 2, longest)
        try:
            return attempt()
        except torch.OutOfMemoryError as error:
            full = f"out of GPU memory with micro-batches of {budget:,} tokens"
            if budget <= longest:
                raise MemoryError(f"{full}: a single row, so only a smaller --max-length helps") from error
            if not compute.halve_on_oom:
                raise MemoryError(f"{full}: try --token-budget {lower}") from error
        # not inside `except`: there the error still holds the tensors that filled the memory
        say(f"\n{full}: again, and from here on, with --token-budget {lower}")
        compute.token_budget = lower
        gc.collect()  # the error and its frames can be a reference cycle
        torch.cuda.empty_cache()


def predict_on_all_ranks(
    model: PreferenceModel,
    rows: Sequence[np.ndarray],
    names: Sequence[str],
    compute: Compute,
    world: World,
    label: str | None = None,
    stop: Sequence = (),
) -> np.ndarray | None:
    """P(the answer shown first wins) of each row, (rows,) on every rank; each rank computes a share of them.

    names: the rows' ids, unique: results are joined by them. label: of the progress bar. stop:
    predict_p_first's; where it ends one rank, all get None. Raises ValueError that names the id of a row
    without a prediction.
    """
    mine = np.sort(balance_by_tokens([len(row) for row in rows], world.size)[world.rank])
    my_rows, my_names = [rows[i] for i in mine], [names[i] for i in mine]
    predict = partial(predict_p_first, model, my_rows, compute, label, my_names, stop)
    p = retry_on_oom_(predict, my_rows, compute)
    parts = world.all_gather(None if p is None else dict(zip(my_names, p, strict=True)))
    if None in parts:
        return None
    found = {name: p for part in parts for name, p in part.items()}
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"no prediction for {len(missing)} of {len(names)} rows: id {missing[0]!r}")
    return np.array([found[name] for name in names])


def peak_bytes(device: torch.device) -> int | None:
    """Most memory held at a time: on a GPU by tensors, on a CPU by the process; None: unknown here."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource  # there is none on Windows
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # macOS counts in bytes, Linux in KiB
