"""Hot operations on paged, compressed KV: each op is a plain torch reference and a Triton kernel.

Import ops from their own package (`forepage_kernels.select_topk`), byte formats from `layout`.
An op's `__init__` checks the arguments and picks the kernel for CUDA tensors, else the reference;
nothing imports Triton until a CUDA tensor arrives. Nothing here knows a service.
"""
