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

SMALL = 2048  # a base with fewer numbers a token (hidden_size) has kernels shorter than their launches


def fit_layers_(model: nn.Module, tokens: int, longest: int) -> None:
    """Set how many layers are recomputed in the backward, where a training step would not fit into the GPU.

    tokens: of a micro-batch, in rows of at most `longest` tokens. Chen et al. 2016,
    https://arxiv.org/abs/1604.06174. The estimates are rough: they decide, they promise nothing.
    """
    backbone, free = model.model, torch.cuda.mem_get_info()[0]
    config, tokens = backbone.config, max(tokens, longest)
    softcap = getattr(config, "attn_logit_softcapping", None)
    if model.fast:
        model.recomputed = recomputed_layers(backbone, tokens, longest, free)
        if config.hidden_size < SMALL and not softcap and not model.recomputed:
            use_graphs_(model, logits_of_packed)
        return
    saved = 2 * (24 * config.hidden_size + 10 * config.intermediate_size)  # bytes a token that a layer keeps
    if softcap:  # eager attention keeps (heads, T, T) several times
        saved += 10 * config.num_attention_heads * longest
    if config.num_hidden_layers * tokens * saved >= 0.6 * free:
        model.recomputed = config.num_hidden_layers  # of the reference path: all, or none
        backbone.gradient_checkpointing_enable({"use_reentrant": False})


def recomputed_layers(backbone: nn.Module, tokens: int, longest: int, free: int) -> int:
    """How many layers of the fast path must be computed again for `tokens` to fit into `free` bytes.

    longest: tokens of the longest row.
    """
    config, D = backbone.config, backbone.layers[0].self_attn.head_dim
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads  # q, output; k, v
    kept = 2 * tokens * (4 * config.hidden_size + heads * D + 2 * config.intermediate_size)  # bytes, in bf16
    passing = 2**30 + 2 * tokens * 10 * config.intermediate_size  # one layer's weights and gradients
    if getattr(config, "attn_logit_softcapping", None):
        passing += 2 * config.num_attention_heads * tokens * longest  # P and dS (kernels.py), half a square
    missing = config.num_hidden_layers * kept - (0.95 * free - passing)
    return min(config.num_hidden_layers, max(0, math.ceil(missing / kept)))
