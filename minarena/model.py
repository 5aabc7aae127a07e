"""The model: a frozen 8-bit language model without its LM head, read at its last token by a small head.

transformers supplies the backbone (Gemma-2 with soft-capped attention and sliding window, Gemma-3 text,
Llama, Qwen2) and bitsandbytes its int8 weights, on a GPU and on a CPU alike. Ours are the pooling, the dtypes
and the products. What it does not do: generate, keep a cache, trust remote code, or read pickled weights.
"""

import torch
from torch import Tensor, nn

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # by their names in options


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


def default_dtype(device: torch.device, training: bool) -> str:
    """bf16 on a GPU that has it; older ones infer in fp16, and train in fp32 (fp16 gradients underflow)."""
    if device.type != "cuda":
        return "fp32"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "fp32" if training else "fp16"


def residual_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" and dtype == torch.bfloat16 else torch.float32
