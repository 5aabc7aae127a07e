"""Make an 8-bit folder of a float base, once, so that later runs load half the bytes and quantize nothing.

    python quantize.py --model google/gemma-2-9b-it --out gemma-2-9b-it-8bit

AutoModelForSequenceClassification.from_pretrained of transformers loads the folder unchanged, and train.py
takes it. What it does not do: merge an earlier LoRA, or stream (the whole int8 model is in memory).
"""

import json
import sys
from pathlib import Path

import torch

from minarena.config import QuantizeConfig, parse, run
from minarena.model import check_folder
from minarena.text import load_tokenizer
from minarena.tiny import base_folder


def main(argv: list[str] | None = None) -> dict:
    config = parse(QuantizeConfig, argv, __doc__)
    out = Path(config.out)
    if out.exists():
        raise ValueError(f"--out {out} exists: give a new folder, or delete it")
    with base_folder(config.model) as folder:
        check_folder(folder)
        tokenizer = load_tokenizer(folder)
        model = load_classifier(folder, config)
    aside = out.with_name(out.name + ".unfinished")
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(out)  # a folder with the final name is whole
    size = sum(file.stat().st_size for file in out.iterdir())
    print(
        f"{config.model} -> {out}: {size / 1e9:.2f} GB. Next: python train.py --model {out} --data FILE",
        file=sys.stderr,
    )
    result = {"out": str(out), "model": config.model, "bytes": size}
    print(json.dumps(result))
    return result


def load_classifier(folder: str, config: QuantizeConfig):
    """The base as an 8-bit sequence classifier (threshold 6.0, transformers' default) with a new head."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, BitsAndBytesConfig

    if getattr(AutoConfig.from_pretrained(folder), "quantization_config", None):
        raise ValueError(f"--model {config.model} is quantized already")
    torch.manual_seed(config.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=config.labels,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        device_map={"": device},
        use_safetensors=True,
    )


if __name__ == "__main__":
    run(main)
