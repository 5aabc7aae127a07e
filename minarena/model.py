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
    """What must be known to build an adapter: LoRA's settings and the head's."""

    r: int = 64
    alpha: float = 4.0
    dropout: float = 0.0
    freeze_layers: int = 0
    head: str = "mlp"
    head_dropout: float = 0.0
    labels: int = 2


class PreferenceModel(nn.Module):
    """`model` (backbone) and `score` (head): the names in transformers' classifiers and PEFT's files.

    residual_dtype: of the residual stream. bf16 under bf16 on a GPU; fp32 on a CPU, and under fp16, whose
    largest number (65,504) Gemma's activations pass.
    """

    def __init__(self, model: nn.Module, score: nn.Module, residual_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.model = model
        self.score = score
        self.residual_dtype = residual_dtype
        self.fast = None  # a FastPath where it is taken (fast.py)
        self.accumulate = None  # step.accumulate_, or what adds the same gradients faster (graphs.py)
        self.recomputed = 0  # layers whose activations are computed again in the backward

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask (B, T), padded on either side -> logits (B, 2), fp32.

        Index 0 = the answer shown first wins.
        """
        embeddings = self.model.get_input_embeddings()(input_ids).to(self.residual_dtype)  # (B, T, C)
        hidden = self.model(
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            # counted from each row's first token: under rotary embeddings a shift only changes rounding
            position_ids=(attention_mask.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        # head and logits are fp32 whatever surrounds them
        with torch.autocast(hidden.device.type, enabled=False):
            return self.score(pool_last(hidden, attention_mask).float())


def pool_last(hidden: Tensor, mask: Tensor) -> Tensor:
    """Hidden state of each row's last real token.

    hidden (B, T, C), mask (B, T) with 1 = token and 0 = padding on either side; returns (B, C). Not
    `mask.sum(1) - 1`: that is the last token only when the padding is on the right. We look for the rightmost
    1.
    """
    T = mask.size(1)
    last = (mask * torch.arange(1, T + 1, device=mask.device)).argmax(dim=1)  # (B,)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def make_head(kind: str, hidden: int, dropout: float, labels: int = 2) -> nn.Module:
    """(rows, hidden) -> (rows, labels). mlp: the seed's, dropout before GELU too; linear: transformers'."""
    if kind == "linear":
        return nn.Linear(hidden, labels, bias=False)
    return nn.Sequential(
        nn.Dropout(dropout),
        nn.Linear(hidden, hidden // 2),
        nn.Dropout(dropout),
        nn.GELU(),
        nn.Linear(hidden // 2, labels),
    )


def attach_adapter_(model: nn.Module, config: AdapterConfig, seed: int = 0) -> None:
    """Give `model` (a PreferenceModel) fresh LoRA matrices and a fresh fp32 head, in place, from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    model.model.requires_grad_(False)  # also what LoRA does not wrap: embeddings and norms
    inject_lora_(model.model, config.r, config.alpha, config.dropout, config.freeze_layers, generator)
    embeddings = model.model.get_input_embeddings().weight
    with torch.random.fork_rng(devices=[]):  # nn.Linear draws from the CPU's generator; leave that as it was
        torch.default_generator.manual_seed(seed)
        head = make_head(config.head, embeddings.shape[1], config.head_dropout, config.labels)
    model.score = head.to(embeddings.device)


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter of everything that is trained."""
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
