"""Activation checkpointing, only as far as the GPU's memory asks for it.

A recomputed layer keeps its input alone and runs again in the backward: a third more arithmetic for most of
its memory (Chen et al. 2016, https://arxiv.org/abs/1604.06174). The fast path recomputes as few layers as its
estimate says, the reference path all or none. What it does not do: promise that a step fits.
"""

import math

import torch
from torch import nn

from minarena.fast.cuda_graphs import use_graphs_
from minarena.fast.path import logits_of_packed
from minarena.model import soft_cap

LAUNCH_BOUND_BELOW = 2048  # hidden_size below which a layer is bound by kernel launches, not by the GPU


def fit_layers_(model: nn.Module, tokens: int, longest: int) -> None:
    """Set how many layers are recomputed in the backward so that a training step fits, and use CUDA graphs
    where they help.

    tokens: of a micro-batch, in rows of at most `longest` tokens. The estimates of memory are rough.
    """
    backbone, free = model.model, torch.cuda.mem_get_info()[0]
    config, tokens = backbone.config, max(tokens, longest)
    capped = soft_cap(config)
    if model.fast:
        model.recomputed = recomputed_layers(backbone, tokens, longest, free)
        if config.hidden_size < LAUNCH_BOUND_BELOW and not capped and not model.recomputed:
            use_graphs_(model, logits_of_packed)  # a large base is not bound by launches
        return
    saved = 2 * (24 * config.hidden_size + 10 * config.intermediate_size)  # bytes a token that a layer keeps
    if capped:  # eager attention keeps (heads, T, T) several times
        saved += 10 * config.num_attention_heads * longest
    if config.num_hidden_layers * tokens * saved >= 0.6 * free:
        model.recomputed = config.num_hidden_layers  # transformers can recompute all layers or none
        backbone.gradient_checkpointing_enable({"use_reentrant": False})


def recomputed_layers(backbone: nn.Module, tokens: int, longest: int, free: int) -> int:
    """How many layers of the fast path must be computed again for `tokens` to fit into `free` bytes.

    longest: tokens of the longest row.
    """
    config, D = backbone.config, backbone.layers[0].self_attn.head_dim
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads  # q, output; k, v
    kept = 2 * tokens * (4 * config.hidden_size + heads * D + 2 * config.intermediate_size)  # bytes, in bf16
    passing = 2**30 + 2 * tokens * 10 * config.intermediate_size  # one layer's weights and gradients
    if soft_cap(config):
        passing += 2 * config.num_attention_heads * tokens * longest  # P and dS (softcap_kernels.py)
    missing = config.num_hidden_layers * kept - (0.95 * free - passing)
    return min(config.num_hidden_layers, max(0, math.ceil(missing / kept)))
