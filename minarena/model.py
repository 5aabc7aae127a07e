"""The model: a frozen 8-bit language model without its LM head, read at its last token by a small head.

transformers supplies the backbone (Gemma-2 with soft-capped attention and sliding window, Gemma-3 text,
Llama, Qwen2) and bitsandbytes its int8 weights, on a GPU and on a CPU alike. Ours are the pooling, the dtypes
and the products. What it does not do: generate, keep a cache, trust remote code, or read pickled weights.
"""

import torch
from torch import Tensor, nn

from minarena.int8 import use_dequantized_
from minarena.runtime.console import first_line
from minarena.text import check_vocabulary, load_tokenizer
from minarena.tiny import base_folder

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


def load_backbone(
    name: str, device: torch.device, dtype: torch.dtype, quantize: bool = True, matmul: str = "dequant"
) -> nn.Module:
    """The base in the folder `name` (folders.py) without its LM head, frozen, on `device`.

    quantize: a float base is quantized to int8 while it loads (a base that is 8-bit already stays as it is);
    False keeps a float base, in `dtype`. matmul: see int8.py; llm-int8 is bitsandbytes' own product, the
    seed's numerics. Raises ValueError where the folder is no usable base, naming the reason.
    """
    from transformers import AutoConfig, AutoModel, BitsAndBytesConfig, logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report lists the unused LM head; what is missing we check
    try:
        # not None, which would ask whether to run a folder's code, and run it on `y`
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        vars(config).pop("transformers_weights", None)  # a file of any kind, to be taken as the weights
        method = getattr(config, "quantization_config", None)
        if method is not None and not method.get("load_in_8bit"):
            raise ValueError("quantized, but not by bitsandbytes' 8-bit method: take the float model")
        # only transformers' eager attention applies Gemma-2's soft-cap; the others have none and take SDPA
        softcap = getattr(config, "attn_logit_softcapping", None)
        keywords = {"attn_implementation": "eager" if softcap else "sdpa"}
        # with the config, for what a config.json says of attention would win, other people's kernels included
        keywords |= {"config": config, "trust_remote_code": False, "use_safetensors": True}
        keywords |= {"ignore_mismatched_sizes": True, "output_loading_info": True}  # each is refused by name
        if not hasattr(config, "hidden_size"):
            raise ValueError("no plain text model: it has parts such as a vision tower")
        if method is None and quantize:
            keywords["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
        elif method is None:
            keywords["dtype"] = dtype
        backbone, report = AutoModel.from_pretrained(name, device_map={"": device}, **keywords)
    except Exception as error:  # transformers raises many kinds for one user's mistake
        raise ValueError(f"--model {name}: {first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    for tensor, found, wanted in sorted(report["mismatched_keys"]):
        raise ValueError(f"--model {name}: {tensor} is {tuple(found)}: config.json needs {tuple(wanted)}")
    if report["missing_keys"]:
        raise ValueError(f"--model {name}: the weights lack {sorted(report['missing_keys'])[0]}")
    if matmul == "dequant":
        use_dequantized_(backbone)
    return backbone.requires_grad_(False)


def load_base(name: str, device: torch.device, dtype: torch.dtype, matmul: str, fast: bool) -> tuple:
    """(PreferenceModel without a head, tokenizer) of `--model name`; fast: on the fast path where it runs."""
    with base_folder(name) as folder:
        tokenizer = load_tokenizer(folder)
        backbone = load_backbone(folder, device, dtype, matmul=matmul)
    check_vocabulary(tokenizer, backbone.get_input_embeddings().num_embeddings)
    model = PreferenceModel(backbone, nn.Identity(), residual_dtype(device, dtype))
    if fast and device.type == "cuda":
        from minarena.fast.path import take_fast_path_

        take_fast_path_(model, dtype)
    return model, tokenizer


def default_dtype(device: torch.device, training: bool) -> str:
    """bf16 on a GPU that has it; older ones infer in fp16, and train in fp32 (fp16 gradients underflow)."""
    if device.type != "cuda":
        return "fp32"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "fp32" if training else "fp16"


def residual_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" and dtype == torch.bfloat16 else torch.float32
