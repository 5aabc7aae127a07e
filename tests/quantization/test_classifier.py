"""A run with a linear head as one folder of a sequence classifier: quantize.py --adapter RUN [--float].

transformers loads the folder and its tokenizer, and gets the template's text alone, in padded batches of
unlike lengths: it must give infer.py's probabilities. So that --float can be compared to rounding, the base's
projections are numbers that int8 holds exactly: infer.py quantizes the base, and that changes nothing.
"""

import json
from pathlib import Path

import pandas as pd
import peft
import pytest
import torch
import transformers
from bases import PIPELINES, TEXTS, random_base, write_base, write_tokenizer_folder
from helpers import adapted, rows_of_all_lengths, write_pairs
from safetensors.torch import load_file, save_file
from test_merge import write_adapter
from test_quantize_faults import refused
from tokenizers import Tokenizer

import infer
import quantize
from minarena.files.adapter import save_adapter
from minarena.files.tokenizer import load_tokenizer
from minarena.int8 import dequantize
from minarena.int8 import quantize as to_int8
from minarena.lora import is_projection
from minarena.model import AdapterConfig, make_head
from minarena.text import TEMPLATE

LIMIT = 150  # tokens of a row, one a byte: some rows are longer, and are cut
FIRST = {"ab": "shown first (response_a)", "ba": "shown first (response_b)", "both": "shown first"}


