"""A dense weight times few tokens on a CPU: what a head that is not packed costs is reading it from memory.

torch reads it at half the speed that the memory has; the native kernel (csrc/dense.h) at all of it.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ptq161.kernels.cpu import only_for_the_kernel
from ptq161.kernels.native import array, kernels, native

TOKENS = 4  # that read the weight once; torch's product of matrices is faster with more (docs/decisions/0020)
_TYPES = {torch.float32: 0, torch.bfloat16: 1}


def has_dense_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether `dense_linear` takes these: few tokens and a plain weight in one dtype, and nothing else to see them."""
    return (
        native is not None
        and x.ndim > 0
        and x.shape[:-1].numel() <= TOKENS
        and x.dtype is weight.dtype
        and x.dtype in _TYPES
        and weight.is_cpu
        and weight.is_contiguous()
        and weight.data_ptr() % weight.element_size() == 0
        and weight.shape[-1] == x.shape[-1]
        and weight.numel() > 0
        and only_for_the_kernel(x, weight)
    )


def dense_linear(
    x: Float[Tensor, "*batch cols"], weight: Float[Tensor, "rows cols"], *, kernel: str | None = None
) -> Float[Tensor, "*batch rows"]:
    """x @ W.T, summed in float32, for what `has_dense_kernel` allows; `kernel`: one of `cpu_kernels()`."""
    assert native is not None
    x = x.contiguous()
    rows, cols = weight.shape
    y = x.new_empty((*x.shape[:-1], rows))
    native.dense(
        kernel or kernels()[0],
        x.shape[:-1].numel(),
        rows,
        cols,
        _TYPES[x.dtype],
        array(x),
        array(y),
        array(weight),
        torch.get_num_threads(),
    )
    return y
