"""Micro-batches of a small base as CUDA graphs: thousands of launches recorded once, then replayed as one.

A layer of SmolLM2-135M is a hundred kernels of some microseconds, forward and backward, which Python cannot
launch as fast as a GPU runs them: without graphs a step of 190 ms kept an H100 busy for 37
(benchmarks/README.md). A graph has fixed shapes, so a micro-batch is padded to a multiple of 512 tokens and 8
rows. For each shape: the first time it runs normally (which compiles what has to be compiled), the second
time a graph is captured, then the graph is replayed. Adds the same gradients as step.accumulate_.

Not for bases with a soft-cap: their backward needs memory by the lengths of the rows (softcap_tiles.py), not
by the sum of the lengths. What it does not do: give memory back to an evaluation that runs out of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from minarena.fast.packing import Packed, collate_packed, padded_length, round_up
from minarena.model import soft_cap
from minarena.step import weighted_loss

TOKENS_MULTIPLE, ROWS_MULTIPLE = 512, 8


@dataclass
class Inputs:
    """What a captured graph reads: replaced in place before each replay. All on the GPU."""

    ids: Tensor  # (N,) this and the next three: packing.Packed's
    positions: Tensor  # (N,)
    last: Tensor  # (B,)
    ends: Tensor  # (B + 2,) int32
    p_first: Tensor  # (B,) labels
    weights: Tensor  # (B,) 0 for the rows that only fill up

    def shape(self) -> tuple[int, int]:
        return len(self.ids), len(self.last)

    def copy_(self, new: "Inputs") -> None:
        for name, tensor in vars(self).items():
            tensor.copy_(getattr(new, name))


@dataclass
class Graph:
    captured: torch.cuda.CUDAGraph
    inputs: Inputs
    loss: Tensor


def use_graphs_(model: nn.Module, logits_of: Callable) -> None:
    """Prepare a PreferenceModel that is on the fast path, in place.

    logits_of(model, packed rows): what the graphs capture.
    """
    assert not soft_cap(model.model.config), "see the top of this file"
    model.graphs = {}  # (N, B) -> Graph, or None where the shape was met once
    model.fast = replace(model.fast, accumulate_=partial(accumulate_by_graph_, logits_of))


def accumulate_by_graph_(
    logits_of: Callable,
    model: nn.Module,
    rows: Sequence[np.ndarray],
    p_first: Tensor,
    weights: Tensor,
    label_smoothing: float,
    _compute,
) -> Tensor:
    """step.accumulate_ with a graph: p_first and weights (rows,) on the CPU; returns the loss on the GPU."""

    def run(inputs: Inputs) -> Tensor:
        packed = Packed(inputs.ids, inputs.positions, inputs.last, inputs.ends, lengths=[])
        logits = logits_of(model, packed)
        loss = weighted_loss(logits, inputs.p_first, inputs.weights, label_smoothing)
        loss.backward()
        return loss.detach()

    try:
        inputs = make_inputs(rows, p_first, weights)
        shape = inputs.shape()
        if shape not in model.graphs:
            model.graphs[shape] = None
            return run(inputs)
        if model.graphs[shape] is None:
            pool = next((known.captured.pool() for known in model.graphs.values() if known), None)
            model.graphs[shape] = capture(run, inputs, pool)
        graph = model.graphs[shape]
        graph.inputs.copy_(inputs)
    except RuntimeError as error:
        model.graphs.clear()  # what comes next needs their memory
        # a failed capture raises an error that hides the out-of-memory error: unwrap it
        hidden = error.__context__
        raise hidden if isinstance(hidden, torch.OutOfMemoryError) else error from None
    graph.captured.replay()
    return graph.loss


def make_inputs(rows: Sequence[np.ndarray], p_first: Tensor, weights: Tensor) -> Inputs:
    """Padded to TOKENS_MULTIPLE and ROWS_MULTIPLE; a row that only fills up has weight 0."""
    tokens, count = sum(padded_length(len(row)) for row in rows), round_up(len(rows), ROWS_MULTIPLE)
    packed = collate_packed(rows, "cuda", round_up(tokens, TOKENS_MULTIPLE), count)

    def on_gpu(values: Tensor) -> Tensor:
        padded = nn.functional.pad(values, (0, count - len(rows)))
        return padded.pin_memory().to("cuda", non_blocking=True)

    return Inputs(packed.ids, packed.positions, packed.last, packed.ends, on_gpu(p_first), on_gpu(weights))


def capture(run: Callable, inputs: Inputs, pool: tuple | None) -> Graph:
    """Capture run(inputs) as a CUDA graph. All graphs share a memory pool: one of them runs at a time."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool):
            loss = run(inputs)
    finally:
        torch.cuda.set_stream(stream)  # torch leaves its own stream current where a capture's end fails
    return Graph(graph, inputs, loss)
