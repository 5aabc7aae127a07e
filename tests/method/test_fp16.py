"""Inference in fp16, for GPUs without bf16 (T4): the residual stream stays fp32, which Gemma-2 needs.

    default_dtype(device, training=False)      fp16 there, by itself
    infer.py --dtype fp16                      what these tests run, on a CPU

The base is a Gemma-2 whose residual stream passes fp16's largest number, 65,504, in one channel, while what a
layer adds to it at a time does not. Compared with: fp32, and fp16 all through, which overflows.
"""

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import CPU, adapted, predict, rows_of_all_lengths, write_pairs
from safetensors.torch import load_file, save_file

import infer
from minarena.files.adapter import save_adapter
from minarena.model import PreferenceModel, default_dtype, residual_dtype
from minarena.tiny import write_tiny

LARGEST = torch.finfo(torch.float16).max
CHANNEL = 7
ROWS = [np.append(np.random.default_rng(n).integers(4, 260, n - 1), 1) for n in (5, 23, 11, 60, 90, 40)]


def loud_base(folder, added: float) -> str:
    """Embeddings of 62,400 in one channel of the residual stream, to which each of two layers adds up to
    three times `added`. The other channels are small, and all that the layers look at."""
    write_tiny(str(folder))
    tensors = load_file(folder / "model.safetensors")
    for name, weight in tensors.items():
        if "embed_tokens" in name:
            weight[:, CHANNEL] = 62_400 / 8  # Gemma multiplies by the root of 64 channels
        elif "post_" in name:
            weight[CHANNEL] = added
        elif "norm" in name:  # multiplies by 1 + weight
            weight[:] = 2e3
            weight[CHANNEL] = -1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return loud_base(tmp_path_factory.mktemp("loud"), 8_000)


def predicted(base: str, dtype: torch.dtype, residual: torch.dtype) -> tuple[np.ndarray, float, float]:
    """(probabilities, largest number of the residual stream, largest that was added to it at a time)"""
    model, stream, added = adapted(base)[0], [], []
    model.residual_dtype = residual
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, out: stream.append(out.abs().max().item()))
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            norm.register_forward_hook(lambda _, __, out: added.append(out.abs().max().item()))
    return predict(model, ROWS, token_budget=512, pad_id=0, dtype=dtype), max(stream), max(added)


def test_fp16_with_the_residual_stream_in_fp32_predicts_what_fp32_does_and_all_in_fp16_overflows(base):
    exact, stream, added = predicted(base, torch.float32, torch.float32)
    assert added < LARGEST / 2 and stream > 1.3 * LARGEST
    assert np.ptp(exact) > 0.05  # the rows differ by more than the tolerance
    p, stream, _ = predicted(base, torch.float16, residual_dtype(CPU, torch.float16))
    assert stream > 1.3 * LARGEST
    np.testing.assert_allclose(p, exact, rtol=0, atol=2e-3)
    assert np.abs(p - exact).max() > 1e-6  # it was fp16
    with pytest.raises(FloatingPointError, match="logits that are not finite for 6 of 6 rows"):
        predicted(base, torch.float16, torch.float16)


@pytest.fixture
def words(tmp_path) -> list[str]:
    data = write_pairs(tmp_path / "rows.parquet", rows_of_all_lengths(8))
    return ["--adapter", str(tmp_path / "adapter"), "--data", data, "--out", str(tmp_path / "s.csv")]


def test_infer_in_fp16_agrees_with_fp32(base, words, tmp_path):
    model, config = adapted(base)
    save_adapter(tmp_path / "adapter", model, config, base)
    for dtype in ("fp16", "fp32"):
        probs = str(tmp_path / f"{dtype}.parquet")
        infer.main([*words, "--model", base, "--dtype", dtype, "--probs", probs])
    tables = [pd.read_parquet(tmp_path / f"{dtype}.parquet") for dtype in ("fp16", "fp32")]
    pd.testing.assert_frame_equal(*tables, rtol=0, atol=2e-3)


def test_infer_stops_with_the_ids_where_fp16_is_not_enough(words, tmp_path):
    """What one layer adds is beyond fp16 by itself, which an fp32 residual stream cannot cure."""
    base = loud_base(tmp_path / "base", 80_000)
    model, config = adapted(base)
    save_adapter(tmp_path / "adapter", model, config, base)
    first = rows_of_all_lengths(8)["id"].iloc[0]
    with pytest.raises(FloatingPointError, match=rf"not finite for 8 of 8 rows: \['{first}', "):
        infer.main([*words, "--model", base, "--dtype", "fp16"])
    assert not (tmp_path / "s.csv").exists()
    assert predicted(base, torch.float32, torch.float32)[2] > LARGEST


@pytest.mark.parametrize("bf16", [False, True])
def test_a_gpu_without_bf16_infers_in_fp16_by_itself_and_trains_in_fp32(bf16, monkeypatch):
    emulated = lambda including_emulation=True: bf16 or including_emulation  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", emulated)
    gpu = torch.device("cuda")
    assert default_dtype(gpu, training=False) == ("bf16" if bf16 else "fp16")
    assert default_dtype(gpu, training=True) == ("bf16" if bf16 else "fp32")
    assert residual_dtype(gpu, torch.float16) == torch.float32


def test_the_residual_dtype_is_the_embeddings_and_every_layers(base):
    seen = []
    model = adapted(base)[0]
    assert isinstance(model, PreferenceModel) and model.residual_dtype == torch.float32
    model.model.layers[1].register_forward_pre_hook(lambda _, x: seen.append(x[0].dtype))
    predict(model, ROWS, token_budget=512, pad_id=0, dtype=torch.float16)
    assert set(seen) == {torch.float32}
