"""Our whole training loop against Hugging Face's Trainer with a PEFT model: the same loss at every step.

    python train.py --model BASE --data FILE --init-adapter START --lora-dropout 0 --head-dropout 0

and, written the usual way: AutoModelForSequenceClassification in 8 bit, PeftModel, transformers.Trainer.
Both start from one adapter file, see the same rows in the same order, use torch's AdamW in fp32 with warm-up,
linear decay and clipping. Our side cuts each step into uneven micro-batches, pads on the left and counts
tokens; the other side tokenises, batches, pools and accumulates its own way.
"""

import json

import pandas as pd
import pytest
import torch
from helpers import adapted, write_pairs
from peft import PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
)

import train
from minarena.batching import rows_of_step
from minarena.files.adapter import save_adapter
from minarena.model import make_head
from minarena.tiny import demo_pairs

STEPS, ROWS_A_STEP, MAX_LENGTH, SEED = 20, 8, 130, 11


@pytest.fixture(scope="module")
def start(tiny, tmp_path_factory):
    """(folder of an adapter to start from, file of 160 rows, file of held-out rows)"""
    folder = tmp_path_factory.mktemp("parity")
    model, config = adapted(tiny)
    save_adapter(folder / "start", model, config, tiny)
    train_file = write_pairs(folder / "train.parquet", demo_pairs(STEPS * ROWS_A_STEP, seed=1))
    return folder, train_file, write_pairs(folder / "valid.parquet", demo_pairs(4, seed=2, held_out=True))


def our_losses(tiny: str, folder, train_file: str, valid_file: str, order: str) -> list[dict]:
    words = f"--model {tiny} --data {train_file} --eval-data {valid_file} --init-adapter {folder}/start"
    words += f" --out {folder}/{order} --order {order} --seed {SEED} --batch-size {ROWS_A_STEP} --dtype fp32"
    words += f" --max-length {MAX_LENGTH} --token-budget 500 --lr 3e-3 --warmup-ratio 0.1 --max-grad-norm 0.5"
    train.main([*words.split(), "--lora-dropout", "0", "--head-dropout", "0"])
    events = [json.loads(line) for line in (folder / order / "log.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "step"]


class SameRows(Trainer):
    """The Trainer, with its rows in our order and each step's loss kept at full precision."""

    def _get_train_sampler(self, dataset=None):
        return [
            int(row) for step in range(STEPS) for row in rows_of_step(step, len(dataset), ROWS_A_STEP, SEED)
        ]

    def compute_loss(self, model, inputs, **keywords):
        loss = super().compute_loss(model, inputs, **keywords)
        self.seen.append(loss.item())
        return loss


def trainer_losses(tiny: str, folder, train_file: str, order: str) -> tuple[list[dict], list[float]]:
    """(the Trainer's log, its losses)"""
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    base = AutoModelForSequenceClassification.from_pretrained(
        tiny, num_labels=2, quantization_config=quantization, attn_implementation="eager", dtype=torch.float32
    )
    base.score = make_head("mlp", 64, 0.0)
    model = PeftModel.from_pretrained(base, folder / "start", is_trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    examples = []
    for row in pd.read_parquet(train_file).to_dict("records"):
        a, b = row["response_a"], row["response_b"]
        first, second = (a, b) if order == "ab" else (b, a)
        text = f"<prompt>: {row['prompt']}\n\n<response_a>: {first}\n\n<response_b>: {second}"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][-(MAX_LENGTH - 2) :]
        shown_first_won = (row["winner"] == "model_a") == (order == "ab")
        ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
        examples.append({"input_ids": ids, "labels": 0 if shown_first_won else 1})

    def pad_right(batch):
        longest = max(len(example["input_ids"]) for example in batch)
        filled = [example["input_ids"] + [0] * (longest - len(example["input_ids"])) for example in batch]
        ids = torch.tensor(filled)
        labels = torch.tensor([example["labels"] for example in batch])
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=ROWS_A_STEP,
        num_train_epochs=1,
        learning_rate=3e-3,
        warmup_steps=0.1,
        lr_scheduler_type="linear",
        max_grad_norm=0.5,
        optim="adamw_torch",
        weight_decay=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = SameRows(model=model, args=arguments, train_dataset=examples, data_collator=pad_right)
    trainer.seen = []
    trainer.train()
    return [entry for entry in trainer.state.log_history if "grad_norm" in entry], trainer.seen


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_twenty_steps_have_the_losses_of_trainer_and_peft(tiny, start, order, capsys):
    ours = our_losses(tiny, *start, order)
    log, losses = trainer_losses(tiny, start[0], start[1], order)
    assert len(ours) == len(losses) == len(log) == STEPS
    for mine, loss, theirs in zip(ours, losses, log, strict=True):
        assert mine["loss"] == pytest.approx(loss, abs=1e-5), mine["step"]
        assert mine["lr"] == pytest.approx(theirs["learning_rate"], rel=1e-6)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    moved = [mine["loss"] for mine in ours]
    assert max(moved) - min(moved) > 0.05 and max(event["grad_norm"] for event in ours) > 0.5  # clipping bit
