"""The trained part on disk, in PEFT's format: LoRA and the head, loaded strictly.

attach_adapter_(model, AdapterConfig(r=64, alpha=4.0, head="mlp"), seed)     fresh, in place
save_adapter(folder, model, config, base_name)          adapter_config.json, adapter_model.safetensors
config = load_adapter_(model, folder)                   onto any PreferenceModel over the same base

Compared with: PEFT, which loads our files and whose files we load; the bits of the model that was saved; a
reload in a new process.
"""

import json

import children
import numpy as np
import pytest
import torch
from helpers import CPU, adapted
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from minarena.batching import collate
from minarena.files.adapter import load_adapter_, read_adapter, save_adapter
from minarena.files.base import load_backbone
from minarena.lora import PROJECTIONS
from minarena.model import AdapterConfig, PreferenceModel, adapter_tensors, attach_adapter_, make_head

IDS, MASK = collate(
    [np.append(np.random.default_rng(i).integers(4, 260, n), 1) for i, n in enumerate((12, 30, 5))], 0
)


@torch.no_grad()
def logits_of(model):
    result = model(input_ids=IDS, attention_mask=MASK)
    return result if isinstance(result, torch.Tensor) else result.logits


def peft_base(folder: str, head: str):
    """What a user of PEFT starts from: transformers' classifier, with the head that the adapter brings."""
    base = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, attn_implementation="eager"
    )
    if head == "mlp":
        base.score = make_head("mlp", 64, 0.0)
    return base


def plain(folder: str) -> PreferenceModel:
    backbone = load_backbone(folder, CPU, torch.float32, quantize=False)
    return PreferenceModel(backbone, torch.nn.Identity()).eval()


@pytest.mark.parametrize("head", ["mlp", "linear"])
@pytest.mark.parametrize("freeze_layers", [0, 1])
def test_peft_loads_our_files_and_gives_our_logits(tiny, tmp_path, head, freeze_layers):
    model, config = adapted(tiny, quantize=False, head=head, freeze_layers=freeze_layers)
    save_adapter(tmp_path, model, config, tiny)
    theirs = PeftModel.from_pretrained(peft_base(tiny, head), tmp_path).eval()
    torch.testing.assert_close(logits_of(theirs), logits_of(model), rtol=1e-5, atol=1e-6)
    # and reads the settings as we meant them
    stored = theirs.peft_config["default"]
    assert (stored.r, stored.lora_alpha, stored.base_model_name_or_path) == (6, 9.0, tiny)
    fresh = peft_base(tiny, head)
    assert (logits_of(fresh.eval()) - logits_of(model)).abs().max() > 1e-2  # the adapter was needed


@pytest.mark.parametrize("head", ["mlp", "linear"])
@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"layers_to_transform": [1]}])
def test_we_load_pefts_files_and_give_its_logits(tiny, tmp_path, head, changes):
    settings = {"r": 5, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": list(PROJECTIONS), **changes}
    lora = LoraConfig(**settings, modules_to_save=["score"], task_type="SEQ_CLS")
    theirs = get_peft_model(peft_base(tiny, head), lora)
    generator = torch.Generator().manual_seed(4)
    for p in theirs.parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.1, generator=generator)
    theirs.save_pretrained(tmp_path)
    model = plain(tiny)
    config = load_adapter_(model, tmp_path)
    assert (config.r, config.head, config.dropout) == (5, head, 0.1)
    torch.testing.assert_close(logits_of(model.eval()), logits_of(theirs.eval()), rtol=1e-5, atol=1e-6)


def test_a_reload_in_a_new_process_gives_the_same_bits(tiny, tmp_path):
    for head in ("mlp", "linear"):
        model, config = adapted(tiny, head=head)
        save_adapter(tmp_path / head, model, config, tiny)
        torch.save((IDS, MASK, logits_of(model)), tmp_path / head / "expected.pt")
    program = f"""
import torch
from minarena.files.adapter import load_adapter_
from minarena.files.base import load_backbone
from minarena.model import PreferenceModel
torch.manual_seed(1234)
model = PreferenceModel(load_backbone({tiny!r}, torch.device("cpu"), torch.float32), torch.nn.Identity())
for head in ("mlp", "linear"):
    load_adapter_(model, {str(tmp_path)!r} + "/" + head)
    ids, mask, logits = torch.load({str(tmp_path)!r} + f"/{{head}}/expected.pt")
    with torch.no_grad():
        assert torch.equal(model.eval()(ids, mask), logits), head
print("the same bits")
"""
    (tmp_path / "reload.py").write_text(program, encoding="utf-8")
    code, said = children.run(str(tmp_path / "reload"), [])
    assert code == 0 and said.splitlines()[-1] == "the same bits", said


def test_everything_that_is_trained_is_in_the_file_and_nothing_else(tiny, tmp_path):
    model, config = adapted(tiny)
    save_adapter(tmp_path, model, config, "some/base")
    stored = load_file(tmp_path / "adapter_model.safetensors")
    expected = {"base_model.model." + n: p for n, p in model.named_parameters() if p.requires_grad}
    assert stored.keys() == expected.keys() and len(stored) == 2 * 14 + 4
    assert all(torch.equal(stored[name], p) for name, p in expected.items())
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["score"]


