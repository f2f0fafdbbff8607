"""The CPU op: the same product as `ptq161::linear`, on a weight in tiles (kernels/tiles.py), by native kernels.

    ptq161::tiled_linear(x, tiles, order, col, bias, layout, exact)  ->  x @ W.T + bias     (..., cols) -> (..., rows)
    ptq161::tiled_dequantize(tiles, order, col, layout)              ->  W                  (rows, cols) float32

`layout` is a LinearLayout as integers. `exact` keeps activations in float32; otherwise they are rounded to int8 in
blocks of 128 channels. This module alone calls the extension `_native`, and is the one place that checks what it is
given: addresses and sizes go to C++, which checks the sizes once more and knows nothing of tensors.

Where the extension is not built the ops compute through the reference, and nothing makes tiles by itself. The ops'
kernels for GPUs are in gpu.py.
"""

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ptq161.binarize import CODE_WIDTHS, reconstruct
from ptq161.errors import InputError
from ptq161.kernels.ops import LIBRARY, WIDTH_NAMES
from ptq161.kernels.tiles import TiledWeight, code_bits, tile_bytes, tile_count, untile
from ptq161.packing import GroupLayout, LinearLayout, unpack

native: ModuleType | None
try:
    from ptq161.kernels import _native as native  # type: ignore[attr-defined,no-redef,unused-ignore]
except ImportError as error:
    if error.name is not None and error.name != "ptq161.kernels":
        raise  # it is there and broken
    native = None

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

LIBRARY.define(
    "tiled_linear(Tensor x, Tensor tiles, Tensor? order, Tensor? col, Tensor? bias, int[] layout, bool exact) -> Tensor"
)
LIBRARY.define("tiled_dequantize(Tensor tiles, Tensor? order, Tensor? col, int[] layout) -> Tensor")


def kernels() -> tuple[str, ...]:
    """The native kernels that run here, fastest first; empty if the extension is not built."""
    return () if native is None else tuple(native.kernels())


def tiled_linear(x: Tensor, weight: TiledWeight, bias: Tensor | None = None, *, exact: bool = False) -> Tensor:
    """x @ W.T + bias: (..., cols) -> (..., rows) in x's dtype. Differentiable in x and bias.

    exact: activations stay float32; otherwise they are rounded to int8 in blocks of 128 channels with a scale each.
    Raises InputError for tensors whose shape, dtype or device does not fit.
    """
    result: Tensor = torch.ops.ptq161.tiled_linear.default(
        x, weight.tiles, weight.order, weight.col, bias, as_integers(weight.layout), exact
    )
    return result


def as_integers(layout: LinearLayout) -> list[int]:
    """A layout as the op takes it: rows, then levels, columns and three flags of each group."""
    values = [layout.rows]
    for group in layout.groups:
        values += [CODE_WIDTHS[group.width].count, group.cols, group.zero, group.mean, group.col]
    return values


def run_kernel(
    x: Tensor, weight: TiledWeight, bias: Tensor | None, *, exact: bool, kernel: str, threads: int
) -> Tensor:
    """The product by one kernel of `kernels()`, for x in float32, bfloat16 or float16. Raises InputError."""
    assert native is not None
    layout = weight.layout
    check(x, weight, bias)
    if x.dtype not in _TYPES:
        raise InputError(f"a native kernel got x as {x.dtype}; expected float32, bfloat16 or float16")
    x = x.contiguous()
    if bias is not None:
        bias = (bias if bias.dtype in _TYPES else bias.float()).contiguous()
    y = x.new_empty((*x.shape[:-1], layout.rows))
    native.linear(
        _native_layout(layout),
        kernel,
        x.numel() // layout.cols,
        _TYPES[x.dtype],
        (x.data_ptr(), x.numel()),
        (y.data_ptr(), y.numel()),
        (weight.tiles.data_ptr(), weight.tiles.numel()),
        _array(weight.order),
        _array(weight.col),
        _array(bias),
        0 if bias is None else _TYPES[bias.dtype],
        exact,
        threads,
    )
    return y


def read_memory(words: Tensor, threads: int) -> int:
    """Sum of int64 words modulo 2**64, read once by `threads` threads: what a product without arithmetic would cost."""
    assert native is not None and words.dtype == torch.int64 and words.is_contiguous()
    total: int = native.read_memory((words.data_ptr(), words.numel()), threads)
    return total


def _array(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.numel())


def from_integers(values: Sequence[int]) -> LinearLayout:
    """Inverse of `as_integers`. Raises InputError for integers that describe no layout."""
    return _layout(tuple(values))


@lru_cache(maxsize=4096)
def _layout(values: tuple[int, ...]) -> LinearLayout:
    rows, *rest = values or (0,)
    if rows < 1 or not rest or len(rest) % 5:
        raise InputError(f"ptq161::tiled_linear got layout {list(values)}; expected rows, then five numbers per group")
    groups = []
    for start in range(0, len(rest), 5):
        count, cols, *flags = rest[start : start + 5]
        if count not in WIDTH_NAMES or cols < 1:
            raise InputError(f"ptq161::tiled_linear got a group of {cols} columns with {count} levels")
        zero, mean, col = map(bool, flags)
        groups.append(GroupLayout(WIDTH_NAMES[count], cols, zero=zero, mean=mean, col=col))
    return LinearLayout(rows, tuple(groups))


