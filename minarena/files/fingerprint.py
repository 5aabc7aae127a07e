"""What an adapter was trained on: short hashes of a base's configuration, weights and tokenizer.

    record = fingerprint(folder, tokenizer)    {"config": "3f...", "weights": "a0...", "tokenizer": "77..."}
    differences(before, record)                ["weights"]: another base under the same name

An adapter on other weights than its own gives probabilities that look fine and are wrong. Cheap: of each
tensor the name, dtype, shape and a few kilobytes (4 MB of a 9B), so another sharding of the same tensors is
the same base. What it does not do: notice a change of a few numbers between the bytes that are read.
"""

import hashlib
import json
from pathlib import Path

from torch import Tensor, uint8

from minarena.files.durable import read_record
from minarena.files.shards import open_shards
from minarena.text import pad_id

SAMPLE = 4096  # bytes, at the start and in the middle of each tensor
# Keys of config.json that decide nothing of the numbers
COSMETIC = ("_name_or_path", "architectures", "transformers_version", "use_cache", "auto_map")


def fingerprint(folder: str, tokenizer) -> dict[str, str]:
    """Part of the base -> the first 16 digits of its SHA-256."""
    config = {k: v for k, v in read_record(Path(folder) / "config.json").items() if k not in COSMETIC}
    parts = {
        "config": [json.dumps(config, sort_keys=True).encode()],
        "weights": weights_bytes(folder),
        "tokenizer": tokenizer_bytes(folder, tokenizer),
    }
    return {name: hashlib.sha256(b"\0".join(pieces)).hexdigest()[:16] for name, pieces in parts.items()}


def weights_bytes(folder: str) -> list[bytes]:
    """Of each tensor, in the order of the names: what it is called, and a sample of it."""
    pieces = []
    for name, stored in sorted(open_shards(folder).items()):
        pieces += [f"{name} {stored.dtype} {stored.shape}".encode(), sample(stored.read())]
    return pieces


def sample(tensor: Tensor) -> bytes:
    """The first SAMPLE bytes of the tensor and SAMPLE bytes from its middle on."""
    data = tensor.reshape(-1).view(uint8)
    middle = len(data) // 2
    return data[:SAMPLE].numpy().tobytes() + data[middle : middle + SAMPLE].numpy().tobytes()


def tokenizer_bytes(folder: str, tokenizer) -> list[bytes]:
    """All that decides the ids of a row: tokenizer.json or, where there is none, the vocabulary; the added
    tokens; BOS, EOS and pad."""
    path = Path(folder) / "tokenizer.json"
    vocabulary = (
        path.read_bytes() if path.exists() else json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()
    )
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if not token.special}
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id, pad_id(tokenizer)]
    return [vocabulary, json.dumps([ends, sorted(added.items())]).encode()]


def differences(before: dict | None, now: dict[str, str]) -> list[str]:
    """The parts in which two fingerprints differ; a run from before fingerprints (None) differs in none."""
    return [name for name in now if isinstance(before, dict) and before and before.get(name) != now[name]]
