"""The op behind every packed linear: its schema, shape rule, gradient, and the reference that serves every device.

    ptq161::linear(x, packed arguments, bias)  ->  x @ W.T + bias     (..., cols) -> (..., rows), in x's dtype
    ptq161::dequantize(packed arguments)       ->  W                  (rows, cols) float32

Group g of a linear is `codes[g]`, `scales[g]`, `zeros[g]`, `means[g]`, `cols[g]`, with `widths[g]` levels (the count of
a row of CODE_WIDTHS) over `sizes[g]` input channels; docs/format.md describes the tensors. A faster kernel for one
device is `LIBRARY.impl("linear", function, "CPU")` or "CUDA" in a module of its own: it wins over the reference there,
and the shape rule and the gradient stay. `dequantize` is what the gradient needs, and an op of its own because its
steps have shapes that depend on data, which a compiler cannot trace.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ptq161.binarize import CODE_WIDTHS, reconstruct
from ptq161.errors import InputError
from ptq161.packing import COLUMN_TYPES, GroupLayout, LinearLayout, PackedWeight, codes_name, unpack

_PACKED = (
    "Tensor? column_types, Tensor[] codes, Tensor[] scales, Tensor?[] zeros, Tensor?[] means, Tensor?[] cols, "
    "int[] widths, int[] sizes"
)
WIDTH_NAMES = {width.count: name for name, width in CODE_WIDTHS.items()}

LIBRARY = torch.library.Library("ptq161", "DEF")
LIBRARY.define(f"linear(Tensor x, {_PACKED}, Tensor? bias) -> Tensor")
LIBRARY.define(f"dequantize({_PACKED}) -> Tensor")


def linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x @ W.T + bias with W kept packed: (..., cols) -> (..., rows) in x's dtype, on x's device.

    Differentiable in x and bias. Raises InputError for tensors whose shape, dtype or device does not fit.
    """
    result: Tensor = torch.ops.ptq161.linear.default(x, *arguments(packed), bias)
    return result


def arguments(packed: PackedWeight) -> tuple[Any, ...]:
    """A packed weight as the op's arguments between `x` and `bias`."""
    tensors, groups = packed.tensors, packed.layout.groups
    indices = range(len(groups))
    return (
        tensors.get(COLUMN_TYPES),
        [tensors[codes_name(i)] for i in indices],
        [tensors[f"scale_{i}"] for i in indices],
        [tensors.get(f"zero_{i}") for i in indices],
        [tensors.get(f"mean_{i}") for i in indices],
        [tensors.get(f"col_{i}") for i in indices],
        [CODE_WIDTHS[group.width].count for group in groups],
        [group.cols for group in groups],
    )


def has_fast_kernel(device: torch.device) -> bool:
    """Whether the device has a kernel of its own, so that weights need not be unpacked at every call."""
    return _has_kernel("ptq161::linear", device) or has_tiled_kernel(device)


def has_tiled_kernel(device: torch.device) -> bool:
    """Whether the device has a kernel of its own for weights in tiles (kernels/tiles.py)."""
    return _has_kernel("ptq161::tiled_linear", device)


def _has_kernel(op: str, device: torch.device) -> bool:
    key = torch._C._dispatch_key_for_device(device.type)
    return device.type != "meta" and bool(torch._C._dispatch_has_kernel_for_dispatch_key(op, key))


def packed_weight(
    column_types: Tensor | None,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor | None],
    means: Sequence[Tensor | None],
    cols: Sequence[Tensor | None],
    widths: Sequence[int],
    sizes: Sequence[int],
) -> PackedWeight:
    """Inverse of `arguments`. Raises InputError for arguments that do not describe one packed linear."""
    lengths = [len(values) for values in (codes, scales, zeros, means, cols, widths, sizes)]
    if lengths != [max(1, len(codes))] * len(lengths):
        raise InputError(
            f"ptq161::linear got lists of {lengths} entries; expected one entry per column group in each of codes, "
            "scales, zeros, means, cols, widths and sizes"
        )
    unknown = [count for count in widths if count not in WIDTH_NAMES]
    if unknown:
        raise InputError(f"ptq161::linear got codes of {unknown[0]} levels; expected one of {sorted(WIDTH_NAMES)}")
    groups = []
    named: dict[str, Tensor | None] = {COLUMN_TYPES: column_types}
    for i, (zero, mean, col) in enumerate(zip(zeros, means, cols, strict=True)):
        named |= {codes_name(i): codes[i], f"scale_{i}": scales[i], f"zero_{i}": zero, f"mean_{i}": mean}
        named[f"col_{i}"] = col
        vectors = {"zero": zero is not None, "mean": mean is not None, "col": col is not None}
        groups.append(GroupLayout(WIDTH_NAMES[widths[i]], sizes[i], **vectors))
    layout = LinearLayout(int(scales[0].numel()), tuple(groups))  # never a symbolic size: weights do not vary
    packed = PackedWeight(layout, {name: tensor for name, tensor in named.items() if tensor is not None})
    _check_tensors(packed)
    return packed


