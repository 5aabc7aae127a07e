"""One optimiser step and one evaluation: what is optimised, by how much, and when it stops.

optimizer = make_optimizer(model, weight_decay=0.0)
loss, norm = one_step(model, optimizer, rows, p_first, lr=lr_at(step, steps, 2e-4, 0.025),
                        token_budget=4096, pad_id=0)
p = predict(model, rows, token_budget=4096, pad_id=0)      P(the answer shown first wins), (rows,)

Compared with: a loop over single rows with torch's cross_entropy, torch.optim.AdamW, transformers' schedule.
"""

import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import adapted, one_step, predict
from torch.nn.functional import cross_entropy
from transformers import TrainingArguments, get_linear_schedule_with_warmup

import train
from minarena.batching import micro_batches, real_tokens, rows_of_step
from minarena.data import swapped
from minarena.files.adapter import save_adapter
from minarena.files.pairs import read_pairs
from minarena.files.repair import repaired
from minarena.model import AdapterConfig, PreferenceModel, attach_adapter_
from minarena.optim import lr_at, make_optimizer, trainable
from minarena.step import preference_loss, seed_dropout
from minarena.text import encode

LENGTHS = (3, 31, 8, 20, 5, 30, 12)
ROWS = [np.append(np.random.default_rng(n).integers(4, 260, n - 1), 1) for n in LENGTHS]
P_FIRST = np.array([1.0, 0.0, 1.0, 1.0, 0.25, 0.0, 0.5])
STEP = dict(token_budget=64, pad_id=0, lr=1e-2)


@pytest.fixture(scope="module")
def model(tiny):
    return adapted(tiny)[0]


def keep_gradients(model) -> SimpleNamespace:
    """An optimiser that leaves weights and gradients as they are."""
    groups = [{"params": trainable(model)}]
    return SimpleNamespace(param_groups=groups, step=lambda: None, zero_grad=lambda set_to_none: None)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def naive_loss(model, rows=ROWS, p_first=P_FIRST) -> torch.Tensor:
    """Mean over rows, each run alone, without padding."""
    total = 0
    for row, p in zip(rows, p_first, strict=True):
        ids = torch.as_tensor(row).unsqueeze(0)
        target = torch.tensor([[p, 1 - p]], dtype=torch.float32)
        total = total + cross_entropy(model(ids, torch.ones_like(ids)), target)
    return total / len(rows)


def close(ours: dict, theirs: dict, rtol=1e-4) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        scale = theirs[name].abs().max().item()
        torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=rtol * scale, msg=name)


@pytest.mark.parametrize(
    ("budget", "sizes"), [(1, [1] * 7), (33, [1, 1, 1, 2, 2]), (64, [2, 3, 2]), (10_000, [7])]
)
def test_any_split_into_micro_batches_gives_the_gradient_of_a_loop_over_rows(model, budget, sizes):
    assert [len(batch) for batch in micro_batches(LENGTHS, budget)] == sizes
    model.zero_grad()
    expected = naive_loss(model.train())
    expected.backward()
    theirs = gradients(model)
    model.zero_grad()
    step = STEP | {"token_budget": budget}
    loss, norm = one_step(model, keep_gradients(model), ROWS, P_FIRST, max_grad_norm=0, **step)
    assert loss == pytest.approx(expected.item(), abs=1e-6)
    close(gradients(model), theirs)
    assert norm == pytest.approx(math.sqrt(sum((g**2).sum().item() for g in theirs.values())), rel=1e-5)


def test_gradients_are_scaled_down_to_the_norm_asked_for(model):
    """The norm that is returned is the one before clipping."""
    model.zero_grad()
    _, norm = one_step(model, keep_gradients(model), ROWS, P_FIRST, max_grad_norm=0, **STEP)
    whole = gradients(model)
    for bound, factor in ((norm / 3, 1 / 3), (norm * 2, 1)):
        model.zero_grad()
        assert one_step(model, keep_gradients(model), ROWS, P_FIRST, max_grad_norm=bound, **STEP)[1] == norm
        close(gradients(model), {name: g * factor for name, g in whole.items()})


