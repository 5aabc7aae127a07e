"""Tiny random bases of every architecture, as ordinary model folders, for the tests of conversion.

write_base("qwen2", folder, dtype) -> folder, with a tokenizer of that family's habits.
Random biases and a wide initializer_range: zeros would hide a bias that is dropped.
"""

import torch
import transformers

from minarena.tiny import byte_tokenizer, tiny_config

SIZES = dict(
    vocab_size=261, hidden_size=56, intermediate_size=100, num_hidden_layers=2, initializer_range=0.2
)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
# family: (prefix of transformers' classes, special tokens that its tokenizers have)
FAMILIES = {
    "gemma2": ("Gemma2", {}),
    "gemma3": ("Gemma3Text", {}),
    "llama": ("Llama", {"pad_token": "<eos>"}),  # SmolLM2's habit: pad = EOS
    "qwen2": ("Qwen2", {"pad_token": "<eos>", "bos_token": None}),  # DeepSeek-R1-Distill-Qwen's, without BOS
    "nopad": ("Llama", {"pad_token": None}),  # Llama 3's
    "qwen3": ("Qwen3", {"pad_token": "<eos>", "bos_token": None}),
    "mistral": ("Mistral", {"pad_token": None}),
}


def base_config(family: str, **changes):
    prefix, special = FAMILIES[family]
    ids = {"<pad>": 0, "<eos>": 1, "<bos>": 2, None: None}
    settings = SIZES | {f"{name}_id": ids[token] for name, token in special.items()} | changes
    if family == "gemma2":
        return tiny_config(**settings)
    settings = dict(pad_token_id=0, eos_token_id=1, bos_token_id=2) | settings
    if family == "gemma3":
        settings |= dict(layer_types=["sliding_attention", "full_attention"], sliding_window=16)
    if family == "qwen2":
        settings.pop("head_dim")
    if family == "mistral":
        settings |= dict(sliding_window=16)
    return getattr(transformers, f"{prefix}Config")(**settings)


def random_base(family: str, dtype=torch.float32, labels: int | None = None, seed: int = 0, **changes):
    """A causal language model, or with `labels` a sequence classifier."""
    torch.manual_seed(seed)
    config = base_config(family, **changes)
    kind = transformers.AutoModelForSequenceClassification if labels else transformers.AutoModelForCausalLM
    if labels:
        config.num_labels = labels
    model = kind.from_config(config).eval()
    for name, p in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(p)
    return model.to(dtype)


def write_base(
    family: str, folder, dtype=torch.float32, labels: int | None = None, seed: int = 0, **changes
) -> str:
    random_base(family, dtype, labels, seed, **changes).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    for name, token in FAMILIES[family][1].items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(folder)
    return str(folder)
