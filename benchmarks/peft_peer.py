"""The peer's parts: transformers' classifier, PEFT's LoRA, Trainer's loop, and a padded prediction.

Only peft_trainer.py uses it. `options` are that script's: lora_r, lora_alpha, lora_dropout, head_dropout, lr,
warmup_ratio, seed, checkpointing, attn, model.
"""

import argparse
import contextlib
import math
import sys
import tempfile
import time

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks import random_base as base
from minarena.batching import collate, micro_batches
from minarena.lora import PROJECTIONS
from minarena.model import make_head

ROWS_A_STEP, MICRO_BATCHES = 16, 2  # the recipe's: 8 on the device x 2 accumulated


def load_classifier(options: argparse.Namespace, device: torch.device, dtype: torch.dtype):
    """(transformers' sequence classifier over an int8 base, the attention it runs)"""
    from transformers import AutoConfig, AutoModelForSequenceClassification, BitsAndBytesConfig

    softcap = getattr(AutoConfig.from_pretrained(options.model), "attn_logit_softcapping", None)
    attention = options.attn or ("eager" if softcap else "sdpa")
    int8 = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["score"])
    keywords = dict(quantization_config=int8, device_map={"": device}, dtype=dtype)
    load = AutoModelForSequenceClassification.from_pretrained
    return load(options.model, num_labels=2, attn_implementation=attention, **keywords), attention


def with_peft(model: nn.Module, options: argparse.Namespace, pad_id: int) -> nn.Module:
    """The classifier with the recipe's head and LoRA; embeddings and norms in fp32, as the recipe's stack
    had."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model.config.pad_token_id, model.config.use_cache = pad_id, False
    model.enable_input_require_grads()  # else re-entrant checkpointing has nothing to differentiate
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # Trainer turns it on
    torch.manual_seed(options.seed)
    model.score = make_head("mlp", model.config.hidden_size, options.head_dropout).to(model.device)
    lora = dict(r=options.lora_r, lora_alpha=options.lora_alpha, lora_dropout=options.lora_dropout)
    targets = dict(target_modules=list(PROJECTIONS), modules_to_save=["score"], task_type="SEQ_CLS")
    return get_peft_model(model, LoraConfig(**lora, **targets))


def run_trainer(model, rows, labels, batches, pad_id, options, device) -> tuple[list[float], list[float]]:
    """Train on `batches` (row numbers; MICRO_BATCHES a step) once; returns (losses, seconds) of the steps.

    rows: token ids, one array a row; labels (rows,) int: class 0 where the answer shown first wins. Losses
    are nats a row. Raises FloatingPointError, naming the step, where a loss is not finite."""
    from transformers import Trainer, TrainingArguments

    def collated(chosen: list[int]) -> dict:
        input_ids, mask = collate([rows[i] for i in chosen], pad_id)
        return {"input_ids": input_ids, "attention_mask": mask, "labels": torch.as_tensor(labels[chosen])}

    def loss_of_step(outputs, labels, num_items_in_batch):
        return cross_entropy(outputs.logits.float(), labels, reduction="sum") / num_items_in_batch

    steps = math.ceil(len(batches) / MICRO_BATCHES)  # `batches` holds all epochs
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        schedule = dict(
            learning_rate=options.lr, lr_scheduler_type="linear", weight_decay=0.0, max_grad_norm=1.0
        )
        schedule |= dict(warmup_steps=math.ceil(steps * options.warmup_ratio), num_train_epochs=1)
        saving = dict(gradient_checkpointing=options.checkpointing == "on")
        # Re-entrant: bitsandbytes' product keeps tensors where the other kind cannot drop them, and a step
        # of 9B with 2 x 8 rows then ran out of 80 GB.
        saving |= dict(gradient_checkpointing_kwargs={"use_reentrant": True})
        arguments = TrainingArguments(
            output_dir=scratch,
            gradient_accumulation_steps=MICRO_BATCHES,
            optim="adamw_bnb_8bit" if device.type == "cuda" else "adamw_torch",
            bf16=device.type == "cuda",
            use_cpu=device.type == "cpu",
            logging_steps=1,
            logging_nan_inf_filter=False,  # its default logs a NaN as 0 and goes on
            save_strategy="no",
            report_to="none",
            seed=options.seed,
            **schedule,
            **saving,
        )
        trainer = Trainer(model, arguments, train_dataset=range(len(rows)), compute_loss_func=loss_of_step)
        loader = torch.utils.data.DataLoader(range(len(rows)), batch_sampler=batches, collate_fn=collated)
        trainer.get_train_dataloader = lambda: loader  # our rows of each step, not its own shuffle
        ends = [time.perf_counter()]
        trainer.create_optimizer()
        trainer.optimizer.register_step_post_hook(lambda *_: (base.wait(), ends.append(time.perf_counter())))
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if not np.isfinite(losses).all():
        raise FloatingPointError(f"the peer's loss is not finite at step {int(np.isfinite(losses).argmin())}")
    return losses, np.diff(ends).tolist()


@torch.no_grad()
def predict_first(model, rows, pad_id, device, dtype, token_budget: int = 16384) -> np.ndarray:
    """P(the answer shown first wins) of each row, sorted by length and padded, as the recipe's notebook
    did."""
    model.eval()
    p = np.full(len(rows), np.nan)
    for chosen in micro_batches([len(row) for row in rows], token_budget):
        input_ids, mask = collate([rows[i] for i in chosen], pad_id, device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            logits = model(input_ids=input_ids, attention_mask=mask).logits
        p[chosen] = logits.double().softmax(dim=-1)[:, 0].cpu().numpy()
    return p
