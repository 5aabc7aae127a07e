"""A base -> merged with an adapter -> bitsandbytes' int8, or its dtype, as a sequence classifier's folder.

Streamed: the source is mapped, and one projection at a time is merged in fp32, quantized once and written, so
the peak of memory does not grow with the model. Names and shapes are checked against the configuration before
the first byte is written. Weight, SCB and weight_format are the bytes that transformers and bitsandbytes
write, and transformers loads the folder unchanged. What it does not do: quantize anything but the seven
projections of a plain decoder (experts and pictures are refused by name), read pickled weights, or touch the
source.
"""

import contextlib
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.linalg import vector_norm
from tqdm import tqdm

from minarena.files.base import empty_model, read_config
from minarena.files.durable import TMP_SUFFIX
from minarena.files.shards import (
    DTYPES,
    FLOATS,
    LARGEST,
    Layout,
    Shapes,
    Stored,
    cut_into_shards,
    match_tensors,
    number_problem,
    open_shards,
    write_index,
    write_shard,
)
from minarena.files.tokenizer import check_vocabulary, load_tokenizer, write_tokenizer
from minarena.int8 import dequantize, quantize
from minarena.lora import is_projection, merged_weight
from minarena.quantization.merge import Merge, read_merge
from minarena.text import pad_id

SHARD_BYTES = 2_000_000_000
CHUNK = 1 << 22  # weights merged and quantized at a time: 16 MB as fp32 (64 MB took twice the CPU time)


@dataclass
class Source:
    """A checked base and what is to become of it. config: transformers', of the classifier to be written."""

    folder: str
    config: object
    tensors: dict[str, Stored]  # by the classifier's names, with the scales (SCB) of an 8-bit base
    shapes: Shapes  # of every tensor that the classifier has
    merge: Merge
    head: str  # whose weights the head gets: adapter, base or new
    float: bool = False  # write the merged projections in the base's dtype, not as int8

    def read(self, name: str) -> Tensor:
        replaced = self.merge.replaced.get(name)
        return self.tensors[name].read() if replaced is None else replaced

    def is_8bit(self) -> bool:
        return any(tensor.dtype == "I8" for tensor in self.tensors.values())


def open_source(folder: str, adapter: str | None = None, labels: int = 2, in_floats: bool = False) -> Source:
    """Read the headers of the base, and the adapter, and check that all fits; ValueError names what does
    not."""
    config, shapes = classifier_shapes(folder, labels)
    stored = open_shards(folder)
    tensors = match_tensors(folder, stored, shapes)
    if config.dtype is None:  # then transformers, too, takes the first floating tensor's
        config.dtype = next(FLOATS[tensor.dtype] for tensor in stored.values() if tensor.dtype in FLOATS)
    merge = read_merge(adapter, shapes) if adapter else Merge({}, {}, {})
    source = Source(folder, config, tensors, shapes, merge, "new", in_floats)
    if in_floats:
        del config.quantization_config
    # An adapter's own head outdates the base's, whether or not it has the rows that are asked for.
    owner = "adapter" if any(name.startswith("score.") for name in merge.replaced) else "base"
    if "score.weight" in (merge.replaced if owner == "adapter" else tensors):
        source.head = owner if tuple(source.read("score.weight").shape) == shapes["score.weight"] else "new"
    return source


def classifier_shapes(folder: str, labels: int) -> tuple[object, Shapes]:
    """(configuration of the 8-bit sequence classifier that the base becomes, its tensors' names and shapes).

    Raises ValueError where the base is quantized in another way, or is no plain decoder.
    """
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    config = read_config(folder)
    method = vars(config).pop("quantization_config", None) or {}
    if config.num_labels != labels:  # a reward model's "regression" would be transformers' loss
        config.problem_type = None
    config.num_labels = labels
    model = empty_model(folder, config, AutoModelForSequenceClassification)
    threshold = method.get("llm_int8_threshold", 6.0)
    config.quantization_config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold).to_dict()
    config.architectures = [type(model).__name__]
    return config, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def free_names(out: str) -> tuple[Path, Path]:
    """`out`, and the folder beside it that is written first; ValueError where either exists."""
    final = Path(out)
    unfinished = final.with_name(f"{final.name}.{TMP_SUFFIX}")
    if final.exists():
        raise ValueError(f"--out {out} exists: give a new folder, or delete it")
    if unfinished.exists():
        remedy = "delete it, or change --out"
        raise ValueError(f"{unfinished} is of a run that was killed, or still runs: {remedy}")
    return final, unfinished


@contextlib.contextmanager
def new_folder(out: str, size: int) -> Iterator[Path]:
    """A new folder beside `out` that takes the name `out` if the block ends well, and is deleted if not.

    size: bytes that will be written. Raises ValueError where either folder exists or the disk is full.
    """
    final, unfinished = free_names(out)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(final.parent).free
        if free < size:
            raise ValueError(f"--out {out}: needs {size / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free")
        unfinished.mkdir()
        yield unfinished
        unfinished.rename(final)
    except OSError as error:
        raise ValueError(f"--out {out}: {error.strerror or error}; what was written is deleted") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def layouts_of(source: Source, name: str) -> list[Layout]:
    """What is written for one of the classifier's tensors."""
    module, shape = name.removesuffix(".weight"), source.shapes[name]
    if is_projection(name) and source.float:
        dtype = source.config.dtype
    elif is_projection(name):
        scale, form = Layout(f"{module}.SCB", "F32", shape[:1]), Layout(f"{module}.weight_format", "U8", ())
        return [Layout(name, "I8", shape), scale, form]
    else:
        new = name == "score.weight" and source.head == "new"
        dtype = source.config.dtype if new else source.read(name).dtype
    return [Layout(name, next(key for key in DTYPES if DTYPES[key] == dtype), shape)]


