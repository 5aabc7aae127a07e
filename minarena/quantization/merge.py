"""An earlier LoRA adapter as a merge needs it: A, B and a scale for each matrix, and the tensors it replaces.

Adapters are taken as PEFT writes them, ours too: ranks and alphas that differ between matrices
(`rank_pattern`, `alpha_pattern`), rsLoRA's scale, any choice of the seven projections and of layers, tensors
saved whole (`modules_to_save`). Refused by name is what W + scale * B A does not express (DoRA, biases,
embeddings), an adapter that was trained on changed base weights (PiSSA and the like), and one that does not
fit the base: a merge that leaves a part out in silence gives a model that is quietly worse.
"""

import math
import re
from dataclasses import dataclass

from torch import Tensor

from minarena.files.adapter import head_kind, read_peft, require_adapter, unsupported
from minarena.files.shards import TEXT_PART, Shapes
from minarena.lora import PROJECTIONS, layer_number

LORA_TENSOR = re.compile(r"(.+)\.lora_([AB])\.weight")


@dataclass
class Merge:
    """matrices: module -> (A (r, in), B (out, r), scale). replaced: tensors that take the base's place, the
    head (`score.*`) in any shape. config: adapter_config.json as it stands."""

    matrices: dict[str, tuple[Tensor, Tensor, float]]
    replaced: dict[str, Tensor]
    config: dict


def read_merge(folder: str, shapes: Shapes) -> Merge:
    """The adapter in `folder` for a base with tensors of these names and shapes; nothing is merged yet.

    Raises ValueError, naming the setting, matrix or tensor, where the adapter is not one that can be merged
    or is not of this base.
    """
    require_adapter(folder)
    config, tensors = read_peft(folder)
    try:
        return build_merge(folder, config, tensors, shapes)
    except (re.error, TypeError, AttributeError) as error:  # a pattern that is none, a number for a list, ...
        pattern = f" in {error.pattern!r}" if isinstance(error, re.error) else ""
        raise ValueError(f"--adapter {folder}: adapter_config.json is damaged: {error}{pattern}") from error


def build_merge(folder: str, config: dict, tensors: dict[str, Tensor], shapes: Shapes) -> Merge:
    if problem := unsupported(config):
        raise ValueError(f"--adapter {folder}: {problem} in adapter_config.json cannot be merged")
    head_kind(folder, tensors)
    sides: dict[str, dict[str, Tensor]] = {}
    replaced = {}
    for name, tensor in tensors.items():
        match = LORA_TENSOR.fullmatch(name)
        if match:
            sides.setdefault(match[1], {})[match[2]] = tensor
        elif name.startswith("score.") or tensor.shape == shapes.get(name):
            replaced[name] = tensor
        elif name != "lm_head.weight":  # a classifier has none
            raise ValueError(f"--adapter {folder}: tensor {name} {misfit(tensor, name, shapes)}")
    refuse_gaps(folder, config, set(sides), shapes)
    for module in config.get("modules_to_save") or []:  # PEFT itself adds names that no base has
        there, saved = (any(f".{module}." in f".{name}" for name in names) for names in (shapes, replaced))
        if there and not saved:
            raise ValueError(f"--adapter {folder}: modules_to_save {module!r} has no tensors in the file")
    matrices = {module: lora_of(folder, module, sides[module], config, shapes) for module in sides}
    return Merge(matrices, replaced, config)


def misfit(tensor: Tensor, name: str, shapes: Shapes) -> str:
    if name not in shapes:
        return "has no place in this base: an adapter of another model?"
    return f"is {tuple(tensor.shape)}, the base's is {shapes[name]}: an adapter of another size?"


def refuse_gaps(folder: str, config: dict, found: set[str], shapes: Shapes) -> None:
    """Each target of the adapter must be in the base, and each matrix that it stands for in the file."""
    wanted = {module for module in modules(shapes) if targeted(module, config)}
    targets = config.get("target_modules") or []
    for target in [] if isinstance(targets, str) else targets:
        if target in (config.get("modules_to_save") or []):  # PEFT saves such a module whole, without LoRA
            continue
        if not any(matches([target], module) for module in modules(shapes)):
            raise ValueError(f"--adapter {folder}: target {target!r} is no projection of this base")
    odd = sorted(wanted ^ found)
    if odd:
        problem = "has no tensors in the file" if odd[0] in wanted else "is not among the adapter's targets"
        if odd[0] not in modules(shapes):
            problem = "is no projection of this base: an adapter of another model?"
        raise ValueError(f"--adapter {folder}: {odd[0]} {problem}")


def modules(shapes: Shapes) -> list[str]:
    """The base's projections: `model.layers.0.self_attn.q_proj`, ..."""
    names = [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")]
    return [name for name in names if name.rpartition(".")[2] in PROJECTIONS]


def targeted(module: str, config: dict) -> bool:
    """Whether PEFT put a LoRA there (peft/tuners/tuners_utils.py, check_target_module_exists)."""
    if matches(config.get("exclude_modules"), module) or not matches(config.get("target_modules"), module):
        return False
    layers = config.get("layers_to_transform")
    if layers in (None, []) or isinstance(config["target_modules"], str):
        return True
    return layer_number(module) in (layers if isinstance(layers, list) else [layers])


def matches(names: list[str] | str | None, module: str) -> bool:
    """A text is a pattern for the whole name (or PEFT's word for all), a list holds ends of names."""
    if isinstance(names, str):
        return names.lower() == "all-linear" or any(re.fullmatch(names, name) for name in aliases(module))
    return any(f".{alias}".endswith(f".{name}") for name in names or [] for alias in aliases(module))


def aliases(module: str) -> list[str]:
    """A projection's names in the models that an adapter may come from: classifier, bare backbone, part."""
    bare = module.removeprefix("model.")
    return [module, bare, *(prefix + bare for prefix in TEXT_PART)]


def lora_of(
    folder: str, module: str, sides: dict[str, Tensor], config: dict, shapes: Shapes
) -> tuple[Tensor, Tensor, float]:
    """(A, B, scale) of one projection, its own rank and alpha looked up as PEFT does."""
    r = pattern_value("rank_pattern", module, config, config["r"])
    alpha = pattern_value("alpha_pattern", module, config, config["lora_alpha"])
    rows, columns = shapes[f"{module}.weight"]
    for side, wanted in (("A", (r, columns)), ("B", (rows, r))):
        where = f"--adapter {folder}: {module}.lora_{side}.weight"
        if side not in sides:
            raise ValueError(f"{where} is missing")
        if tuple(sides[side].shape) != wanted:
            raise ValueError(
                f"{where} is {tuple(sides[side].shape)}, this base and the adapter's rank need {wanted}: "
                "an adapter of another size?"
            )
    return sides["A"], sides["B"], alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def pattern_value(pattern: str, module: str, config: dict, default):
    """The first entry whose key, a regular expression, ends the module's name (peft/utils/other.py,
    get_pattern_key)."""
    for key, value in (config.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
