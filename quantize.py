"""Make an 8-bit folder of a base, once, with an earlier LoRA merged into it: later runs load half the bytes.

    python quantize.py --model google/gemma-2-9b-it --out gemma-2-9b-it-8bit
    python quantize.py --model google/gemma-2-9b-it --adapter lmsys-adapter --labels 2 --out gemma-lmsys-8bit
    python quantize.py --model google/gemma-2-9b-it --adapter runs/linear --float --out judge    one to serve

The base is streamed: a 9B needs less than 4 GB of memory, GPU or none. The folder is an ordinary one:
transformers' AutoModelForSequenceClassification.from_pretrained loads it unchanged, and train.py and infer.py
take it. With the adapter of a `--head linear` run it is a judge: it takes the template's text and tells which
answer is preferred; its README.md says how. quantization.json in it says what quantization did to each matrix
and, for a model that fits in memory, to the last hidden state. The last line on stdout is one JSON object;
the rest goes to stderr (on a terminal that line comes with --json only).
"""

if __name__ == "__main__":  # the imports below take seconds
    from minarena.runtime.interrupt import one_line_on_ctrl_c

    one_line_on_ctrl_c("quantize.py")

import json
import math
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from torch import nn

from minarena.batching import collate
from minarena.config import QuantizeConfig, parse
from minarena.dist import this_world
from minarena.files.base import base_folder, load_backbone
from minarena.files.durable import RECORDED, commit
from minarena.files.outliers import relative_change
from minarena.files.tokenizer import load_tokenizer
from minarena.int8 import Int8Linear
from minarena.lora import PROJECTIONS, is_projection, layer_number
from minarena.model import PreferenceModel
from minarena.quantization.classifier import read_judge, write_judge
from minarena.quantization.stream import (
    Source,
    bytes_to_write,
    convert,
    float_rows,
    free_names,
    new_folder,
    open_source,
)
from minarena.runtime.console import device_name, plain_bars, print_json, run_command, say
from minarena.runtime.launch import launch
from minarena.text import encode, pad_id
from minarena.tiny import demo_pairs

MEMORY = 4e9  # bytes that the command may take on a CPU, the comparison of hidden states included
COMPARED_PAIRS = 8  # generated pairs that the hidden states are compared on


