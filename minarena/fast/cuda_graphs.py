"""Micro-batches of a small base as CUDA graphs: thousands of launches recorded once, then replayed as one.

A layer of SmolLM2-135M is a hundred kernels of some microseconds, forward and backward, which Python cannot
launch as fast as a GPU runs them: without graphs a step of 190 ms kept an H100 busy for 37
(benchmarks/README.md). A graph has fixed shapes, so a micro-batch is filled up to a multiple of 512 tokens
and 8 rows; each size runs as it is when it is first met (which compiles what has to be compiled), is
recorded when it comes again, and is replayed from then on. Adds to the gradients what step.accumulate_ adds.
Not for bases with a soft-cap: their backward needs memory by the lengths of rows (Packed.pairs), not by their
sum. What it does not do: give memory back to an evaluation that runs out of it.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from minarena.fast.packing import Packed, collate_packed, padded_length, round_up
from minarena.step import preference_loss

TOKENS_MULTIPLE, ROWS_MULTIPLE = 512, 8


def use_graphs_(model: nn.Module, logits_of: Callable) -> None:
    """Prepare a PreferenceModel in place; logits_of(model, packed rows): what the graphs record."""
    assert not getattr(model.model.config, "attn_logit_softcapping", None), "see the top of this file"
    model.graphs, model.accumulate = {}, partial(accumulate_by_graph_, logits_of)


def accumulate_by_graph_(
    logits_of: Callable,
    model: nn.Module,
    rows: Sequence[np.ndarray],
    p_first: Tensor,
    weights: Tensor,
    label_smoothing: float,
    **_,
) -> Tensor:
    """step.accumulate_ with a graph: p_first and weights (rows,) on the CPU; returns the loss on the GPU."""

    def run(inputs: list[Tensor]) -> Tensor:
        *packed, target, weight = inputs
        logits = logits_of(model, Packed(*packed, pairs=0, lengths=[]))
        loss = (preference_loss(logits, target, label_smoothing) * weight).sum()
        loss.backward()
        return loss.detach()

    try:
        inputs = inputs_of(rows, p_first, weights)
        size = len(inputs[0]), len(inputs[-1])
        if size not in model.graphs:
            model.graphs[size] = None
            return run(inputs)
        if model.graphs[size] is None:
            pool = next((known[0].pool() for known in model.graphs.values() if known), None)
            model.graphs[size] = record(run, inputs, pool)
        graph, static, loss = model.graphs[size]
        for old, new in zip(static, inputs, strict=True):
            old.copy_(new)
    except RuntimeError as error:
        model.graphs.clear()  # what comes next needs their memory
        full = error.__context__  # a recording that is broken off has an error of its own
        raise full if isinstance(full, torch.OutOfMemoryError) else error from None
    graph.replay()
    return loss


def inputs_of(rows: Sequence[np.ndarray], p_first: Tensor, weights: Tensor) -> list[Tensor]:
    """The tensors of Packed, p_first and weights on the GPU; rows that are not there weigh nothing."""
    tokens, count = sum(padded_length(len(row)) for row in rows), round_up(len(rows), ROWS_MULTIPLE)
    packed = collate_packed(rows, "cuda", round_up(tokens, TOKENS_MULTIPLE), count)
    inputs = [value for value in vars(packed).values() if isinstance(value, Tensor)]
    for value in (p_first, weights):
        padded = torch.nn.functional.pad(value, (0, count - len(rows)))
        inputs.append(padded.pin_memory().to("cuda", non_blocking=True))
    return inputs


def record(run: Callable, inputs: list[Tensor], pool: tuple | None) -> tuple:
    """(the CUDA graph of run(inputs), its inputs, its loss). All share a pool: one of them runs at a time."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool):
            loss = run(inputs)
    finally:
        torch.cuda.set_stream(stream)  # torch leaves its own current where a recording's end fails
    return graph, inputs, loss
