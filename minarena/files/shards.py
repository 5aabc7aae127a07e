"""A checkpoint's safetensors files, read and written one tensor at a time.

Reading maps the files: a tensor's pages belong to the file and cost no memory of ours. Writing needs only the
names, dtypes and shapes beforehand: the header goes first, then each tensor to its place, so that nothing
waits in memory for the rest of its shard, as it does in safetensors' own save_file. The format
(https://huggingface.co/docs/safetensors) is 8 bytes with the header's length, the header as JSON, the data.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minarena.files.durable import read_record
from minarena.lora import is_projection

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = FLOATS | {"I8": torch.int8, "U8": torch.uint8}
INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
LARGEST = torch.finfo(torch.float16).max  # bitsandbytes quantizes from fp16
Shapes = dict[str, tuple[int, ...]]  # name of a tensor -> its shape
# In a checkpoint that reads pictures, too: how the text model's names begin, and those of the other parts
TEXT_PART = ("language_model.model.", "model.language_model.")
OTHER_PARTS = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)


@dataclass
class Layout:
    """A tensor to be written. dtype: safetensors' name, "BF16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass
class Stored:
    """A tensor that lies in a mapped file."""

    handle: safe_open
    file: str
    key: str
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        return self.handle.get_tensor(self.key)


