"""The int8 product of int8_product.py as a Triton kernel, and the transposed copy of int8 weights.

    Y = (q W^T) * scale * W_scale + side_x side_W^T       q, W int8; side_x, side_W bf16; Y bf16

A program owns tiles of Y one after the other (as many programs as the GPU holds at a time), sums a tile's
int8 products in int32 registers, scales them in fp32, adds the bf16 product to them there and writes the tile
once. Two programs share a multiprocessor where its memory allows: one multiplies while the other is in its
epilogue, which is worth 15 % on an H100. Tiles are read by descriptors, Hopper's bulk copies; on older GPUs
Triton turns them into ordinary loads. hopper_kernels.py has a faster one for the H100. Tiles depend on the
GPU's shared memory (blocks.py); their speed was measured on an H100 alone.
"""

import functools
from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from minarena.fast.blocks import BLOCKS, Blocks, blocks_of
from minarena.runtime.console import say

SIDE = 32  # columns of a step of the bf16 product
GROUP = 8  # rows of tiles that take turns at the same weights


def launch_(
    y: Tensor,
    q: Tensor,
    scale: Tensor,
    W: Tensor,
    W_scale: Tensor | None,
    side_x: Tensor | None,
    side_W: Tensor | None,
    widths: list[int],
) -> None:
    """Write y (N, out) bf16, in place: Y of int8_product.py; without W_scale and the side: (q W^T) * scale.

    q (N, in) int8, scale (N,) fp32, W (out, in) int8, W_scale (out,) fp32; side_x (N, S), or one such block
    for each of `widths`, side by side, and side_W (out, S), both bf16. Row strides must be multiples of 16
    bytes: `in` of 16, out and side columns of 8.
    """
    blocks, processors, hopper = card(q.device)
    rows, columns, depth, warps, stages, per = blocks.int8
    S = 0 if side_W is None else side_W.size(1)
    bounds = [W.size(0)] * 2  # where the second and the third block of side_x begin to count
    if S and side_x.size(1) > S:
        bounds[: len(widths) - 1] = [sum(widths[:i]) for i in range(1, len(widths))]
    tensors, sizes = [q, W, side_x, side_W, y], [*y.shape, q.size(1), *bounds]
    if not S:
        tensors[2:4] = None, None
    if hopper and all(width % hopper.COLUMNS == 0 for width in widths):
        hopper.launch_hopper_(tensors, scale, W_scale, sizes, S, processors)
        return
    while any(bound % columns for bound in bounds if bound < W.size(0)):
        columns //= 2  # a tile has one block
    shapes = [rows, depth], [columns, depth], [rows, SIDE], [columns, SIDE], [rows, columns // 2]
    described = [
        tensor if tensor is None else TensorDescriptor.from_tensor(tensor, shape)
        for tensor, shape in zip(tensors, shapes, strict=True)
    ]
    programs = processors * per
    settings = S, programs, rows, columns, depth, SIDE, GROUP
    product_kernel[(programs,)](
        *described, scale, W_scale, *sizes, *settings, num_warps=warps, num_stages=stages
    )


@functools.cache
def card(device: torch.device) -> tuple[Blocks, int, ModuleType | None]:
    """(what fits this GPU, its multiprocessors, hopper_kernels or None)"""
    properties, blocks, hopper = torch.cuda.get_device_properties(device), blocks_of(device), None
    if (properties.major, properties.minor) == (9, 0) and blocks is BLOCKS[227]:
        try:
            from minarena.fast import hopper_kernels as hopper
        except ImportError:
            say("int8 product: not the Gluon that hopper_kernels.py knows: the slower kernel runs")
    return blocks, properties.multi_processor_count, hopper


def transpose(W: Tensor) -> Tensor:
    """A contiguous W^T (in, out) of W (out, in) int8, at 2.6 TB/s on an H100; W.T.contiguous() has .27."""
    out = W.new_empty(W.size(1), W.size(0))
    grid = (triton.cdiv(W.size(0), 128), triton.cdiv(W.size(1), 128))
    transpose_kernel[grid](W, out, *W.shape, W.stride(0), 128, num_warps=4)
    return out


@triton.jit
def place_of(tile, rows, columns, GROUP: tl.constexpr):
    """(row, column) of a tile: down GROUP rows of tiles first, so that neighbours share q and W in the L2."""
    group = tile // (GROUP * columns)
    height = tl.minimum(rows - group * GROUP, GROUP)
    inside = tile - group * GROUP * columns
    return group * GROUP + inside % height, inside // height


@triton.jit
def product_kernel(q, W, side_x, side_W, y, scale, W_scale, N, OUT, IN, second, third,
                   S: tl.constexpr, PROGRAMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                   DEPTH: tl.constexpr, SIDE: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """second, third: the first columns of Y that count the second and the third block of side_x."""
    tile_rows, tile_columns = tl.cdiv(N, ROWS), tl.cdiv(OUT, COLUMNS)
    for tile in tl.range(tl.program_id(0), tile_rows * tile_columns, PROGRAMS):
        m, n = place_of(tile, tile_rows, tile_columns, GROUP)
        m, n = m * ROWS, n * COLUMNS
        total = tl.zeros((ROWS, COLUMNS), tl.int32)
        for k in range(0, IN, DEPTH):  # a descriptor gives zeros beyond a tensor's end
            total = tl.dot(q.load([m, k]), W.load([n, k]).T, total, out_dtype=tl.int32)
        row, column = m + tl.arange(0, ROWS), n + tl.arange(0, COLUMNS)
        result = total.to(tl.float32) * tl.load(scale + row, mask=row < N, other=0.0)[:, None]
        if W_scale is not None:
            result *= tl.load(W_scale + column, mask=column < OUT, other=0.0)[None]
        block = (n >= second).to(tl.int32) + (n >= third).to(tl.int32)
        for s in tl.static_range(0, S, SIDE):
            result = tl.dot(side_x.load([m, block * S + s]), side_W.load([n, s]).T, result)
        halves = tl.permute(tl.reshape(result, (ROWS, 2, COLUMNS // 2)), (0, 2, 1))
        left, right = tl.split(halves)  # written apart: half the shared memory
        y.store([m, n], left.to(y.dtype))
        y.store([m, n + COLUMNS // 2], right.to(y.dtype))


@triton.jit
def transpose_kernel(W, out, OUT, IN, stride, TILE: tl.constexpr):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE).to(tl.int64)
    inside = (row < OUT)[:, None] & (column < IN)[None]
    tile = tl.load(W + row[:, None] * stride + column[None], mask=inside, other=0)
    tl.store(out + column[:, None] * OUT + row[None], tl.trans(tile), mask=tl.trans(inside))
