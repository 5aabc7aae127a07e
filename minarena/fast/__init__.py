"""The same numbers, faster: what a GPU runs instead of the reference path.

    path.py               which bases and GPUs it serves; a decoder layer as two compiled regions
    packing.py            rows one after the other, without padding
    attention.py          causal attention over packed rows: the definition, and PyTorch's flash attention
    fused_linear.py       int8 weights and LoRA as one product
    int8_product.py       --matmul int8: int8 activations times int8 weights, LoRA in the same product
    int8_kernels.py       that product in Triton, for any GPU
    hopper_kernels.py     the same for an H100's own instructions
    softcap_kernels.py    soft-capped attention as three Triton kernels
    softcap_tiles.py      the blocks of rows that these kernels work on
    blocks.py             how much a kernel takes at a time, by the GPU's shared memory
    recompute.py          layers that are computed again in the backward, where memory is short
    cuda_graphs.py        micro-batches of a small base, recorded once and replayed

Every file here has a slower twin in the method that gives the same numbers up to rounding. Imports the method
and runtime, never files: nothing here knows what lies on a disk.
"""