def exact_base(family: str, folder, dtype=torch.float32, **changes) -> str:
    """A base whose projections are not changed by int8."""
    path = Path(write_base(family, folder, dtype, **changes)) / "model.safetensors"
    tensors = load_file(path)
    for name, W in tensors.items():
        if is_projection(name):
            tensors[name] = dequantize(*to_int8(W), torch.float32).to(dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    return str(folder)


def write_run(base: str, folder, order: str = "ab", head: str = "linear", **record) -> str:
    """A run as train.py leaves it, whose adapter tells rows apart."""
    model, config = adapted(base, AdapterConfig(r=6, alpha=9.0, head=head))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.score.parameters():
        parameter.data.normal_(0, 0.1, generator=generator)
    save_adapter(folder, model, config, base)
    record = {"model": base, "order": order, "max_length": LIMIT, "truncation": "left", **record}
    (Path(folder) / "train_config.json").write_text(json.dumps(record), encoding="utf-8")
    return str(folder)


def by_infer(run: str, table: pd.DataFrame, tmp_path) -> torch.Tensor:
    """P(the answer that is shown first wins), (rows,), by infer.py."""
    data, probs = write_pairs(tmp_path / "rows.parquet", table), tmp_path / "probs.parquet"
    out = ["--out", str(tmp_path / "submission.csv"), "--probs", str(probs)]
    infer.main(["--adapter", run, "--data", data, *out])
    p_a = torch.tensor(pd.read_parquet(probs)["winner_model_a"].to_numpy())
    return 1 - p_a if json.loads((Path(run) / "train_config.json").read_text())["order"] == "ba" else p_a


def texts_of(table: pd.DataFrame, order: str) -> list[str]:
    names = ["response_b", "response_a"] if order == "ba" else ["response_a", "response_b"]
    return [TEMPLATE.format(row["prompt"], *row[names]) for _, row in table.iterrows()]


def judged(folder, texts: list[str], side: str = "right") -> torch.Tensor:
    """P(label 0), (rows,), by transformers alone, in padded batches of five."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side=side)
    found = []
    with torch.no_grad():
        for i in range(0, len(texts), 5):
            batch = tokenizer(texts[i : i + 5], padding=True, truncation=True, return_tensors="pt")
            assert batch["input_ids"].shape[1] <= LIMIT
            found.append(model.eval()(**batch).logits.double().softmax(-1)[:, 0])
    return torch.cat(found)


def made(base: str, run: str, out, *more: str) -> dict:
    return quantize.main(["--model", base, "--adapter", run, "--out", str(out), *more])


@pytest.fixture(params=["gemma2", "llama", "qwen2", "nopad", "mistral", "gemma3"])
def family(request) -> str:
    return request.param


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_the_float_folder_gives_the_probabilities_of_infer(family, order, tmp_path):
    base = exact_base(family, tmp_path / "base")
    run = write_run(base, tmp_path / "run", order)
    table = rows_of_all_lengths()
    table.loc[3, "response_a"] = "An <eos> and a <pad> and <bos> in a text are text. "
    expected = by_infer(run, table, tmp_path)
    made(base, run, tmp_path / "judge", "--float")
    texts = texts_of(table, order)
    assert expected.std() > 0.02  # the adapter tells rows apart
    assert max(map(len, texts)) > LIMIT  # some are cut
    for side in ("right", "left"):
        torch.testing.assert_close(judged(tmp_path / "judge", texts, side), expected, rtol=0, atol=1e-4)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "judge")
    assert config.pad_token_id not in (None, config.eos_token_id) and config.num_labels == 2
    assert config.id2label[0] == FIRST[order] and config.label2id[config.id2label[1]] == 1
    assert config.architectures[0].endswith("ForSequenceClassification")
    assert getattr(config, "quantization_config", None) is None
    assert load_file(tmp_path / "judge" / "model.safetensors")["score.weight"].shape[0] == 2


@pytest.mark.parametrize("order", ["ab", "ba", "both"])
def test_the_pipeline_gives_the_probabilities_of_infer_in_batches(order, tmp_path):
    base = exact_base("qwen2", tmp_path / "base")  # its pad is EOS
    run = write_run(base, tmp_path / "run", order)
    table = rows_of_all_lengths()
    expected = by_infer(run, table, tmp_path)
    made(base, run, tmp_path / "judge", "--float")
    judge = transformers.pipeline("text-classification", str(tmp_path / "judge"), device="cpu")

    def p_first(order_shown: str) -> torch.Tensor:
        found = judge(texts_of(table, order_shown), batch_size=4, truncation=True, top_k=None)
        scores = [{row["label"]: row["score"] for row in rows} for rows in found]
        return torch.tensor([row[FIRST[order]] for row in scores]).double()

    p = (p_first("ab") + 1 - p_first("ba")) / 2 if order == "both" else p_first(order)
    torch.testing.assert_close(p, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_8bit_folder_is_the_merged_weights_in_int8(kind, tmp_path):
    """Its weights as floats give infer.py's probabilities up to the change by int8; so does transformers'
    int8 product, which rounds the activations as well."""
    base = exact_base(kind, tmp_path / "base")
    run = write_run(base, tmp_path / "run", "ba")
    table = rows_of_all_lengths()
    expected, texts = by_infer(run, table, tmp_path), texts_of(table, "ba")
    result = made(base, run, tmp_path / "judge")
    made(base, run, tmp_path / "float", "--float")
    assert result["head"] == "adapter" and result["merged"] == 14
    stored, floats = (load_file(tmp_path / name / "model.safetensors") for name in ("judge", "float"))
    for name, W in floats.items():
        found = stored[name]
        if is_projection(name):
            CB, SCB = to_int8(W)
            torch.testing.assert_close(found, CB, rtol=0, atol=0)
            floats[name] = dequantize(CB, SCB, torch.float32)
        else:
            assert torch.equal(found, W), name
    p_int8 = judged(tmp_path / "judge", texts)
    save_file(floats, tmp_path / "float" / "model.safetensors", metadata={"format": "pt"})
    rounded = judged(tmp_path / "float", texts)
    changes = [(p - expected).abs().max().item() for p in (rounded, p_int8)]
    print("int8 weights, LLM.int8:", changes)
    assert 1e-6 < changes[0] < 0.05 and changes[1] < 0.1


def test_a_bf16_base_gives_a_bf16_folder(tmp_path):
    base = exact_base("gemma2", tmp_path / "base", torch.bfloat16)
    run = write_run(base, tmp_path / "run")
    made(base, run, tmp_path / "judge", "--float")
    stored = load_file(tmp_path / "judge" / "model.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if name != "score.weight"} == {torch.bfloat16}
    table = rows_of_all_lengths()
    difference = (judged(tmp_path / "judge", texts_of(table, "ab")) - by_infer(run, table, tmp_path)).abs()
    print(f"bf16: {difference.max():.4f}")
    assert difference.max() < 0.05


def test_a_judge_is_still_a_base_to_train_on_with_the_same_ids(tmp_path):
    base = write_base("llama", tmp_path / "base")
    run = write_run(base, tmp_path / "run")
    made(base, run, tmp_path / "judge")
    tokenizers = [load_tokenizer(str(tmp_path / name)) for name in ("base", "judge")]
    text = TEMPLATE.format("a <eos>", "b", "é")
    ids = [tokenizer(text, add_special_tokens=False, split_special_tokens=True) for tokenizer in tokenizers]
    assert ids[0]["input_ids"] == ids[1]["input_ids"]
    assert tokenizers[1].pad_token_id != tokenizers[1].eos_token_id == tokenizers[0].pad_token_id


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("kind, class_name", [("gemma2", "GemmaTokenizer"), ("llama", "LlamaTokenizerFast")])
def test_a_tokenizer_with_its_own_pipeline_gives_the_ids_of_the_run(kind, class_name, pipeline, tmp_path):
    """By AutoTokenizer, whatever class the base named; and by the file alone, as servers read it."""
    base = write_base(kind, tmp_path / "base", vocab_size=400)
    more = {"add_bos_token": True, "add_eos_token": False}
    write_tokenizer_folder(Path(base), pipeline, class_name, kind, **more)
    run = write_run(base, tmp_path / "run")
    made(base, run, tmp_path / "judge", "--float")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "judge")
    alone = Tokenizer.from_file(str(tmp_path / "judge" / "tokenizer.json"))
    for text in [TEMPLATE.format(*TEXTS[:3]), TEMPLATE.format(*TEXTS[2:])]:
        ids = [2, *load_tokenizer(base)(text, add_special_tokens=False)["input_ids"], 1]
        assert tokenizer(text)["input_ids"] == alone.encode(text).ids == ids
    assert tokenizer.pad_token_id not in (None, 1)


def test_a_base_whose_bos_is_its_eos_gets_both_and_no_warning(tmp_path, capsys):
    """As GPT-2's: every row begins and ends with the same token."""
    base = write_base("llama", tmp_path / "base", vocab_size=400)
    path = Path(base) / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"bos_token": "<eos>"}
    path.write_text(json.dumps(settings), encoding="utf-8")
    run = write_run(base, tmp_path / "run")
    made(base, run, tmp_path / "judge", "--float")
    text, tokenizer = TEMPLATE.format(*TEXTS[:3]), load_tokenizer(base)
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 1
    ids = [1, *tokenizer(text, add_special_tokens=False)["input_ids"], 1]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "judge")(text)["input_ids"] == ids
    assert "gives a text other ids" not in capsys.readouterr().err