def test_loading_replaces_whatever_adapter_was_there(tiny, tmp_path):
    """One loaded base serves several adapters, of another rank and head, too."""
    first, first_config = adapted(tiny, r=6)
    second, second_config = adapted(tiny, r=3, head="linear", freeze_layers=1)
    for name, model, config in (("first", first, first_config), ("second", second, second_config)):
        save_adapter(tmp_path / name, model, config, tiny)
    expected = {"first": logits_of(first), "second": logits_of(second)}
    for name in ("second", "first", "second"):
        load_adapter_(first, tmp_path / name)
        assert torch.equal(logits_of(first.eval()), expected[name])


def test_dropout_can_be_set_while_loading_and_alone(tiny, tmp_path):
    model, config = adapted(tiny)
    save_adapter(tmp_path, model, config, tiny)
    loaded = load_adapter_(model, tmp_path, dropout=0.3, head_dropout=0.2)
    assert (loaded.r, loaded.alpha, loaded.dropout, loaded.head_dropout) == (6, 9.0, 0.3, 0.2)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.3, 0.2}


@pytest.fixture
def saved(tiny, tmp_path):
    model, config = adapted(tiny)
    save_adapter(tmp_path, model, config, tiny)
    return model, tmp_path


def damage(folder, change) -> None:
    """Apply `change` to the dictionary of stored tensors, in place."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
HEAD = "base_model.model.score.4.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(Q), "layers.1.self_attn.q_proj.lora_A.weight is missing"),
        (lambda t: t.pop("base_model.model.score.1.bias"), "score.1.bias is missing"),
        (lambda t: [t.pop(name) for name in [*t] if "score" in name], "score.1.bias is missing"),
        (lambda t: t.update(extra=torch.ones(1)), "extra has no place"),
        (
            lambda t: t.update({Q.replace(".1.", ".7."): t[Q].clone()}),
            "layers.7.self_attn.q_proj.lora_A.weight",
        ),
        (lambda t: t.update({Q: t[Q][:3].clone()}), r"q_proj.lora_A.weight is \(3, 64\), .* needs \(6, 64\)"),
        (lambda t: t.update({HEAD: torch.ones(3, 32)}), r"score.4.weight is \(3, 32\), .* needs \(2, 32\)"),
        (lambda t: t[Q].fill_(float("nan")), "q_proj.lora_A.weight has values that are not finite"),
        (lambda t: t[HEAD][0].fill_(float("inf")), "score.4.weight has values that are not finite"),
    ],
)
def test_a_tensor_that_does_not_belong_or_fit_is_named(saved, change, named):
    model, folder = saved
    damage(folder, change)
    with pytest.raises(ValueError, match=f"{folder}.*{named}"):
        load_adapter_(model, folder)


def test_an_adapter_of_another_base_is_refused_by_tensor(saved, tmp_path_factory):
    from minarena.tiny import write_tiny

    for changes in ({"hidden_size": 48}, {"num_hidden_layers": 3, "layer_types": None}):
        other = plain(write_tiny(str(tmp_path_factory.mktemp("other")), **changes))
        with pytest.raises(ValueError, match=f"{saved[1]}: tensor .*another base"):
            load_adapter_(other, saved[1])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("rank_pattern", {"q_proj": 8}),
        ("alpha_pattern", {"q_proj": 8}),
        ("bias", "all"),
        ("fan_in_fan_out", True),
        ("target_modules", ["q_proj", "v_proj"]),
        ("target_modules", None),
        ("alora_invocation_tokens", [1, 2]),
        ("use_a_thing_of_tomorrow", True),
        ("init_lora_weights", "pissa"),
        ("r", None),
        ("lora_alpha", None),
        ("peft_type", "IA3"),
    ],
)
def test_what_our_layers_cannot_do_is_refused_by_name(saved, key, value):
    model, folder = saved
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config[key] = value
    if value is None:
        del config[key]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{folder}.*{key}"):
        load_adapter_(model, folder)


def test_files_that_are_missing_or_damaged_are_refused_by_folder(saved):
    _, folder = saved
    tensors = folder / "adapter_model.safetensors"
    whole = tensors.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"\0" * 100):
        tensors.write_bytes(broken)
        with pytest.raises(ValueError, match=f"{folder}: not a usable adapter"):
            read_adapter(folder)
    tensors.unlink()
    with pytest.raises(ValueError, match=f"{folder}: not a usable adapter"):
        read_adapter(folder)
    tensors.write_bytes(whole)
    for text in ("{", "[]", '"x"'):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=f"{folder}"):
            read_adapter(folder)


def test_a_head_of_three_labels_or_of_another_kind_is_refused_by_name(tiny, tmp_path):
    model, config = adapted(tiny)
    model.score[4] = torch.nn.Linear(32, 3)
    save_adapter(tmp_path, model, config, tiny)
    with pytest.raises(ValueError, match="number of labels"):
        load_adapter_(model, tmp_path)
    with pytest.raises(ValueError, match="head 'attention': must be mlp or linear"):
        make_head("attention", 8, 0.0)


def test_only_lora_and_head_are_trained_on_a_base_that_was_not_frozen():
    from transformers import LlamaConfig, LlamaModel

    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=20)
    model = PreferenceModel(
        LlamaModel(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1)), torch.nn.Identity()
    )
    attach_adapter_(model, AdapterConfig(r=2))
    assert all("lora_" in name or name.startswith("score.") for name in adapter_tensors(model))
