"""The CPU implementation of `ptq161::tiled_linear` (kernels/tiled.py): native kernels, where the extension is built.

What is given to C++ has been checked: addresses and sizes, which it checks once more, knowing nothing of tensors.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ptq161.errors import InputError
from ptq161.kernels.native import array, kernels, native, native_layout
from ptq161.kernels.ops import LIBRARY
from ptq161.kernels.tiled import as_integers, check, check_weight, from_integers, reference
from ptq161.kernels.tiles import TiledWeight

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class ReadyWeight:
    """A tiled weight for calls that come by the thousand: `linear` is `tiled_linear` with less to do at every call.

    What does not change is checked and worked out once, and calls that only the kernel would see go to it directly:
    the way through torch's dispatcher and back into Python takes longer than a small model's product
    (docs/decisions/0014-calls-past-the-dispatcher.md).
    """

    def __init__(self, weight: TiledWeight) -> None:
        """Raises InputError for tensors whose shape, dtype or device does not fit."""
        check_weight(weight)
        self.weight = weight
        self._cols, self._integers = weight.layout.cols, as_integers(weight.layout)
        self._native = None if native is None else native_layout(weight.layout)

    def linear(self, x: Tensor, bias: Tensor | None, *, exact: bool) -> Tensor:
        """x @ W.T + bias, as `tiled_linear`."""
        weight = self.weight
        if self._native is None or not only_for_the_kernel(x, bias):
            arguments = (weight.tiles, weight.order, weight.col, bias, self._integers, exact)
            result: Tensor = torch.ops.ptq161.tiled_linear.default(x, *arguments)
            return result
        if bias is not None or x.ndim == 0 or x.shape[-1] != self._cols or not _are_as_they_were(weight):
            check(x, weight, bias)
        return _product(self._native, x, weight, bias, exact, _FASTEST, torch.get_num_threads())


def run_kernel(
    x: Tensor, weight: TiledWeight, bias: Tensor | None, *, exact: bool, kernel: str, threads: int
) -> Tensor:
    """The product by one kernel of `kernels()`, for x in float32, bfloat16 or float16. Raises InputError."""
    check(x, weight, bias)
    if x.dtype not in _TYPES:
        raise InputError(f"a native kernel got x as {x.dtype}; expected float32, bfloat16 or float16")
    return _product(native_layout(weight.layout), x, weight, bias, exact, kernel, threads)


def _product(
    layout: Any, x: Tensor, weight: TiledWeight, bias: Tensor | None, exact: bool, kernel: str, threads: int
) -> Tensor:
    """Of what was checked: addresses and sizes go to C++."""
    assert native is not None
    x = x.contiguous()
    if bias is not None:
        bias = (bias if bias.dtype in _TYPES else bias.float()).contiguous()
    shape = x.shape
    y = x.new_empty((*shape[:-1], weight.layout.rows))
    native.linear(
        layout,
        kernel,
        shape[:-1].numel(),
        _TYPES[x.dtype],
        (x.data_ptr(), x.numel()),
        (y.data_ptr(), y.numel()),
        (weight.tiles.data_ptr(), weight.tiles.numel()),
        array(weight.order),
        array(weight.col),
        array(bias),
        0 if bias is None else _TYPES[bias.dtype],
        exact,
        threads,
    )
    return y


def only_for_the_kernel(x: Tensor, parameter: Tensor | None) -> bool:
    """Whether nothing else wants to see the product: no gradient, tracer, mode or kind of tensor."""
    if type(x) is not Tensor or x.dtype not in _TYPES or not x.is_cpu:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or (parameter is not None and parameter.requires_grad)):
        return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.is_functorch_wrapped_tensor(x)
        or (parameter is not None and torch._C._functorch.is_functorch_wrapped_tensor(parameter))
        or torch._C._get_tracing_state() is not None
    )


def _are_as_they_were(weight: TiledWeight) -> bool:
    """Of tensors checked before, what their `.data` could have changed, but for the sizes, which C++ checks anyway."""
    order, col = weight.order, weight.col
    return (
        weight.tiles.is_contiguous()
        and (order is None or (order.dtype is torch.int32 and order.is_contiguous()))
        and (col is None or (col.dtype is torch.float16 and col.is_contiguous()))
    )


def _native_linear(
    x: Tensor,
    tiles: Tensor,
    order: Tensor | None,
    col: Tensor | None,
    bias: Tensor | None,
    layout: Sequence[int],
    exact: bool,
) -> Tensor:
    if x.dtype == torch.float64:  # nothing native computes in it
        return reference(x, tiles, order, col, bias, layout, exact)
    weight = TiledWeight(from_integers(layout), tiles, order, col)
    threads = torch.get_num_threads()
    return run_kernel(x, weight, bias, exact=exact, kernel=_FASTEST, threads=threads)


if native is not None:
    _FASTEST = kernels()[0]
    LIBRARY.impl("tiled_linear", _native_linear, "CPU")