def test_weights_after_five_steps_are_those_of_torch_adamw(tiny):
    """With weight decay on the matrices, none on the biases, and another lr each step."""
    model, _ = adapted(tiny)
    other = copy.deepcopy(model)
    named = [(name, p) for name, p in other.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if not name.endswith("bias")], "weight_decay": 0.1},
        {"params": [p for name, p in named if name.endswith("bias")], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=False, foreach=False)
    optimizer = make_optimizer(model, weight_decay=0.1)
    before = copy.deepcopy(dict(model.named_parameters()))
    for step, lr in enumerate((0.0, 3e-3, 5e-3, 2e-3, 1e-3)):
        rows, p_first = (
            ROWS[step : step + 3],
            P_FIRST[step : step + 3],
        )  # others each step: the averages matter
        one_step(model, optimizer, rows, p_first, max_grad_norm=0.5, **STEP | {"lr": lr})
        theirs.zero_grad()
        naive_loss(other.train(), rows, p_first).backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 0.5)
        for group in theirs.param_groups:
            group["lr"] = lr
        theirs.step()
    for name, p in named:
        mine = model.get_parameter(name)
        assert (mine - before[name]).abs().max() > 1e-3, name  # it moved, by more than the tolerance
        torch.testing.assert_close(mine, p, rtol=0, atol=5e-5, msg=name)
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen and all(torch.equal(p, before[name]) for name, p in frozen.items())


@pytest.mark.parametrize("steps", [1, 2, 7, 150, 3028])
@pytest.mark.parametrize("ratio", [0.0, 0.025, 0.1, 0.999])
def test_the_learning_rate_is_transformers_linear_schedule(steps, ratio, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), warmup_steps=ratio, report_to=[])
    warmup = arguments.get_warmup_steps(steps)
    assert warmup == math.ceil(steps * ratio)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, steps)
    for step in range(steps):
        assert lr_at(step, steps, 2e-4, ratio) == pytest.approx(
            schedule.get_last_lr()[0], rel=1e-9, abs=1e-15
        )
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr()[0] == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_the_loss_is_torchs_cross_entropy_with_its_label_smoothing(smoothing):
    logits = torch.randn(50, 2) * 3
    labels = torch.randint(0, 2, (50,))  # the class: 0 = the first answer wins
    theirs = cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(preference_loss(logits, 1.0 - labels, smoothing), theirs)
    soft = torch.rand(50)
    theirs = cross_entropy(
        logits, torch.stack([soft, 1 - soft], dim=1), label_smoothing=smoothing, reduction="none"
    )
    torch.testing.assert_close(preference_loss(logits, soft, smoothing), theirs)
    assert preference_loss(logits.bfloat16(), soft).dtype == torch.float32


def test_label_smoothing_reaches_the_step(model):
    plain, smooth = (
        one_step(model, keep_gradients(model), ROWS, P_FIRST, label_smoothing=s, **STEP)[0]
        for s in (0.0, 0.4)
    )
    with torch.no_grad():
        expected = naive_loss(model, p_first=P_FIRST * 0.6 + 0.2).item()
    assert smooth == pytest.approx(expected, abs=1e-6) and abs(smooth - plain) > 1e-3


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_before_the_weights_change(tiny, where):
    model, _ = adapted(tiny)
    optimizer = make_optimizer(model, 0.0)
    one_step(model, optimizer, ROWS, P_FIRST, **STEP)
    if where == "loss":
        model.score[4].bias.data[0] = float("nan")
    else:
        model.score[4].bias.register_hook(lambda gradient: gradient * float("inf"))
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    with pytest.raises(FloatingPointError, match=r"loss \S+, gradient norm (nan|inf)"):
        one_step(model, optimizer, ROWS, P_FIRST, **STEP)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[0][name], rtol=0, atol=0, equal_nan=True)
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[1][index][key]) for key, value in state.items())


def test_predictions_come_back_in_the_order_of_the_rows(model):
    with torch.no_grad():
        logits = torch.cat([model.eval()(torch.as_tensor(r)[None], torch.ones(1, len(r))) for r in ROWS])
    expected = logits.double().softmax(dim=-1)[:, 0].numpy()
    for budget in (1, 64, 10_000):
        p = predict(model, ROWS, token_budget=budget, pad_id=0)
        np.testing.assert_allclose(p, expected, rtol=0, atol=1e-6)
    assert np.std(expected) > 1e-3
    assert len(predict(model, [], token_budget=64, pad_id=0)) == 0


