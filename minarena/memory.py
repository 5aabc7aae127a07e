"""What is done when the GPU cannot hold a micro-batch.

    computing = {"token_budget": 8192, ...}
    loss, norm = within_memory_(partial(train_step, model, optimizer, rows, ...), rows, computing, auto=True)

The rows of a step, or of a prediction, do not depend on --token-budget. So what ran out of memory is done
again with half of it, and comes out the same up to rounding (with dropout on: other masks). What it does not
do: look ahead, or raise the budget again.
"""

from collections.abc import Callable, Sequence

import torch

from minarena.config import say
from minarena.step import seed_dropout


def within_memory_(attempt: Callable, rows: Sequence, computing: dict, auto: bool, seed: tuple = ()):
    """attempt(token_budget=...), again and again with a smaller one until it fits, if `auto`.

    attempt: may be called again after torch's out-of-memory error. rows: its token ids; a budget below the
    longest changes nothing. computing["token_budget"] is lowered in place, for what comes later. seed: (seed,
    step) that each attempt draws its dropout from. Raises MemoryError that names the value to try.
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
        torch.cuda.empty_cache()
