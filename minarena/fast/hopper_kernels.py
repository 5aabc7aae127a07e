"""The int8 product of int8_kernels.py for the H100's own instructions, in Gluon, Triton's lower level.

One warp does nothing but fetch: it fills a ring of STAGES slots with tiles of q and W, and goes on to the
next tile of Y while the two warpgroups that multiply are still in the epilogue of the last one. The tiles of
the bf16 product come through the same ring: 64 columns of bf16 are as many bytes as 128 of int8. A slot has
two barriers: `full` once its bytes have come, `empty` once they have been multiplied. Triton's compiler does
not do this: there the warps that multiply also fetch, and stop fetching in an epilogue (1,080 to 1,110 TOPS;
here 1,200 to 1,500, benchmarks/README.md).

What it does not do: other GPUs, tiles of other sizes. The int8 instruction is 128 columns wide in Triton 3.6,
so a warpgroup takes two a step. Compiled with Triton 3.6, 3.7 and 3.8.
"""

from torch import Tensor
from triton.compiler import CompiledKernel
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

ROWS, COLUMNS, DEPTH, SIDE, STAGES, GROUP = 128, 256, 128, 64, 4, 8
# a tile of q and of side_x, of W and of side_W, and half a tile of Y
SHAPES = [[ROWS, DEPTH], [COLUMNS, DEPTH], [ROWS, SIDE], [COLUMNS, SIDE], [ROWS, COLUMNS // 2]]
TYPES = [gl.int8, gl.int8, gl.bfloat16, gl.bfloat16, gl.bfloat16]
LAYOUTS = [gl.NVMMASharedLayout.get_default_for(*both) for both in zip(SHAPES, TYPES, strict=True)]
compiled: dict[tuple, CompiledKernel] = {}


def launch_hopper_(
    tensors: list[Tensor | None],
    scale: Tensor,
    W_scale: Tensor | None,
    sizes: list[int],
    S: int,
    processors: int,
) -> None:
    """Write Y. tensors: q, W, side_x, side_W, Y, those of the side None where S, a block's columns, is 0.

    sizes: N, out, in, and the first columns of Y with the second and third block, multiples of COLUMNS. 462
    calls a micro-batch of the 9B must not cost the host more than the GPU: so layouts are made once, and
    Triton looks up the compiled kernel once (its look-up alone takes longer than the launch).
    """
    described = [
        tensor if tensor is None else TensorDescriptor.from_tensor(tensor, shape, layout)
        for tensor, shape, layout in zip(tensors, SHAPES, LAYOUTS, strict=True)
    ]
    settings = S, processors, ROWS, COLUMNS, DEPTH, SIDE, STAGES, GROUP
    arguments = *described, scale, W_scale, *sizes, *settings
    key = scale.device, S, W_scale is None
    if key in compiled:
        compiled[key][processors, 1, 1](*arguments)
    else:
        compiled[key] = product_kernel[(processors,)](*arguments, num_warps=8)


@gluon.jit
def place_of(tile, rows, columns, GROUP: gl.constexpr):
    """int8_kernels.place_of"""
    group = tile // (GROUP * columns)
    height = gl.minimum(rows - group * GROUP, GROUP)
    inside = tile - group * GROUP * columns
    return group * GROUP + inside % height, inside // height


@gluon.jit
def fetch(q, W, side_x, side_W, qs, Ws, full, empty, N, OUT, IN, second, third,
          S: gl.constexpr, PROGRAMS: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
          DEPTH: gl.constexpr, SIDE: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr):  # fmt: skip
    """The warp that fetches. A slot's n-th filling waits until its (n - 1)-th was multiplied."""
    tile_rows, tile_columns = gl.cdiv(N, ROWS), gl.cdiv(OUT, COLUMNS)
    filled = 0
    for tile in range(gl.program_id(0), tile_rows * tile_columns, PROGRAMS):
        m, n = place_of(tile, tile_rows, tile_columns, GROUP)
        m *= ROWS
        n *= COLUMNS
        for k in range(0, IN, DEPTH):
            slot = filled % STAGES
            mbarrier.wait(empty.index(slot), ((filled // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(slot), (ROWS + COLUMNS) * DEPTH)
            tma.async_copy_global_to_shared(q, [m, k], full.index(slot), qs.index(slot))
            tma.async_copy_global_to_shared(W, [n, k], full.index(slot), Ws.index(slot))
            filled += 1
        block = (n >= second).to(gl.int32) + (n >= third).to(gl.int32)
        for s in gl.static_range(0, S, SIDE):
            slot = filled % STAGES
            mbarrier.wait(empty.index(slot), ((filled // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(slot), (ROWS + COLUMNS) * SIDE * 2)
            x_slot = qs.index(slot)._reinterpret(gl.bfloat16, [ROWS, SIDE], side_x.layout)
            W_slot = Ws.index(slot)._reinterpret(gl.bfloat16, [COLUMNS, SIDE], side_W.layout)
            tma.async_copy_global_to_shared(side_x, [m, block * S + s], full.index(slot), x_slot)
            tma.async_copy_global_to_shared(side_W, [n, s], full.index(slot), W_slot)
            filled += 1


@gluon.jit
def multiply(side_x, side_W, y, scale, W_scale, qs, Ws, ys, full, empty, N, OUT, IN,
             S: gl.constexpr, PROGRAMS: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
             DEPTH: gl.constexpr, SIDE: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr):  # fmt: skip
    """The two warpgroups that multiply: 64 rows of a tile each."""
    integers: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 128, 32])
    floats: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 128, 16])
    tile_rows, tile_columns = gl.cdiv(N, ROWS), gl.cdiv(OUT, COLUMNS)
    used = 0
    for tile in range(gl.program_id(0), tile_rows * tile_columns, PROGRAMS):
        m, n = place_of(tile, tile_rows, tile_columns, GROUP)
        m *= ROWS
        n *= COLUMNS
        total = warpgroup_mma_init(gl.zeros((ROWS, COLUMNS), gl.int32, integers))
        for k in range(0, IN, DEPTH):
            slot = used % STAGES
            mbarrier.wait(full.index(slot), (used // STAGES) & 1)
            W_slot = Ws.index(slot).permute((1, 0))
            total = warpgroup_mma(qs.index(slot), W_slot, total, is_async=True)
            total = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(total,)))  # the step before is done
            mbarrier.arrive(empty.index((used + STAGES - 1) % STAGES), pred=k > 0)
            used += 1
        total = warpgroup_mma_wait(0, deps=(total,))
        mbarrier.arrive(empty.index((used + STAGES - 1) % STAGES))
        row = m + gl.arange(0, ROWS, gl.SliceLayout(1, integers))
        column = n + gl.arange(0, COLUMNS, gl.SliceLayout(0, integers))
        result = total.to(gl.float32) * gl.expand_dims(gl.load(scale + row, mask=row < N, other=0.0), 1)
        if W_scale is not None:
            result *= gl.expand_dims(gl.load(W_scale + column, mask=column < OUT, other=0.0), 0)
        result = gl.convert_layout(result, floats, assert_trivial=True)
        for _ in gl.static_range(0, S, SIDE):
            slot = used % STAGES
            mbarrier.wait(full.index(slot), (used // STAGES) & 1)
            x_slot = qs.index(slot)._reinterpret(gl.bfloat16, [ROWS, SIDE], side_x.layout)
            W_slot = Ws.index(slot)._reinterpret(gl.bfloat16, [COLUMNS, SIDE], side_W.layout)
            token = warpgroup_mma(x_slot, W_slot.permute((1, 0)), result, is_async=True)
            result = warpgroup_mma_wait(0, deps=(token,))
            mbarrier.arrive(empty.index(slot))
            used += 1
        left, right = gl.split(gl.permute(gl.reshape(result, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
        put(y, ys, left, m, n)
        put(y, ys, right, m, n + COLUMNS // 2)
    tma.store_wait(0)


@gluon.jit
def put(y, ys, value, m, n):
    """Half a tile through shared memory into y; the copy goes on while the warps do."""
    tma.store_wait(0)  # the half before has been read
    ys.store(value.to(gl.bfloat16))
    fence_async_shared()
    tma.async_copy_shared_to_global(y, [m, n], ys)


@gluon.jit(do_not_specialize=["scale", "W_scale", "N", "OUT", "IN", "second", "third"])
def product_kernel(q, W, side_x, side_W, y, scale, W_scale, N, OUT, IN, second, third,
                   S: gl.constexpr, PROGRAMS: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
                   DEPTH: gl.constexpr, SIDE: gl.constexpr, STAGES: gl.constexpr,
                   GROUP: gl.constexpr):  # fmt: skip
    qs = gl.allocate_shared_memory(gl.int8, [STAGES, ROWS, DEPTH], q.layout)
    Ws = gl.allocate_shared_memory(gl.int8, [STAGES, COLUMNS, DEPTH], W.layout)
    ys = gl.allocate_shared_memory(gl.bfloat16, [ROWS, COLUMNS // 2], y.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    # in one expression: a named tuple would make plain integers of the constants, which Triton 3.8 refuses
    gl.warp_specialize([
        (multiply, (side_x, side_W, y, scale, W_scale, qs, Ws, ys, full, empty, N, OUT, IN,
                    S, PROGRAMS, ROWS, COLUMNS, DEPTH, SIDE, STAGES, GROUP)),
        (fetch, (q, W, side_x, side_W, qs, Ws, full, empty, N, OUT, IN, second, third,
                 S, PROGRAMS, ROWS, COLUMNS, DEPTH, SIDE, STAGES, GROUP)),
    ], [1], [24])  # fmt: skip