def test_prediction_switches_dropout_off_and_training_switches_it_on(tiny):
    model, _ = adapted(tiny, dropout=0.5, head_dropout=0.5)
    first, second = (predict(model.train(), ROWS, token_budget=64, pad_id=0) for _ in range(2))
    assert np.array_equal(first, second)
    losses = []
    for seed, step in ((1, 7), (1, 7), (1, 8), (2, 7)):
        seed_dropout(seed, step)
        losses.append(one_step(model.eval(), keep_gradients(model), ROWS, P_FIRST, **STEP)[0])
    assert losses[0] == losses[1] and len(set(losses)) == 3  # masks follow from (seed, step) alone


def test_predictions_that_are_not_finite_stop_and_name_their_positions(tiny):
    model, _ = adapted(tiny)
    model.score[4].bias.data[:] = float("nan")
    with pytest.raises(FloatingPointError, match=r"for 7 of 7 rows: \[0, 1, 2, 3, 4\]"):
        predict(model, ROWS, token_budget=64, pad_id=0)


def test_a_step_under_bf16_autocast_is_close_to_the_fp32_step(model):
    losses, found = [], []
    for dtype in (torch.float32, torch.bfloat16):
        model.zero_grad()
        losses.append(
            one_step(model, keep_gradients(model), ROWS, P_FIRST, dtype=dtype, max_grad_norm=0, **STEP)[0]
        )
        found.append(torch.cat([g.flatten() for g in gradients(model).values()]))
    assert losses[1] == pytest.approx(losses[0], abs=0.02) and losses[1] != losses[0]
    assert torch.cosine_similarity(*found, dim=0) > 0.98
    assert found[1].norm().item() == pytest.approx(found[0].norm().item(), rel=0.05)


def test_order_both_averages_the_losses_of_both_orders_of_a_row(
    tiny, tokenizer, pairs_file, tmp_path, capsys
):
    model, config = adapted(tiny)
    save_adapter(tmp_path / "start", model, config, tiny)
    words = (
        f"--model {tiny} --data {pairs_file} --order both --batch-size 6 --limit 12 --n-splits 2 --max-length"
    )
    words += f" 120 --lora-dropout 0 --head-dropout 0 --init-adapter {tmp_path}/start --out {tmp_path}/both"
    train.main(words.split())
    capsys.readouterr()
    table = repaired(read_pairs([pairs_file]))
    used = table.head(12).iloc[1::2]  # fold 0 of 2 is held out
    chosen = used.iloc[rows_of_step(0, 6, 6, 0xFACED)]
    losses = []
    for shown in (chosen, swapped(chosen)):
        with torch.no_grad():
            rows = encode(tokenizer, shown, 120)
            losses.append(naive_loss(model, rows, shown["label"].to_numpy()).item())
    assert abs(losses[0] - losses[1]) > 1e-3
    first = json.loads((tmp_path / "both" / "log.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(sum(losses) / 2, abs=1e-6)


def test_tokens_are_counted_without_padding():
    assert real_tokens(ROWS) == sum(LENGTHS)


@pytest.mark.parametrize("recompute", [False, True])
def test_cudnn_attention_is_off_in_the_forward_and_where_layers_are_recomputed(recompute, monkeypatch):
    from transformers import LlamaConfig, LlamaModel

    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=20)
    backbone = LlamaModel(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1))
    model = PreferenceModel(backbone, torch.nn.Identity())
    attach_adapter_(model, AdapterConfig(r=2))
    if recompute:
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
    enabled, sdpa = [], torch.nn.functional.scaled_dot_product_attention

    def watched(*arguments, **keywords):
        enabled.append(torch.backends.cuda.cudnn_sdp_enabled())
        return sdpa(*arguments, **keywords)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    rows = [np.arange(4, 9, dtype=np.int32), np.arange(4, 7, dtype=np.int32)]
    one_step(model, make_optimizer(model, 0.0), rows, np.ones(2), lr=0.0, token_budget=64, pad_id=0)
    assert enabled == [False] * (2 if recompute else 1)


def test_an_infinite_logit_is_no_probability():
    class Infinite(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.fast = torch.nn.Parameter(torch.zeros(1)), None

        def forward(self, input_ids, attention_mask):
            return torch.tensor([[float("inf"), 0.0]]).expand(len(input_ids), 2)

    with pytest.raises(FloatingPointError, match="not finite"):
        predict(Infinite(), [np.array([4, 5])], token_budget=8, pad_id=0)