def _check_tensors(packed: PackedWeight) -> None:
    specs, device = packed.layout.specs(), packed.tensors["weight"].device
    if specs.keys() != packed.tensors.keys():
        what = "needs" if COLUMN_TYPES in specs else "has no use for"
        raise InputError(f"ptq161::linear with {len(packed.layout.groups)} column group(s) {what} column_types")
    for name, tensor in packed.tensors.items():
        spec = specs[name]
        if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype or tensor.device != device:
            raise InputError(
                f"ptq161::linear got {name} as {tensor.dtype}{list(tensor.shape)} on {tensor.device}; "
                f"expected {spec.dtype}{list(spec.shape)} on {device}"
            )


def _check_input(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> None:
    rows, cols, device = packed.layout.rows, packed.layout.cols, packed.tensors["weight"].device
    if not x.is_floating_point() or x.ndim == 0 or x.shape[-1] != cols or x.device != device:
        raise InputError(
            f"ptq161::linear got x as {x.dtype}{list(x.shape)} on {x.device}; "
            f"expected floating point (..., {cols}) on {device}"
        )
    if bias is not None and (not bias.is_floating_point() or tuple(bias.shape) != (rows,) or bias.device != device):
        raise InputError(
            f"ptq161::linear got bias as {bias.dtype}{list(bias.shape)} on {bias.device}; "
            f"expected floating point ({rows},) on {device}"
        )


def _dequantize(*packed: Any) -> Tensor:
    return reconstruct(unpack(packed_weight(*packed)))


def _dequantize_shape(*packed: Any) -> Tensor:
    weight = packed_weight(*packed)
    return weight.tensors["scale_0"].new_empty((weight.layout.rows, weight.layout.cols), dtype=torch.float32)


def _linear(x: Tensor, *rest: Any) -> Tensor:
    *arguments, bias = rest
    packed = packed_weight(*arguments)
    _check_input(x, packed, bias)
    weight = reconstruct(unpack(packed)).to(x.dtype)
    # Under autocast the product may come back in another dtype; the op's result is always in x's.
    return functional.linear(x, weight, None if bias is None else bias.to(x.dtype)).to(x.dtype)


def _linear_shape(x: Tensor, *rest: Any) -> Tensor:
    *arguments, bias = rest
    packed = packed_weight(*arguments)
    _check_input(x, packed, bias)
    return x.new_empty((*x.shape[:-1], packed.layout.rows))


def _save_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, column_types, *vectors, widths, sizes, bias = inputs
    ctx.widths, ctx.sizes, ctx.bias_dtype = widths, sizes, None if bias is None else bias.dtype
    ctx.save_for_backward(column_types, *(tensor for tensors in vectors for tensor in tensors))


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """With respect to x and bias. The weight is unpacked once more: keeping it would cost the memory packing saved."""
    column_types, *flat = ctx.saved_tensors
    groups = len(ctx.sizes)
    vectors = [flat[start : start + groups] for start in range(0, len(flat), groups)]
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = torch.ops.ptq161.dequantize.default(column_types, *vectors, ctx.widths, ctx.sizes)
        grad_x = grad @ weight.to(grad.dtype)
    if ctx.needs_input_grad[-1]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    # torch expects a list of gradients for a list of tensors, but a single one for a list with a None in it.
    no_grads = [[None] * groups if all(tensor is not None for tensor in tensors) else None for tensors in vectors]
    return grad_x, None, *no_grads, None, None, grad_bias


LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
LIBRARY.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
torch.library.register_fake("ptq161::linear", _linear_shape, lib=LIBRARY)
torch.library.register_fake("ptq161::dequantize", _dequantize_shape, lib=LIBRARY)
torch.library.register_autograd("ptq161::linear", _gradient, setup_context=_save_for_gradient, lib=LIBRARY)