def open_shards(folder: str) -> dict[str, Stored]:
    """Every tensor of model.safetensors, or of the files that its index names; only headers are read.

    Raises ValueError that names the file that is missing, cut off or damaged, or lacks a tensor. A folder
    with both is refused: transformers reads model.safetensors, other programs the files of the index.
    """
    index, files, promised = Path(folder) / INDEX, [WHOLE], {}
    if index.exists():
        try:
            promised = json.loads(index.read_text())["weight_map"]
            files = sorted(set(promised.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"--model {index}: not a usable index: {error!r}") from error
        if (Path(folder) / WHOLE).exists() and files != [WHOLE]:
            raise ValueError(
                f"--model {folder}: {WHOLE}, and {INDEX} names others: delete what is not the model"
            )
    stored = {}
    for file in files:
        try:
            handle = safe_open(Path(folder) / file, "pt")
        except (OSError, SafetensorError) as error:
            missing = isinstance(error, FileNotFoundError)
            reason = "no such file" if missing else f"cut off or damaged ({error})"
            raise ValueError(f"--model {folder}: {file}: {reason}: fetch it again") from error
        for key in handle.keys():  # noqa: SIM118 (a handle is no dict)
            part = handle.get_slice(key)
            stored[key] = Stored(handle, file, key, part.get_dtype(), tuple(part.get_shape()))
    for key, file in promised.items():
        if key not in stored or stored[key].file != file:
            raise ValueError(
                f"--model {folder}: {file}: tensor {key} is missing, which {INDEX} says is there"
            )
    return stored


def text_name(name: str) -> str:
    """`language_model.model.norm.weight` -> `model.norm.weight`; other names stay."""
    for prefix in TEXT_PART:
        if name.startswith(prefix):
            return "model." + name.removeprefix(prefix)
    return name.removeprefix("language_model.") if name.startswith("language_model.lm_head.") else name


def match_tensors(folder: str, stored: dict[str, Stored], shapes: Shapes) -> dict[str, Stored]:
    """The tensors under the names of `shapes`, the model's; ValueError where one of both has no counterpart.

    An LM head and rotary tables are left out: no model of ours has that head, and config.json gives the
    tables. So are the other parts of a checkpoint whose config.json has a text part (Gemma-3 4B and larger).
    A classifier's head, `score`, is left out where the model has none; where it has one, the stored one may
    be missing or have any number of rows.
    """
    parts = OTHER_PARTS if "text_config" in read_record(Path(folder) / "config.json") else ()
    left_out = ("lm_head.", *parts) if "score.weight" in shapes else ("lm_head.", "score.", *parts)
    tensors = {}
    for key, tensor in stored.items():
        name = text_name(key) if parts else key
        if name not in shapes and f"model.{name}" in shapes:  # a bare backbone's
            name = f"model.{name}"
        if not name.startswith(left_out) and not name.endswith("rotary_emb.inv_freq"):
            check_tensor(f"--model {folder}: {tensor.file}: tensor {key}", name, tensor, shapes)
            tensors[name] = tensor
    for name in shapes:
        if name not in tensors and name != "score.weight":
            raise ValueError(f"--model {folder}: the weights lack {name}")
        scale = name.removesuffix("weight") + "SCB"
        if name in tensors and tensors[name].dtype == "I8" and scale not in tensors:
            raise ValueError(f"--model {folder}: the weights lack {scale}, the scales of {name}")
    return tensors


def check_tensor(where: str, name: str, tensor: Stored, shapes: Shapes) -> None:
    """ValueError if a tensor of the base has no place in the model, another shape or an odd dtype."""
    module, _, leaf = name.rpartition(".")
    weight = shapes.get(f"{module}.weight")
    scale = {"SCB": weight[:1], "weight_format": ()} if is_projection(f"{module}.weight") and weight else {}
    wanted = scale.get(leaf, tensor.shape if module.startswith("score") else shapes.get(name))
    if wanted is None:
        raise ValueError(f"{where} has no place in a model of this config.json")
    if tensor.shape != wanted:
        raise ValueError(f"{where} is {tensor.shape}: config.json needs {wanted}")
    kinds = {"SCB": ["F32"], "weight_format": ["U8", "I8"]}.get(leaf, [*FLOATS])
    kinds = [*kinds, "I8"] if is_projection(name) else kinds
    if tensor.dtype not in kinds:
        raise ValueError(f"{where} is stored as {tensor.dtype}: neither float nor bitsandbytes' 8-bit")
    if leaf == "weight_format" and tensor.read().item() != 0:
        raise ValueError(f"{where} is not 0: another format than bitsandbytes' rows")


def number_problem(tensor: Tensor, largest: float = math.inf) -> str:
    """What is wrong with a tensor's numbers, or "". Unlike isfinite() it makes no copy of a large tensor."""
    if not tensor.numel():
        return ""
    low, high = (bound.item() for bound in tensor.aminmax())  # NaN, if there is one
    if not (math.isfinite(low) and math.isfinite(high)):
        return "NaN or infinity in it"
    return f"values above {largest:,.0f}, fp16's largest" if max(-low, high) > largest else ""


def require_numbers(folder: str, tensors: dict[str, Stored], quantize: bool) -> None:
    """ValueError that names a float tensor with NaN or infinity in it, or one that cannot be quantized.

    Without it the first step would blame its rows. The cost: the files are read once more (3 GB/s on two CPU
    cores).
    """
    for name, stored in tensors.items():
        if stored.dtype in FLOATS:
            largest = LARGEST if quantize and is_projection(name) else math.inf
            if problem := number_problem(stored.read(), largest):
                raise ValueError(f"--model {folder}: tensor {stored.key} has {problem}")


def cut_into_shards(groups: Iterable[list[Layout]], shard_bytes: int) -> dict[str, list[Layout]]:
    """File name -> what it holds: groups in the order given, none torn apart, each file at most `shard_bytes`
    with its header, except that a single larger group has a file of its own."""
    shards, size = [[]], 0
    for group in groups:
        more = sum(layout.bytes() + 256 for layout in group)  # 256: its line in the header, amply
        if shards[-1] and size + more > shard_bytes:
            shards.append([])
            size = 0
        shards[-1] += group
        size += more
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    return dict(zip(names if len(names) > 1 else ["model.safetensors"], shards, strict=True))


def write_shard(path: Path, layouts: list[Layout], tensors: Iterable[Tensor]) -> None:
    """Write one file; `tensors` come one by one, on the CPU, in the order of `layouts`."""
    # wide dtypes first, as safetensors does: each tensor then begins at a multiple of its item size
    order = sorted(layouts, key=lambda layout: (-DTYPES[layout.dtype].itemsize, layout.name))
    header, begin = {"__metadata__": {"format": "pt"}}, {}
    end = 0
    for layout in order:
        begin[layout.name], end = end, end + layout.bytes()
        offsets = [begin[layout.name], end]
        header[layout.name] = {"dtype": layout.dtype, "shape": layout.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for layout, tensor in zip(layouts, tensors, strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == (DTYPES[layout.dtype], layout.shape), layout
            file.seek(8 + len(text) + begin[layout.name])
            file.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
        file.flush()
        os.fsync(file.fileno())


def write_index(folder: Path, shards: dict[str, list[Layout]]) -> None:
    """The index that a checkpoint of more than one file needs."""
    if len(shards) > 1:
        where = {layout.name: file for file, layouts in shards.items() for layout in layouts}
        size = sum(layout.bytes() for layouts in shards.values() for layout in layouts)
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
