"""The blocks of the Triton kernels: every kernel is compiled for every card, and fits its shared memory.

    blocks_of(device)      the row of BLOCKS for a GPU, None where none fits

No GPU is needed: Triton is given a driver that names the card and starts nothing, so the product's own
launches run up to the start of each kernel. Triton itself refuses a kernel that needs more than the card has,
as on the card. Compared with: NVIDIA's limits of shared memory a thread block (CUDA C++ Programming Guide,
compute capabilities). Skipped where Triton is not installed; what the kernels compute is in test_gpu.py.
"""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minarena.fast import path
from minarena.fast.blocks import BLOCKS, blocks_of
from minarena.fast.softcap_tiles import TILE, tiles_of

# compute capability and KiB of shared memory that a program may have
CARDS = {
    "A100": (80, 163),
    "RTX 30, A10": (86, 99),
    "RTX 40, L4": (89, 99),
    "H100, H200": (90, 227),
    "H100 with the small blocks": (90, 99),
    "B200": (100, 227),
    "RTX 50": (120, 99),
}


def test_each_card_has_blocks_that_fit_and_a_smaller_one_none(monkeypatch):
    large, small = BLOCKS[227], BLOCKS[99]
    cards = [(9, 227, large), (9, 228, large), (9, 226, small), (10, 227, small), (8, 163, small)]
    for major, memory, wanted in [*cards, (8, 99, small), (12, 99, small), (8, 98, None), (7, 64, None)]:
        found = SimpleNamespace(major=major, shared_memory_per_block_optin=memory * 1024)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=found: found)
        assert blocks_of(torch.device("cuda")) is wanted, (major, memory)


@pytest.mark.parametrize("row", BLOCKS.values(), ids=BLOCKS)
def test_the_blocks_of_attention_nest(row):
    """Otherwise the kernel of dK and dV reads memory that was never written."""
    assert row.keys[1] <= row.keys[0] <= row.queries[0] <= TILE


@pytest.fixture(params=CARDS)
def limit(request, monkeypatch) -> int:
    """KiB that a kernel may have; kernels are compiled for this card, checked against it, and not started."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from minarena.fast import int8_kernels

    capability, limit = CARDS[request.param]
    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": limit * 1024},
        load_binary=lambda *_: (object(), None, 0, 0, 1024),
    )
    driver = SimpleNamespace(
        get_current_device=lambda: request.param,  # Triton keeps what it compiled by device
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        launcher_cls=lambda source, metadata: lambda *arguments: None,
        utils=utils,
    )
    # of Triton's one object, which has no public name for "none, as before"
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    found = SimpleNamespace(major=capability // 10, minor=capability % 10, multi_processor_count=4)
    found.shared_memory_per_block_optin = limit * 1024
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    int8_kernels.card.cache_clear()
    yield limit
    int8_kernels.card.cache_clear()


@pytest.fixture
def launched(limit, monkeypatch) -> dict[str, float]:
    """file.kernel of all that is launched -> KiB of shared memory; filled as the test goes on."""
    from triton import JITFunction

    found, real = {}, JITFunction.run

    def watch(function, *arguments, **keywords):
        kernel = real(function, *arguments, **keywords)
        name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        found[name] = max(kernel.metadata.shared / 1024, found.get(name, 0))
        return kernel

    monkeypatch.setattr(JITFunction, "run", watch)
    return found


@pytest.mark.parametrize("D, window", [(256, None), (256, 300), (128, None), (16, 300)])
def test_every_attention_kernel_fits_every_card(D, window, limit, launched):
    from minarena.fast.softcap_kernels import CappedAttention

    q, k, v = (torch.zeros(256, *heads, D, dtype=torch.bfloat16) for heads in ((2, 2), (2,), (2,)))
    tiles = tiles_of([200, 56])
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = CappedAttention.apply(*inputs, tiles.table, tiles.pairs, D**-0.5, 50.0, window)
    out.backward(torch.zeros_like(out))
    print(launched)
    assert set(launched) == kernels_of("softcap_kernels")
    assert max(launched.values()) <= limit


@pytest.mark.parametrize("S, widths", [(96, [256, 256]), (32, [64, 32, 32]), (0, [512])])
def test_every_int8_kernel_fits_every_card(S, widths, limit, launched, monkeypatch):
    """An H100 has a kernel of its own for widths that are multiples of 256."""
    from minarena.fast import hopper_kernels, int8_kernels

    monkeypatch.setattr(hopper_kernels, "compiled", {})
    N, K, out = 64, 256, sum(widths)
    q, W = torch.zeros(N, K, dtype=torch.int8), torch.zeros(out, K, dtype=torch.int8)
    scale, W_scale = torch.ones(N), torch.ones(out)
    side_x, side_W = (torch.zeros(n, s, dtype=torch.bfloat16) for n, s in ((N, len(widths) * S), (out, S)))
    y = torch.zeros(N, out, dtype=torch.bfloat16)
    sides = (side_x, side_W) if S else (None, None)
    int8_kernels.launch_(y, q, scale, W, W_scale if S else None, *sides, widths)
    int8_kernels.transpose(W)
    print(launched)
    own = torch.cuda.get_device_properties(None).major == 9 and limit == 227 and widths[0] % 256 == 0
    product = kernels_of("hopper_kernels") if own else {"int8_kernels.product_kernel"}
    assert set(launched) == product | {"int8_kernels.transpose_kernel"}
    assert kernels_of("int8_kernels") == {"int8_kernels.product_kernel", "int8_kernels.transpose_kernel"}
    assert max(launched.values()) <= limit


def kernels_of(name: str) -> set[str]:
    """file.kernel of each function of fast/`name`.py that is launched: no kernel may be forgotten above."""
    text = Path(path.__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return {f"{name}.{kernel}" for kernel in re.findall(r"\.jit.*\ndef (\w+_kernel)\(", text)}
