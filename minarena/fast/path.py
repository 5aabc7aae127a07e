"""The fast path of one GPU: packed rows, int8 weights and LoRA in one product, two compiled regions a layer.

    before_attention   norm, q k v with LoRA, rotary positions             compiled
    attend             flash attention; with a soft-cap our own kernel     one kernel, three in the backward
    after_attention    o, norms, the gated MLP, residuals, with LoRA       compiled

What it saves, most valuable first: padding (rows lie one after the other); eager attention; layers that would
be recomputed for want of memory (the compiler keeps the outputs of large products and computes the cheap rest
again); a kernel for each small operation; LoRA's passes over the largest tensors; and with small bases the
launches themselves (cuda_graphs.py).

The weights are transformers' modules, in place. PreferenceModel.forward, which runs transformers' own layers,
is the reference: the tests compare logits and gradients with it. The families differ in four places of a
layer, so one page serves all six. What it does not do: fp16 or fp32 on a GPU, bitsandbytes' LLM.int8 product,
other families.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
import torch._functorch.config as partitioner  # what the compiler keeps for the backward
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minarena.fast.attention import flash, plain
from minarena.fast.blocks import BLOCKS, blocks_of
from minarena.fast.fused_linear import base_of, fuse_weights_, project
from minarena.fast.packing import Packed, collate_packed, packed_micro_batches
from minarena.fast.softcap_tiles import Tiles, tiles_of
from minarena.int8 import Int8Linear
from minarena.lora import PROJECTIONS, LoRALinear
from minarena.model import soft_cap
from minarena.runtime.console import say

FAMILIES = ("gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
# The compiler's heuristics keep what is cheap to compute again: dropped-out copies of inputs, their masks,
# and even the dequantized weights (16.6 GB at 9B). Without them it keeps the fewest bytes that save every
# large product.
KEPT_FOR_THE_BACKWARD = {
    "aggressive_recomputation": True,
    "is_non_builtin_to_include": True,  # int8_product is a large product, too
    "ban_recompute_used_far_apart": False,
    "ban_recompute_long_fusible_chains": False,
    "ban_recompute_materialized_backward": False,
}


@dataclass(frozen=True)
class FastPath:
    """What step.py calls in place of its own functions."""

    micro_batches: Callable  # (tokens of each row, token budget) -> positions of each micro-batch's rows
    logits: Callable  # (PreferenceModel, B rows of token ids) -> (B, 2), fp32
    accumulate_: Callable | None = None  # step.accumulate_'s twin (cuda_graphs.py); None: step's own


def why_not(backbone: nn.Module, dtype: torch.dtype) -> str:
    """Why the fast path cannot be taken with this base on its device; "" where it can."""
    device, config = backbone.device, backbone.config
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if capability < (8, 0):
        return "it needs a GPU of compute capability 8.0 (A100, RTX 30) or later"
    if find_spec("triton") is None:
        return "it needs Triton, which PyTorch brings along for GPUs on Linux"
    if dtype != torch.bfloat16:
        return "it computes in bf16 only"
    if config.model_type not in FAMILIES:
        return f"it does not know the layers of {config.model_type}"
    softcap, D = soft_cap(config), backbone.layers[0].self_attn.head_dim
    if softcap and (softcap > 80 or D not in (16, 32, 64, 128, 256)):
        return "its capped attention takes caps up to 80 and heads of 16, 32, 64, 128 or 256"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is causal"
    if getattr(config, "attention_dropout", 0):
        return "it has no dropout on attention"
    bases = [base_of(m) for name, m in backbone.named_modules() if name.rpartition(".")[2] in PROJECTIONS]
    if any(type(base) is nn.Linear for base in bases):
        return "the base has projections in floats, and it knows int8 ones only"
    if not all(isinstance(base, Int8Linear) for base in bases):
        return "it needs --matmul dequant or int8"
    rounding = [base for base in bases if base.columns is not None]
    if any(base.in_features % 16 or base.out_features % 16 for base in rounding):
        return "its int8 product takes matrices whose sides are multiples of 16"
    if (softcap or rounding) and blocks_of(device) is None:
        return f"its kernels need {min(BLOCKS)} KiB of shared memory, which this GPU does not have"
    return ""


def use_fast_path_(model: nn.Module) -> None:
    """Prepare a PreferenceModel in place, and torch's compiler for this process."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        attention.fused = fuse_weights_([attention.q_proj, attention.k_proj, attention.v_proj])
        mlp.fused = fuse_weights_([mlp.gate_proj, mlp.up_proj])
    for name, value in KEPT_FOR_THE_BACKWARD.items():
        setattr(partitioner, name, value)
    model.fast = FastPath(packed_micro_batches, packed_logits)


