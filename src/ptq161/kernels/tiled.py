"""The ops on a weight in tiles (kernels/tiles.py): what they take, what they check, and what they compute anywhere.

    ptq161::tiled_linear(x, tiles, order, col, bias, layout, exact)  ->  x @ W.T + bias     (..., cols) -> (..., rows)
    ptq161::tiled_dequantize(tiles, order, col, layout)              ->  W                  (rows, cols) float32
    ptq161::tiled_rows(rows, tiles, layout)                          ->  W[rows]            (...) -> (..., cols) float32

`layout` is a LinearLayout as integers. `exact` keeps activations in float32; where a device rounds them (cpu.py), it is
to int8 in blocks of 128 channels. Faster implementations are registered by cpu.py and gpu.py; they check with the
functions here. Without one the ops compute through the reference, and nothing makes tiles by itself.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ptq161.binarize import CODE_WIDTHS, reconstruct
from ptq161.errors import InputError
from ptq161.kernels.native import untile
from ptq161.kernels.ops import LIBRARY, WIDTH_NAMES
from ptq161.kernels.tiles import TiledWeight, chosen_rows, tile_bytes, tile_count
from ptq161.packing import GroupLayout, LinearLayout, unpack

LIBRARY.define(
    "tiled_linear(Tensor x, Tensor tiles, Tensor? order, Tensor? col, Tensor? bias, int[] layout, bool exact) -> Tensor"
)
LIBRARY.define("tiled_dequantize(Tensor tiles, Tensor? order, Tensor? col, int[] layout) -> Tensor")
LIBRARY.define("tiled_rows(Tensor rows, Tensor tiles, int[] layout) -> Tensor")


def tiled_linear(x: Tensor, weight: TiledWeight, bias: Tensor | None = None, *, exact: bool = False) -> Tensor:
    """x @ W.T + bias: (..., cols) -> (..., rows) in x's dtype. Differentiable in x and bias.

    exact: activations stay float32; otherwise they are rounded to int8 in blocks of 128 channels with a scale each.
    Raises InputError for tensors whose shape, dtype or device does not fit.
    """
    result: Tensor = torch.ops.ptq161.tiled_linear.default(
        x, weight.tiles, weight.order, weight.col, bias, as_integers(weight.layout), exact
    )
    return result


def tiled_rows(rows: Tensor, weight: TiledWeight) -> Tensor:
    """W[rows] for row numbers of any shape: (...) -> (..., cols) float32; W has one group, and no vector but its scale.

    Raises InputError for a number out of range, and for tensors whose shape, dtype or device does not fit.
    """
    result: Tensor = torch.ops.ptq161.tiled_rows.default(rows, weight.tiles, as_integers(weight.layout))
    return result


def as_integers(layout: LinearLayout) -> list[int]:
    """A layout as the op takes it: rows, then levels, columns and three flags of each group."""
    values = [layout.rows]
    for group in layout.groups:
        values += [CODE_WIDTHS[group.width].count, group.cols, group.zero, group.mean, group.col]
    return values


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
def _sizes(layout: LinearLayout) -> tuple[int, tuple[int, int], bool, bool]:
    """What `check_weight` compares with: cols, shape of the tiles, whether there are an order and scales."""
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


def _check_rows(rows: Tensor, weight: TiledWeight) -> None:
    groups = weight.layout.groups
    if len(groups) > 1 or groups[0].zero or groups[0].mean or groups[0].col:
        raise InputError("ptq161::tiled_rows looks up rows of one column group that has no vector but its scale")
    check_weight(weight)
    if rows.dtype not in (torch.int64, torch.int32) or rows.device != weight.tiles.device:
        raise InputError(
            f"ptq161::tiled_rows got row numbers as {rows.dtype} on {rows.device}; "
            f"expected int64 or int32 on {weight.tiles.device}"
        )


def _rows(rows: Tensor, tiles: Tensor, layout: Sequence[int]) -> Tensor:
    weight = TiledWeight(from_integers(layout), tiles, None, None)
    _check_rows(rows, weight)
    if not rows.is_cpu:  # no waiting for the device, as nn.Embedding: it fails there
        torch._assert_async(((rows >= 0) & (rows < weight.layout.rows)).all())
    elif rows.numel():
        lowest, highest = map(int, rows.aminmax())
        if lowest < 0 or highest >= weight.layout.rows:
            raise InputError(f"row {lowest if lowest < 0 else highest} is out of range: there are {weight.layout.rows}")
    return chosen_rows(weight, rows.flatten().long()).reshape(*rows.shape, weight.layout.cols)


def _rows_shape(rows: Tensor, tiles: Tensor, layout: Sequence[int]) -> Tensor:
    weight = TiledWeight(from_integers(layout), tiles, None, None)
    _check_rows(rows, weight)
    return tiles.new_empty((*rows.shape, weight.layout.cols), dtype=torch.float32)


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
LIBRARY.impl("tiled_rows", _rows, "CompositeExplicitAutograd")
torch.library.register_fake("ptq161::tiled_linear", _linear_shape, lib=LIBRARY)
torch.library.register_fake("ptq161::tiled_dequantize", _dequantize_shape, lib=LIBRARY)
torch.library.register_fake("ptq161::tiled_rows", _rows_shape, lib=LIBRARY)
torch.library.register_autograd("ptq161::tiled_linear", _gradient, setup_context=_save_for_gradient, lib=LIBRARY)
