"""The Triton kernels for GPUs. Nothing here is imported, and no compiler started, before a tensor on a GPU asks for a kernel.

`support.py` says where they serve, `operators.py` is what the dispatch table lists; `rows.py`, `columns.py` and `weights.py`
have the elementwise kernels, `products.py` and `packed.py` the integer products, `gradients.py` what backward needs.
"""
