"""The model: a frozen 8-bit language model without its LM head, read at its last token by a small head.

    model = PreferenceModel(backbone, nn.Identity())      backbone: files/base.py loads one
    attach_adapter_(model, AdapterConfig(r=64), seed=0)   LoRA on its seven projections, and a fresh head
    logits = model(input_ids, attention_mask)             (B, 2); index 0 = the answer shown first wins

transformers supplies the backbone (Gemma-2 with soft-capped attention and sliding window, Gemma-3 text,
Llama, Qwen2) and bitsandbytes its int8 weights, on a GPU and on a CPU alike. Ours are LoRA, the head, the
pooling and the dtypes. What it does not do: generate, keep a cache, or know a file.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minarena.lora import inject_lora_

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # by their names in options


@dataclass
class AdapterConfig:
    """LoRA's settings and the head's: all that is needed to build an adapter. head: mlp or linear."""

    r: int = 64
    alpha: float = 4.0
    dropout: float = 0.0
    freeze_layers: int = 0
    head: str = "mlp"
    head_dropout: float = 0.0


class PreferenceModel(nn.Module):
    """`model` (backbone) and `score` (head): the names in transformers' classifiers and in PEFT's files.

    residual_dtype: dtype of the residual stream. bf16 under bf16 on a GPU; fp32 on a CPU, and under fp16,
    whose largest number (65,504) is below Gemma's activations.
    """

    def __init__(self, model: nn.Module, score: nn.Module, residual_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.model = model
        self.score = score
        self.residual_dtype = residual_dtype
        # The FastPath (fast/path.py: micro_batches, logits, accumulate_) where one is used; None: this
        # forward
        self.fast = None
        self.recomputed = 0  # layers whose activations are computed again in the backward (fast/recompute.py)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask (B, T), padded on either side -> logits (B, 2), fp32.

        Index 0 = the answer shown first wins.
        """
        embeddings = self.model.get_input_embeddings()(input_ids).to(self.residual_dtype)  # (B, T, C)
        hidden = self.model(
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            # from each row's first token on: under rotary embeddings a shift only changes rounding
            position_ids=(attention_mask.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        return self.head_logits(pool_last(hidden, attention_mask))

    def head_logits(self, pooled: Tensor) -> Tensor:
        """pooled (B, C) of any dtype -> logits (B, 2): head and logits are fp32, also inside autocast."""
        with torch.autocast(pooled.device.type, enabled=False):
            return self.score(pooled.float())


def pool_last(hidden: Tensor, mask: Tensor) -> Tensor:
    """Hidden state of each row's last real token, which is EOS (text.py).

    hidden (B, T, C), mask (B, T) with 1 = token and 0 = padding on either side; returns (B, C). Not
    `mask.sum(1) - 1`: that is the last token only when the padding is on the right. We look for the rightmost
    1.
    """
    T = mask.size(1)
    last = (mask * torch.arange(1, T + 1, device=mask.device)).argmax(dim=1)  # (B,)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def make_head(kind: str, hidden: int, dropout: float) -> nn.Module:
    """The head, (B, hidden) -> (B, 2). mlp: the recipe's, with a dropout before GELU as well. linear: as in
    transformers' classifiers. Raises ValueError for another kind."""
    if kind == "linear":
        return nn.Linear(hidden, 2, bias=False)
    if kind != "mlp":
        raise ValueError(f"head {kind!r}: must be mlp or linear")
    return nn.Sequential(
        nn.Dropout(dropout),
        nn.Linear(hidden, hidden // 2),
        nn.Dropout(dropout),
        nn.GELU(),
        nn.Linear(hidden // 2, 2),
    )


def attach_adapter_(model: PreferenceModel, config: AdapterConfig, seed: int = 0) -> None:
    """Give `model` fresh LoRA matrices and a fresh fp32 head, in place, drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    model.model.requires_grad_(False)  # embeddings and norms, too, which LoRA does not wrap
    inject_lora_(model.model, config.r, config.alpha, config.dropout, config.freeze_layers, generator)
    embeddings = model.model.get_input_embeddings().weight
    with torch.random.fork_rng(devices=[]):  # nn.Linear draws from the CPU's generator: leave it as it was
        torch.default_generator.manual_seed(seed)
        head = make_head(config.head, embeddings.shape[1], config.head_dropout)
    model.score = head.to(embeddings.device)


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name -> values of every parameter that is trained: LoRA's matrices and the head."""
    return {name: p.data for name, p in model.named_parameters() if p.requires_grad}


def default_dtype(device: torch.device, training: bool) -> str:
    """bf16 on a GPU that has it; older ones infer in fp16, and train in fp32 (fp16 gradients underflow)."""
    if device.type != "cuda":
        return "fp32"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "fp32" if training else "fp16"


def residual_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" and dtype == torch.bfloat16 else torch.float32


def soft_cap(config) -> float | None:
    """The cap on attention logits (Gemma-2's), or None; config: transformers', or one of its attention
    modules."""
    return getattr(config, "attn_logit_softcapping", None) or None
