"""LoRA by hand (Hu et al. 2021, https://arxiv.org/abs/2106.09685), over any linear layer: float or 8-bit.

    y = W x + (alpha / r) * B A dropout(x)        W frozen (out, in), A (r, in), B (out, r)

The names are those of PEFT's files (`lora_A.weight`, `lora_B.weight`, `base_layer`), so saving is a prefix
and not a mapping table. What it does not do: merge by itself (nothing here changes W; `merged_weight` returns
a new matrix), DoRA, bias terms, embeddings.
"""

import math

import torch
from torch import Tensor, nn

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """A frozen linear `base_layer` plus a trainable product of rank r.

    base_layer: anything with in_features, out_features and a weight on a device.

    A is Kaiming-uniform (a = sqrt 5), as in the authors' and PEFT's code; B is zero, so the first output is
    the base's. A and B are fp32 and compute in autocast's dtype where it is on.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        r: int,
        alpha: float,
        dropout: float,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.scaling = alpha / r
        self.dropout = nn.Dropout(dropout)
        device = base_layer.weight.device
        self.lora_A = nn.utils.skip_init(nn.Linear, base_layer.in_features, r, bias=False, device=device)
        self.lora_B = nn.utils.skip_init(nn.Linear, r, base_layer.out_features, bias=False, device=device)
        if device.type != "meta":  # drawn on the CPU: one seed gives one start, whatever the device
            start = torch.empty(self.lora_A.weight.shape)
            nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
            self.lora_A.weight.data.copy_(start)
            nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)"""
        return self.base_layer(x) + self.lora_B(self.lora_A(self.dropout(x))) * self.scaling


def merged_weight(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W + scale * B A in fp32: W (out, in), A (r, in), B (out, r), of any float dtype."""
    return torch.addmm(W.float(), B.float(), A.float(), alpha=scale)


def layer_number(name: str) -> int:
    """`layers.7.self_attn.q_proj` -> 7; -1 where the name has no number."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def is_projection(name: str) -> bool:
    """Whether a tensor's name is that of one of the seven matrices: `layers.0.self_attn.q_proj.weight`."""
    return name.endswith(".weight") and name.split(".")[-2] in PROJECTIONS


def require_projections(model: nn.Module) -> None:
    """ValueError unless each layer of `model` has each of the seven projections once and no other matrix.

    A layer that lacks one (Phi-3 joins q, k and v), or has more (experts), would be adapted in part without
    a message, and adapter_config.json would claim all seven. Embeddings, norms and a head do not count.
    """
    layers = {}
    for name, parameter in model.named_parameters():
        module = name.rpartition(".")[0]
        leaf = module.rpartition(".")[2]
        outside = isinstance(model.get_submodule(module), nn.Embedding) or leaf == "score" or "norm" in leaf
        if parameter.dim() < 2 or outside:
            continue
        if not is_projection(name) or layer_number(name) < 0:
            where = name.removesuffix(".weight")
            raise ValueError(f"{where} is a linear layer other than the seven projections")
        found = layers.setdefault(layer_number(name), [])
        if leaf in found:
            raise ValueError(f"layer {layer_number(name)} has more than one {leaf} (experts?): {module}")
        found.append(leaf)
    for number, found in layers.items():
        lacking = [projection for projection in PROJECTIONS if projection not in found]
        if lacking:
            raise ValueError(f"layer {number} has no {lacking[0]}, one of the seven projections")


def inject_lora_(
    model: nn.Module,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    freeze_layers: int = 0,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Wrap the seven projections of every layer at or above `freeze_layers` in place; returns their names.

    A projection outside of numbered layers is wrapped, too. Called again, it gives the projections fresh
    matrices (a new rank is fine) over the same base weights: this is how one loaded base serves several
    adapters. Raises ValueError when the model has no such projection.
    """
    names = []
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if leaf not in PROJECTIONS:
            continue
        base = module.base_layer if isinstance(module, LoRALinear) else module
        if not 0 <= layer_number(name) < freeze_layers:
            base = LoRALinear(base, r, alpha, dropout, generator)
            names.append(name)
        setattr(model.get_submodule(parent), leaf, base)
    if not names:
        above = f"at or above layer {freeze_layers} (--freeze-layers)" if freeze_layers else "in the model"
        raise ValueError(f"no projection to adapt (q_proj, ..., down_proj) {above}")
    return names