@lru_cache(maxsize=4096)
def _native_layout(layout: LinearLayout) -> Any:
    assert native is not None
    groups = []
    for group in layout.groups:
        width = CODE_WIDTHS[group.width]
        groups.append((code_bits(width), group.cols, width.lowest, width.step, group.zero, group.mean))
    try:
        made = native.Layout(layout.rows, groups)
    except ValueError as error:
        raise InputError(f"a linear of {layout.rows} x {layout.cols} is too large: {error}") from error
    assert (made.tiles, made.tile_bytes) == (tile_count(layout), tile_bytes(layout))
    return made


@lru_cache(maxsize=4096)
def _sizes(layout: LinearLayout) -> tuple[int, tuple[int, int], bool, bool]:
    """What `_check` compares with: cols, shape of the tiles, whether there is an order, whether there are scales."""
    shape = (tile_count(layout), tile_bytes(layout))
    return layout.cols, shape, len(layout.groups) > 1, any(group.col for group in layout.groups)


def check(x: Tensor, weight: TiledWeight, bias: Tensor | None) -> None:
    """Raises InputError for tensors whose shape, dtype or device does not fit."""
    cols, device = weight.layout.cols, weight.tiles.device
    check_weight(weight)
    if not x.is_floating_point() or x.ndim == 0 or x.shape[-1] != cols or x.device != device:
        raise InputError(
            f"ptq161::tiled_linear got x as {x.dtype}{list(x.shape)} on {x.device}; "
            f"expected floating point (..., {cols}) on {device}"
        )
    rows = weight.layout.rows
    if bias is not None and (not bias.is_floating_point() or tuple(bias.shape) != (rows,) or bias.device != device):
        raise InputError(
            f"ptq161::tiled_linear got bias as {bias.dtype}{list(bias.shape)} on {bias.device}; "
            f"expected floating point ({rows},) on {device}"
        )


def check_weight(weight: TiledWeight) -> None:
    """Raises InputError for tensors that do not form a weight of their layout."""
    cols, shape, ordered, scaled = _sizes(weight.layout)
    _check_tensor("tiles", weight.tiles, torch.uint8, shape, weight.tiles.device)
    for name, tensor, dtype, needed in (
        ("order", weight.order, torch.int32, ordered),
        ("col", weight.col, torch.float16, scaled),
    ):
        if (tensor is not None) != needed:
            raise InputError(f"ptq161::tiled_linear {'needs' if needed else 'has no use for'} {name} with this layout")
        if tensor is not None:
            _check_tensor(name, tensor, dtype, (cols,), weight.tiles.device)


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
        stride = "" if tensor.is_contiguous() else f" with strides {list(tensor.stride())}"
        raise InputError(
            f"ptq161::tiled_linear got {name} as {tensor.dtype}{list(tensor.shape)}{stride} on {tensor.device}; "
            f"expected contiguous {dtype}{list(shape)} on {device}"
        )


def _dequantize(tiles: Tensor, order: Tensor | None, col: Tensor | None, layout: Sequence[int]) -> Tensor:
    weight = TiledWeight(from_integers(layout), tiles, order, col)
    check_weight(weight)
    return reconstruct(unpack(untile(weight)))


def _dequantize_shape(tiles: Tensor, order: Tensor | None, col: Tensor | None, layout: Sequence[int]) -> Tensor:
    sizes = from_integers(layout)
    return tiles.new_empty((sizes.rows, sizes.cols), dtype=torch.float32)


def reference(
    x: Tensor,
    tiles: Tensor,
    order: Tensor | None,
    col: Tensor | None,
    bias: Tensor | None,
    layout: Sequence[int],
    exact: bool,
) -> Tensor:
    """The op on every device: the stored tensors are brought back and unpacked, and torch multiplies."""
    check(x, TiledWeight(from_integers(layout), tiles, order, col), bias)
    weight = _dequantize(tiles, order, col, layout).to(x.dtype)
    return functional.linear(x, weight, None if bias is None else bias.to(x.dtype)).to(x.dtype)


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


def _linear_shape(
    x: Tensor,
    tiles: Tensor,
    order: Tensor | None,
    col: Tensor | None,
    bias: Tensor | None,
    layout: Sequence[int],
    exact: bool,
) -> Tensor:
    weight = TiledWeight(from_integers(layout), tiles, order, col)
    check(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.layout.rows))


def _save_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, tiles, order, col, bias, layout, _ = inputs
    ctx.layout, ctx.bias_dtype = layout, None if bias is None else bias.dtype
    ctx.save_for_backward(tiles, order, col)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = torch.ops.ptq161.tiled_dequantize.default(*ctx.saved_tensors, ctx.layout)
        grad_x = grad @ weight.to(grad.dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, None, None


LIBRARY.impl("tiled_linear", reference, "CompositeExplicitAutograd")
LIBRARY.impl("tiled_dequantize", _dequantize, "CompositeExplicitAutograd")
torch.library.register_fake("ptq161::tiled_linear", _linear_shape, lib=LIBRARY)
torch.library.register_fake("ptq161::tiled_dequantize", _dequantize_shape, lib=LIBRARY)
torch.library.register_autograd("ptq161::tiled_linear", _gradient, setup_context=_save_for_gradient, lib=LIBRARY)
if native is not None:
    _FASTEST = kernels()[0]
    LIBRARY.impl("tiled_linear", _native_linear, "CPU")