def bytes_to_write(source: Source) -> int:
    return sum(layout.bytes() for name in source.shapes for layout in layouts_of(source, name))


def convert(
    source: Source, into: Path, seed: int = 0, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Write the classifier and its tokenizer into the folder `into`, config.json last; returns the
    relative error |W_int8 - W| / |W| of each projection that was quantized, W its merged float matrix.

    Raises ValueError for a weight that is not finite, or too large for fp16.
    """
    tokenizer = load_tokenizer(source.folder)
    check_vocabulary(tokenizer, source.config.vocab_size)
    write_tokenizer(tokenizer, source.folder, into)
    if source.config.pad_token_id is None:  # without one, transformers' classifier takes single rows only
        source.config.pad_token_id = pad_id(tokenizer)
    errors: dict[str, float] = {}
    shards = cut_into_shards((layouts_of(source, name) for name in source.shapes), SHARD_BYTES)
    with tqdm(total=bytes_to_write(source), desc="quantize", unit="B", unit_scale=True, disable=None) as bar:
        for file, layouts in shards.items():
            names = [layout.name for layout in layouts if layout.name in source.shapes]
            write_shard(into / file, layouts, converted(source, names, seed, device, errors, bar))
    write_index(into, shards)
    source.config.save_pretrained(into)
    return errors


def converted(
    source: Source, names: list[str], seed: int, device, errors: dict, bar: tqdm
) -> Iterator[Tensor]:
    """The tensors that `layouts_of` promises for `names`; puts each projection's error into `errors`."""
    for name in names:
        bar.set_postfix_str(name.removeprefix("model."), refresh=False)
        if is_projection(name) and source.float:
            yield torch.cat([W.to(source.config.dtype).cpu() for W in float_rows(source, name, device)])
        elif is_projection(name):
            CB, SCB, error = quantized(source, name, device)
            if error is not None:
                errors[name.removesuffix(".weight")] = error
            yield from (CB, SCB, torch.zeros((), dtype=torch.uint8))  # 0: stored row by row
        else:
            new = name == "score.weight" and source.head == "new"
            tensor = new_head(source, seed) if new else source.read(name)
            if problem := number_problem(tensor):
                raise ValueError(f"--model {source.folder}: tensor {name} has {problem}")
            yield tensor
        bar.update(sum(layout.bytes() for layout in layouts_of(source, name)))


def new_head(source: Source, seed: int) -> Tensor:
    """(labels, hidden), drawn as transformers draws it."""
    drawn = torch.randn(source.shapes["score.weight"], generator=torch.Generator().manual_seed(seed))
    return (drawn * source.config.initializer_range).to(source.config.dtype)


def quantized(source: Source, name: str, device) -> tuple[Tensor, Tensor, float | None]:
    """(CB, SCB, relative error) of one projection, on the CPU. An 8-bit one to which nothing is merged stays
    as it is: error None."""
    module = name.removesuffix(".weight")
    if source.read(name).dtype == torch.int8 and module not in source.merge.matrices:
        if problem := number_problem(source.read(f"{module}.SCB")):
            raise ValueError(f"--model {source.folder}: tensor {module}.SCB has {problem}")
        return source.read(name), source.read(f"{module}.SCB"), None
    parts, wrong, whole = [], 0.0, 0.0
    for W in float_rows(source, name, device):
        CB, SCB = quantize(W)
        parts.append((CB.cpu(), SCB.cpu()))
        wrong += vector_norm(dequantize(CB, SCB, torch.float32).sub_(W)).item() ** 2
        whole += vector_norm(W, dtype=torch.float32).item() ** 2
    CB, SCB = (torch.cat(part) for part in zip(*parts, strict=True))
    return CB, SCB, math.sqrt(wrong / whole) if whole else 0.0


def float_rows(source: Source, name: str, device) -> Iterator[Tensor]:
    """A projection's merged float matrix (out, in), at most CHUNK weights at a time, on `device`: fp32 where
    something was merged, else the base's dtype, from which transformers would quantize."""
    module, weight = name.removesuffix(".weight"), source.read(name)
    SCB = source.read(f"{module}.SCB") if weight.dtype == torch.int8 else None
    A, B, scale = source.merge.matrices.get(module, (None, None, 0.0))
    step = max(1, CHUNK // weight.shape[1])  # rows
    for begin in range(0, len(weight), step):
        rows = slice(begin, begin + step)
        W = weight[rows].to(device)
        if SCB is not None:
            W = dequantize(W, SCB[rows].to(device), torch.float32)
        if A is not None:
            W = merged_weight(W, A.to(device), B[rows].to(device), scale)
        elif SCB is None:
            W = W.to(source.config.dtype)
        if problem := number_problem(W, LARGEST):
            when = "" if A is None else " after the merge"
            raise ValueError(f"--model {source.folder}: tensor {name} has {problem}{when}")
        yield W
