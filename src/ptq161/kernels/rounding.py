"""Latent weights (latent.py) to the dense weight they stand for and back, natively: one pass over memory each way.

torch takes a pass for every operation of the formulas, which on a CPU is a good part of a learning step; and so it does
for every candidate of the search for the row scales that learning starts from (mixed.py).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ptq161.binarize import CodeWidth
from ptq161.kernels.native import array, kernels, native

_TYPES = {torch.float32: 0, torch.bfloat16: 1}


def has_rounding_kernel(latent: Tensor, dtype: torch.dtype) -> bool:
    """Whether `rounded` and `rounding_gradients` take these latents, and dense weights or gradients in this dtype."""
    return (
        native is not None
        and type(latent.detach()) is Tensor
        and latent.is_cpu
        and latent.dtype is torch.float32
        and latent.numel() > 0
        and dtype in _TYPES
    )


def rounded(
    latent: Float[Tensor, "rows cols"],
    scale: Float[Tensor, "rows groups"],
    columns: Int64[Tensor, " cols"],
    groups: Sequence[tuple[CodeWidth, int]],
    dtype: torch.dtype,
    *,
    kernel: str | None = None,
) -> Tensor:
    """(rows, cols): the nearest level times its scale, each column in its natural place.

    columns: natural place of each column of `latent`. groups: width and number of columns of each, in their order.
    kernel: one of `cpu_kernels()`.
    """
    dense = torch.empty(latent.shape, dtype=dtype)
    _call("round_latents", latent, scale, columns, groups, dense, None, None, kernel)
    return dense


def rounding_gradients(
    grad: Tensor,
    latent: Float[Tensor, "rows cols"],
    scale: Float[Tensor, "rows groups"],
    columns: Int64[Tensor, " cols"],
    groups: Sequence[tuple[CodeWidth, int]],
    *,
    kernel: str | None = None,
) -> tuple[Float[Tensor, "rows cols"], Float[Tensor, "rows groups"]]:
    """Straight-through gradients at latents and scales, from `grad`, (rows, cols), at what `rounded` gives."""
    to_latent, to_scale = torch.empty(latent.shape), torch.empty(scale.shape)
    _call("round_latents_backward", latent, scale, columns, groups, grad.contiguous(), to_latent, to_scale, kernel)
    return to_latent, to_scale


def searched_scales(
    part: Float[Tensor, "rows gcols"],
    width: CodeWidth,
    importance: Float[Tensor, " gcols"],
    candidates: Float[Tensor, "rows candidates"],
    smallest: float,
    *,
    kernel: str | None = None,
) -> Float[Tensor, "rows 1"]:
    """What `mixed.best_scale` searches for, of latents for which `has_rounding_kernel`; not for signs.

    candidates: positive; the first one is a row's scale where no error is finite. smallest: scale there is.
    """
    scale = torch.empty(len(part), 1)
    part, importance, candidates = part.contiguous(), importance.contiguous(), candidates.contiguous()
    assert native is not None
    native.search_scales(
        kernel or kernels()[0],
        len(part),
        (part.shape[1], width.count, width.lowest, width.step),
        candidates.shape[1],
        smallest,
        array(part),
        array(importance),
        array(candidates),
        array(scale),
        torch.get_num_threads(),
    )
    return scale


def _call(
    function: str,
    latent: Tensor,
    scale: Tensor,
    columns: Tensor,
    groups: Sequence[tuple[CodeWidth, int]],
    dense: Tensor,
    to_latent: Tensor | None,
    to_scale: Tensor | None,
    kernel: str | None,
) -> None:
    latent, scale, columns = latent.contiguous(), scale.contiguous(), columns.contiguous()
    getattr(native, function)(
        kernel or kernels()[0],
        *latent.shape,
        [(cols, width.count, width.lowest, width.step) for width, cols in groups],
        _TYPES[dense.dtype],
        array(latent),
        array(scale),
        array(columns),
        array(dense),
        array(to_latent),
        array(to_scale),
        torch.get_num_threads(),
    )
