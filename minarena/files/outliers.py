"""--matmul int8: the outlier columns of a base, and a check that rounding its activations does no harm.

A few input columns of each projection are much larger than the others, in every text. Rounded to int8 with
them, a row's other numbers keep two or three of their seven bits. So COLUMNS of each input stay as they are:
those with the largest absolute value on a fixed set of texts, the generated pairs of tiny.py (six languages).
They belong to the base: no adapter, order, rank or file changes them. LLM.int8 (Dettmers et al. 2022) looks
for them in each product anew; fixed ones as here are QUIK's (https://arxiv.org/abs/2310.09259) and Atom's.

    columns = outlier_columns(backbone, rows)         the numbers of the columns, for each projection
    use_columns_(backbone, columns)                   Int8Linear multiplies int8 by int8 from then on
    hidden_error(backbone, rows, columns)             what that changes in the last hidden state
    use_int8_product_(backbone, tokenizer, rows)      all three: what a run does

What it does not do: choose columns for a layer's adapter (its input is the same), or look at a GPU's speed.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from minarena.int8 import Int8Linear
from minarena.text import encode
from minarena.tiny import demo_pairs

# Relative error of SmolLM2-135M's last hidden state against fp32, 64 rows: .135 with none, .092 with 8, .073
# with 32, .070 with 64, .060 with 128; the side product that holds them beside LoRA's 64 grows with them.
COLUMNS = 32
COLUMN_PAIRS = 24  # generated pairs on which the columns are found: about four a language
GUARD_ROWS = 8  # of a run, on which the product is compared before it is used
LARGEST_ERROR = 0.12  # LLM.int8's own: .115 on SmolLM2-135M


def int8_linears(backbone: nn.Module) -> dict[str, Int8Linear]:
    return {name: module for name, module in backbone.named_modules() if isinstance(module, Int8Linear)}


@torch.no_grad()
def last_hidden(backbone: nn.Module, rows: Sequence[np.ndarray]) -> Tensor:
    """The last hidden state of each row's last token, (rows, C) fp32, computed in fp32 a row at a time."""
    embeddings, found = backbone.get_input_embeddings(), []
    for row in rows:
        ids = torch.from_numpy(row.astype(np.int64)).to(embeddings.weight.device)
        hidden = backbone(inputs_embeds=embeddings(ids[None]).float(), use_cache=False).last_hidden_state
        found.append(hidden[0, -1].float())
    return torch.stack(found)


def outlier_columns(
    backbone: nn.Module, rows: Sequence[np.ndarray], count: int = COLUMNS
) -> dict[str, Tensor]:
    """The numbers of the `count` input columns with the largest absolute values, for each Int8Linear.

    rows: token ids. The base is run on them in fp32, with dequantized weights (which it is left with) and
    before an adapter is put on. Each (count,) int64, ascending, on the base's device. Of two columns that are
    equally large the one with the lower number comes first.
    """
    use_columns_(backbone, None)  # what is rounded would move the largest values
    largest: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module):
        def before(_, inputs):
            found = inputs[0].detach().float().reshape(-1, module.in_features).abs().amax(0)
            largest[name] = torch.maximum(largest[name], found) if name in largest else found

        return module.register_forward_pre_hook(before)

    handles = [watch(name, module) for name, module in int8_linears(backbone).items()]
    try:
        last_hidden(backbone, rows)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: value.sort(descending=True, stable=True).indices[:count].sort().values
        for name, value in largest.items()
    }


def use_columns_(backbone: nn.Module, columns: dict[str, Tensor] | None) -> None:
    """Let each Int8Linear multiply int8 by int8 with these outlier columns; None: dequantized weights."""
    for name, module in int8_linears(backbone).items():
        module.round_inputs_(None if columns is None else columns[name])


def columns_fingerprint(columns: dict[str, Tensor]) -> str:
    """16 characters that tell one choice of columns from another: what a run records and compares."""
    text = ";".join(f"{name}:{columns[name].tolist()}" for name in sorted(columns))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def relative_change(hidden: Tensor, exact: Tensor) -> Tensor:
    """|hidden - exact| / |exact| of each row: both (rows, C), returns (rows,)."""
    return (hidden - exact).norm(dim=1) / exact.norm(dim=1)


def hidden_error(backbone: nn.Module, rows: Sequence[np.ndarray], columns: dict[str, Tensor]) -> float:
    """The median over the rows of |int8 - dequantized| / |dequantized| in the last hidden state.

    Leaves the base as it was: multiplying by dequantized weights.
    """
    exact = last_hidden(backbone, rows)
    use_columns_(backbone, columns)
    error = relative_change(last_hidden(backbone, rows), exact)
    use_columns_(backbone, None)
    return error.median().item()


def use_int8_product_(backbone: nn.Module, tokenizer, rows: Sequence[np.ndarray]) -> tuple[str, float]:
    """(fingerprint of the columns that are used from now on, hidden_error on `rows`); "": none are used.

    "" where the error is above LARGEST_ERROR: the base goes on multiplying by dequantized weights.
    """
    columns = outlier_columns(backbone, encode(tokenizer, demo_pairs(COLUMN_PAIRS, seed=0), max_length=512))
    error = hidden_error(backbone, rows, columns)
    if not error <= LARGEST_ERROR:  # so written that NaN fails, too
        return "", error
    use_columns_(backbone, columns)
    return columns_fingerprint(columns), error