def take_fast_path_(model: nn.Module, dtype: torch.dtype) -> None:
    """use_fast_path_ where the fast path can be taken; elsewhere print why not, and change nothing."""
    reason = why_not(model.model, dtype)
    if reason:
        say(f"fast path off: {reason}")
        return
    use_fast_path_(model)
    fused = model.model.layers[0].mlp.fused
    large = fused.in_features >= 2048 and torch.cuda.get_device_capability() == (9, 0)  # measured there alone
    if large and fused.columns is None and model.int8_columns is None:
        say("faster on this GPU: --matmul int8 (1.4 times in training, 1.5 in inference at 9B)")


def packed_logits(model: nn.Module, rows: Sequence[np.ndarray]) -> Tensor:
    """Logits (B, 2), fp32, of B rows of token ids."""
    device = model.model.get_input_embeddings().weight.device
    return logits_of_packed(model, collate_packed(rows, device))[: len(rows)]


def logits_of_packed(model: nn.Module, rows: Packed) -> Tensor:
    """Logits (B, 2), fp32. Never waits for the GPU and has no data-dependent control flow, so that it can be
    captured in a CUDA graph."""
    backbone, training = model.model, torch.is_grad_enabled()
    hidden = backbone.get_input_embeddings()(rows.ids).to(model.residual_dtype)  # (N, C)
    rotary = rotations(backbone, hidden, rows.positions)
    seeds = dropout_seeds(backbone, model.training and training)
    tiles = tiles_of(rows.lengths, hidden.device) if soft_cap(backbone.config) and hidden.is_cuda else None
    for i, layer in enumerate(backbone.layers):
        if training and not hidden.requires_grad and isinstance(layer.self_attn.q_proj, LoRALinear):
            hidden.requires_grad_()  # the first layer then has the same graph as the others
        wanted = rows.last if i + 1 == len(backbone.layers) else None
        arguments = (layer, hidden, *rotary[i], seeds[i], rows, tiles, wanted)
        if training and i < model.recomputed:
            # dropout is a function of the seeds: no generator state has to be restored
            hidden = checkpoint(decoder_layer, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            hidden = decoder_layer(*arguments)
    return model.head_logits(apply_norm(backbone.norm, hidden))


def dropout_seeds(backbone: nn.Module, training: bool) -> Sequence[Tensor | None]:
    """One seed for each of a layer's four products: (4,) int32 a layer, or None where nothing is dropped."""
    tuned = [layer.self_attn.q_proj for layer in backbone.layers]
    drops = [isinstance(m, LoRALinear) and m.dropout.p > 0 for m in tuned]
    if not (training and any(drops)):
        return [None] * len(tuned)
    limits, device = torch.iinfo(torch.int32), backbone.get_input_embeddings().weight.device
    size = (len(tuned), 4)
    return torch.randint(limits.min, limits.max, size, dtype=torch.int32, device=device).unbind()


def rotations(backbone: nn.Module, hidden: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(cos, sin) of each layer, (N, 1, D). Gemma-3 has other frequencies in layers with a window."""
    kinds = getattr(backbone.config, "layer_types", None) or [None] * len(backbone.layers)
    several = isinstance(getattr(backbone.rotary_emb, "rope_type", None), dict)
    made = {}
    for kind in set(kinds):
        more = (kind,) if several else ()
        cos, sin = backbone.rotary_emb(hidden[None], positions[None], *more)
        made[kind] = cos.transpose(0, 1), sin.transpose(0, 1)
    return [made[kind] for kind in kinds]


def decoder_layer(
    layer: nn.Module,
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    seeds: Tensor | None,
    rows: Packed,
    tiles: Tiles | None,
    wanted: Tensor | None,
) -> Tensor:
    """hidden (N, C) -> (N, C). wanted: tokens whose output is needed, None for all; the last layer needs one
    a row, and returns (B, C)."""
    q, k, v = compiled(before_attention)(layer, seeds, hidden, cos, sin)
    out = attend(layer.self_attn, q, k, v, rows, tiles)
    if wanted is not None:
        hidden, out = hidden[wanted], out[wanted]
    return compiled(after_attention)(layer, seeds, hidden, out)


def attend(
    attention: nn.Module, q: Tensor, k: Tensor, v: Tensor, rows: Packed, tiles: Tiles | None
) -> Tensor:
    """q (N, H, G, D), k and v (N, H, D) -> (N, H, G, D), with the settings of transformers' module.

    tiles: of the rows, for a base with a soft-cap on a GPU.
    """
    softcap = soft_cap(attention)
    # Mistral's modules have no window of their own: it is the config's, the same in each layer
    window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    if not q.is_cuda:
        return plain(q, k, v, rows.lengths, attention.scaling, softcap, window)
    if not softcap:
        return flash(q, k, v, rows.ends, len(rows.ids), attention.scaling, window)
    from minarena.fast.softcap_kernels import CappedAttention  # needs Triton, which only PyTorch for GPUs has

    return CappedAttention.apply(q, k, v, tiles.table, tiles.pairs, attention.scaling, softcap, window)


def before_attention(
    layer: nn.Module, seeds: Tensor | None, hidden: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, C) -> q (N, H, G, D), k and v (N, H, D): H heads of keys, G heads of queries to each."""
    attention, N, D = layer.self_attn, hidden.size(0), layer.self_attn.head_dim
    linears = attention.q_proj, attention.k_proj, attention.v_proj
    qkv = project(linears, attention.fused, apply_norm(layer.input_layernorm, hidden), seed_of(seeds, 0))
    q, k, v = (x.view(N, -1, D) for x in qkv)
    if hasattr(attention, "q_norm"):  # Gemma-3, Qwen3
        q, k = apply_norm(attention.q_norm, q), apply_norm(attention.k_norm, k)
    q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    return q.view(N, k.size(1), -1, D), k, v.contiguous()


def seed_of(seeds: Tensor | None, product: int) -> Tensor | None:
    return None if seeds is None else seeds[product]


def apply_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x) in x's dtype: Llama's and the Qwens' norms return their weight's dtype where it is another."""
    return norm(x).to(x.dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, https://arxiv.org/abs/2104.09864).

    x (N, heads, D), cos and sin (N, 1, D); returns (N, heads, D).
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def after_attention(layer: nn.Module, seeds: Tensor | None, hidden: Tensor, out: Tensor) -> Tensor:
    """hidden (N, C), out (N, H, G, D) -> (N, C)"""
    attention, mlp = layer.self_attn, layer.mlp
    out = out.reshape(hidden.size(0), -1)
    (out,) = project([attention.o_proj], base_of(attention.o_proj), out, seed_of(seeds, 1))
    gemma = hasattr(layer, "pre_feedforward_layernorm")  # Gemma has norms after attention and MLP, too
    if gemma:
        out = apply_norm(layer.post_attention_layernorm, out)
    hidden = hidden + out
    x = apply_norm(layer.pre_feedforward_layernorm if gemma else layer.post_attention_layernorm, hidden)
    gate, up = project([mlp.gate_proj, mlp.up_proj], mlp.fused, x, seed_of(seeds, 2))
    (x,) = project([mlp.down_proj], base_of(mlp.down_proj), mlp.act_fn(gate) * up, seed_of(seeds, 3))
    return hidden + (apply_norm(layer.post_feedforward_layernorm, x) if gemma else x)


def compiled(region: Callable) -> Callable:
    """`region(layer, seeds, *tensors)`, compiled once for any number of tokens (dimension 0 of the tensors).

    Not `dynamic=True`: that makes inputs of the floats (eps, alpha / r) as well, and the compiler builds
    kernels on the CPU for them.
    """
    fused = fused_region(region)

    def run(layer: nn.Module, seeds: Tensor | None, *tensors: Tensor):
        for tensor in tensors:
            torch._dynamo.mark_dynamic(tensor, 0)
        return fused(layer, seeds, *tensors)

    return run


@functools.cache
def fused_region(region: Callable) -> Callable:
    return torch.compile(region)