def test_ids_that_transformers_makes_otherwise_are_said(tmp_path, capsys):
    """It builds the pipeline of any qwen2 anew (DeepSeek-R1-Distill-Qwen's)."""
    base = write_base("qwen2", tmp_path / "base", vocab_size=400)
    write_tokenizer_folder(Path(base), "digits by three", "LlamaTokenizerFast", "qwen2")
    made(base, write_run(base, tmp_path / "run"), tmp_path / "judge", "--float")
    said = "AutoTokenizer gives a text other ids" in capsys.readouterr().err
    text, right = TEMPLATE.format(*TEXTS[:3]), load_tokenizer(str(tmp_path / "judge"))
    by_auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "judge")(text)["input_ids"]
    assert said == (by_auto != right(text)["input_ids"])
    assert said


def test_the_card_says_order_length_figures_and_license(tmp_path):
    base = write_base("gemma2", tmp_path / "base")
    (Path(base) / "README.md").write_text("---\nlicense: gemma\ntags: [x]\n---\n# Gemma", encoding="utf-8")
    run = write_run(base, tmp_path / "run", "ba", max_length=77)
    figures = {"accuracy": 0.75, "accuracy_se": 0.01, "log_loss": 0.5, "log_loss_se": None}
    event = {"event": "eval", "step": 3, "ab": figures, "ba": figures, "mean": figures}
    (Path(run) / "log.jsonl").write_text(json.dumps(event) + "\n", encoding="utf-8")
    made(base, run, tmp_path / "judge", "--float")
    card = (tmp_path / "judge" / "README.md").read_text(encoding="utf-8")
    for words in (
        "\nlicense: gemma\n",
        "License of the base:** gemma",
        "Label 0:** `shown first (response_b)`",
        "at most 77 tokens",
        "| mean | 0.7500 ± 0.0100 | 0.5000 |",
        repr(TEMPLATE),
    ):
        assert words in card, words
    (Path(base) / "README.md").unlink()
    (Path(run) / "log.jsonl").unlink()
    made(base, run, tmp_path / "other", "--float")
    card = (tmp_path / "other" / "README.md").read_text(encoding="utf-8")
    assert (
        "License of the base:** not stated" in card
        and "| not recorded" in card
        and "\nlicense: unknown\n" in card
    )


