"""What is done when the GPU cannot hold a micro-batch.

    computing = {"token_budget": 8192, ...}
    loss, norm = within_memory_(partial(train_step, model, optimizer, rows, ...), rows, computing, auto=True)

The rows of a step, or of a prediction, do not depend on --token-budget. So what ran out of memory is done
again with half of it, and comes out the same up to rounding (with dropout on: other masks). What it does not
do: look ahead, or raise the budget again.
"""

import gc
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch

from minarena.batching import balance_by_tokens
from minarena.dist import World
from minarena.runtime.console import say
from minarena.step import seed_dropout


def retry_on_oom_(attempt: Callable, rows: Sequence, computing: dict, auto: bool, seed: tuple = ()):
    """attempt(token_budget=...), again and again with a smaller one until it fits, if `auto`.

    attempt: may be called again after torch's out-of-memory error. rows: its token ids; a budget below the
    longest changes nothing. computing["token_budget"] is lowered in place, for what comes later. seed: (seed,
    step, rank) that each attempt draws its dropout from. Raises MemoryError that names the value to try.
    """
    longest = max(map(len, rows), default=1)
    while True:
        budget = computing["token_budget"]
        lower = max(budget // 2, longest)
        if seed:
            seed_dropout(*seed)
        try:
            return attempt(token_budget=budget)
        except torch.OutOfMemoryError as error:
            full = f"out of GPU memory with micro-batches of {budget:,} tokens"
            if budget <= longest:
                raise MemoryError(f"{full}: a single row, so only a smaller --max-length helps") from error
            if not auto:
                raise MemoryError(f"{full}: try --token-budget {lower}") from error
        # not inside of `except`: there the error still holds the tensors that filled the memory
        say(f"\n{full}: again, and from here on, with --token-budget {lower}")
        computing["token_budget"] = lower
        gc.collect()  # an error and the frames that it holds can be a cycle
        torch.cuda.empty_cache()


def predict_on_all_ranks(
    predict: Callable, rows: Sequence, ids: pd.Series, computing: dict, auto: bool, world: World
) -> np.ndarray:
    """(rows,): predict(share, names=...) of each rank's share of the rows, put together by id on every rank.

    predict: predict_first, with all but rows, names and token_budget. ids: of the rows, unique. Raises
    ValueError that names the id of a row without a prediction.
    """
    share = np.sort(
        balance_by_tokens([len(row) for row in rows], world.size)[world.rank]
    )  # equally many tokens
    mine, names = [rows[i] for i in share], ids.iloc[share].tolist()
    p = retry_on_oom_(partial(predict, mine, names=names), mine, computing, auto)
    found = {}
    for part in world.all_gather(dict(zip(names, p, strict=True))):
        found |= part
    missing = [name for name in ids if name not in found]
    if missing:
        raise ValueError(f"no prediction for {len(missing)} of {len(ids)} rows: id {missing[0]!r}")
    return np.array([found[name] for name in ids])
