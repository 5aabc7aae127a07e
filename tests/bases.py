"""Tiny random bases of every architecture, as ordinary model folders, for the tests of conversion.

write_base("qwen2", folder, dtype) -> folder, with a tokenizer of that family's habits.
write_tokenizer_folder(folder, pipeline, class_name, family): config.json, a tokenizer with an own pipeline
Random biases and a wide initializer_range: zeros would hide a bias that is dropped.
"""

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

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


TEXTS = [
    "In 1984 there were 12345 of them, 3.14159 each",
    "A list:\n\n1. first\n\n2. second\n\n\n\n   3.third",
    "two  spaces,   three, a tab\tand the  end  ",
    "我们每天练习下棋。怎么学? 1234567 次",
    "well done 👩‍👩‍👧‍👦🎉 né né ﬁne ½ I'LL don't",
]
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
# (normaliser, pre-tokenizer, decoder): three pipelines that no class of transformers builds by itself
PIPELINES = {
    "digits by three": (
        None,
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        decoders.ByteLevel(),
    ),
    "a space in front": (normalizers.NFKC(), pre_tokenizers.ByteLevel(), decoders.ByteLevel()),
    "no words": (normalizers.Replace(" ", "▁"), pre_tokenizers.Split("\n\n", "isolated"), decoders.Fuse()),
}


def trained_tokenizer(pipeline: str) -> Tokenizer:
    """A BPE tokenizer of 330 tokens that learnt these texts, so that its merges depend on the pipeline."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = PIPELINES[pipeline]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    tokenizer.add_tokens(["\n\n1"])  # one that is not special, as Gemma's newlines
    return tokenizer


def write_tokenizer_folder(folder: Path, pipeline: str, class_name: str, family: str, **more) -> Path:
    """config.json, tokenizer.json and tokenizer_config.json; weights are not needed."""
    base_config(family, vocab_size=400).save_pretrained(folder)
    trained_tokenizer(pipeline).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": class_name, "bos_token": "<bos>", "eos_token": "<eos>", **more}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