def test_what_makes_no_judge_is_refused_with_float_in_one_line(tmp_path, capsys):
    base = write_base("llama", tmp_path / "base")
    mlp = write_run(base, tmp_path / "mlp", head="mlp")
    message = refused(base, tmp_path / "out", "--adapter", mlp, "--float")
    assert "an mlp head has no place" in message and "--head linear" in message and "make_head" in message
    linear = write_run(base, tmp_path / "linear")
    message = refused(base, tmp_path / "out", "--adapter", str(tmp_path / "no"), "--float")
    assert message == f"--adapter {tmp_path / 'no'}: no adapter_config.json there"  # infer.py's words
    write_adapter(random_base("llama"), tmp_path / "headless", task_type="CAUSAL_LM")
    message = refused(base, tmp_path / "out", "--adapter", str(tmp_path / "headless"), "--float")
    assert "no linear head (score.weight)" in message
    assert "of two rows" in refused(base, tmp_path / "out", "--adapter", linear, "--float", "--labels", "3")
    made(base, linear, tmp_path / "judge")
    message = refused(tmp_path / "judge", tmp_path / "out", "--adapter", linear, "--float")
    assert message.startswith("--float: --model") and "8-bit" in message
    (Path(linear) / "train_config.json").unlink()
    assert "not a run of train.py" in refused(base, tmp_path / "out", "--adapter", linear, "--float")
    with pytest.raises(SystemExit):
        quantize.main(["--model", base, "--out", str(tmp_path / "out"), "--float"])
    assert "--float" in capsys.readouterr().err


def test_an_mlp_run_is_still_merged_into_a_base_and_a_line_says_so(tmp_path, capsys):
    """The recipe's first stage; what is written is what it was, a new linear head and no card."""
    base = write_base("llama", tmp_path / "base")
    mlp = write_run(base, tmp_path / "mlp", head="mlp")
    result = made(base, mlp, tmp_path / "out")
    assert result["head"] == "new" and result["merged"] == 14
    said = capsys.readouterr().err
    assert "an mlp head has no place" in said and "a base to train on, not a judge" in said
    assert not (tmp_path / "out" / "README.md").exists()


def test_another_base_than_the_runs_is_said(tmp_path, capsys):
    base = write_base("llama", tmp_path / "base")
    recorded = {"config": "0", "weights": "1", "tokenizer": "2"}
    run = write_run(base, tmp_path / "run")
    path = Path(run) / "train_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"base": recorded}))
    made(base, run, tmp_path / "judge")
    assert "its base had other" in capsys.readouterr().err


def test_a_base_without_a_token_that_could_pad_is_refused(tmp_path):
    base = write_base("llama", tmp_path / "base")
    run = write_run(base, tmp_path / "run")
    path = Path(base) / "tokenizer.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    whole["added_tokens"] = [token for token in whole["added_tokens"] if token["content"] == "<eos>"]
    path.write_text(json.dumps(whole), encoding="utf-8")
    path = Path(base) / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: value for name, value in settings.items() if value not in ("<bos>", "<unk>", "<pad>")}
    path.write_text(json.dumps(kept), encoding="utf-8")
    assert "no special token beside EOS" in refused(base, tmp_path / "out", "--adapter", run)


def test_the_way_out_by_peft_gives_the_probabilities_of_an_mlp_run(tmp_path):
    base = exact_base("llama", tmp_path / "base")
    run = write_run(base, tmp_path / "run", head="mlp")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model.score = make_head("mlp", model.config.hidden_size, 0.0)
    model = peft.PeftModel.from_pretrained(model, run).eval()
    table = rows_of_all_lengths(6)
    tokenizer = load_tokenizer(base)
    found = []
    with torch.no_grad():
        for text in texts_of(table, "ab"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"][2 - LIMIT :]
            ids = torch.tensor([[2, *ids, 1]])
            hidden = model.base_model.model.model(ids).last_hidden_state[:, -1]
            found.append(model.base_model.model.score(hidden).double().softmax(-1)[0, 0])
    torch.testing.assert_close(torch.stack(found), by_infer(run, table, tmp_path), rtol=0, atol=1e-4)