def main(argv: list[str] | None = None) -> dict:
    config = parse(QuantizeConfig, argv, __doc__)
    if this_world().size > 1:
        raise ValueError("it runs as one process: start it with python, not with torchrun")
    plain_bars()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    free_names(config.out)  # before anything is fetched or printed
    with base_folder(config.model) as name:
        source = open_source(name, config.adapter, config.labels, config.float)
        if source.is_8bit() and not config.adapter and source.head == "base":
            raise ValueError(f"--model {config.model} is quantized already: nothing to do without --adapter")
        judge = read_judge(config, source)
        announce(source, config, device)
        with new_folder(config.out, bytes_to_write(source)) as folder:
            errors = convert(source, folder, config.seed, device)
            seconds = time.perf_counter() - start
            compared = not config.float and fits(source, device)
            hidden = hidden_change(folder, source, device) if compared else None
            record = {"model": config.model, "adapter": config.adapter, "labels": config.labels}
            record |= {"head": source.head, "merged": len(source.merge.matrices)}
            record |= {"seconds": round(seconds, 1)}
            record |= {"projections": summary(errors), "last_hidden_state": hidden, "matrices": errors}
            record |= {"versions": {name: version(name) for name in RECORDED}, "commit": commit()}
            if judge:
                write_judge(folder, judge, name)
            (folder / "quantization.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    size = sum(file.stat().st_size for file in Path(config.out).iterdir())
    if errors:
        print_errors(record)
    say(f"{config.model} -> {config.out}: {size / 1e9:.2f} GB, {seconds:.0f} s.")
    how = f"read {config.out}/README.md" if judge else f"python train.py --model {config.out} --data FILE"
    say(f"Next: {how}")
    result = {"out": config.out, "model": config.model, "adapter": config.adapter, "bytes": size}
    result |= {name: record[name] for name in ("head", "merged", "seconds", "last_hidden_state")}
    result["worst"] = max(errors.values(), default=None)
    return print_json(result, config.json)


def announce(source: Source, config: QuantizeConfig, device: torch.device) -> None:
    """What will happen, before it takes its time."""
    size = sum(math.prod(shape) for shape in source.shapes.values()) / 1e6
    say(f"model     {config.model}, {size:,.1f} million parameters")
    say(f"computed  a matrix at a time on {device_name(device)}")
    if source.merge.matrices or source.merge.replaced:
        trained_on = source.merge.config.get("base_model_name_or_path") or "an unnamed base"
        say(f"merging   {len(source.merge.matrices)} matrices of {config.adapter}, trained on {trained_on}")
    if source.merge.matrices and source.is_8bit():
        say("          onto an 8-bit base: dequantized, merged and quantized again, which costs accuracy;")
        say("          the float base, if there is one, is the better --model")
    heads = {"new": "a new linear one", "base": "the base's own", "adapter": "the adapter's"}
    say(f"head      {heads[source.head]}, {config.labels} labels (train.py brings its own)")
    say(f"output    {config.out}, {bytes_to_write(source) / 1e9:.2f} GB")


def fits(source: Source, device: torch.device) -> bool:
    """Whether the model fits beside its float self: into the GPU's free memory, on a CPU into MEMORY."""
    floats = 4 * sum(math.prod(shape) for name, shape in source.shapes.items() if is_projection(name))
    room = torch.cuda.mem_get_info()[0] if device.type == "cuda" else MEMORY
    return floats + bytes_to_write(source) < room


@torch.no_grad()
def hidden_change(folder: Path, source: Source, device: torch.device) -> dict[str, float]:
    """Relative change |h_int8 - h| / |h| of each text's last hidden state, h by the merged float projections,
    all else equal, computed in fp32: the median and the worst of the demo's COMPARED_PAIRS pairs."""
    backbone = load_backbone(str(folder), device, torch.float32)
    model = PreferenceModel(backbone, nn.Identity())  # no head: gives the last token's hidden state
    tokenizer = load_tokenizer(str(folder))
    rows = encode(tokenizer, demo_pairs(COMPARED_PAIRS, seed=0), max_length=512)
    batch = collate(rows, pad_id(tokenizer), device)
    with_int8 = model(*batch)  # (COMPARED_PAIRS, C)
    for name, module in list(backbone.named_modules()):
        if isinstance(module, Int8Linear):
            W = torch.cat([*float_rows(source, f"model.{name}.weight", device)]).float()
            linear = nn.utils.skip_init(nn.Linear, *W.T.shape, bias=module.bias is not None, device="meta")
            linear.weight = nn.Parameter(W)
            linear.bias = None if module.bias is None else nn.Parameter(module.bias.float())
            backbone.set_submodule(name, linear)
    exact = model(*batch)
    change = relative_change(with_int8, exact).tolist()
    return {"texts": COMPARED_PAIRS, "median": median(change), "worst": max(change)}


def summary(errors: dict[str, float]) -> dict[str, dict]:
    """Projection -> matrices, median and worst relative error, and the layer of the worst."""
    result = {}
    for projection in PROJECTIONS:
        own = {name: error for name, error in errors.items() if name.endswith(projection)}
        if own:
            worst = max(own, key=own.get)
            result[projection] = {"matrices": len(own), "median": median(own.values())}
            result[projection] |= {"worst": own[worst], "worst_layer": layer_number(worst)}
    return result


def print_errors(record: dict) -> None:
    """Print |W_int8 - W| / |W| of each projection, in percent: median and worst of its matrices; and
    |h_int8 - h| / |h| of the last hidden state: median and worst of the texts."""
    say("\nrelative error of   matrices   median    worst")
    for name, row in record["projections"].items():
        cells = f"{row['matrices']:8}   {row['median']:6.2%}   {row['worst']:6.2%}"
        say(f"  {name:15}   {cells}   (layer {row['worst_layer']})")
    hidden = record["last_hidden_state"]
    if hidden:
        cells = f"{hidden['texts']:8}   {hidden['median']:6.2%}   {hidden['worst']:6.2%}"
        say(f"  last hidden state {cells}   (texts)")
    else:
        say("  last hidden state: not compared, the float model does not fit beside this one")


if __name__ == "__main__":
    launch(run_command, main)
