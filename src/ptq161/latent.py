"""Latent weights: real numbers that every forward pass rounds to codes, learned through the rounding.

    W[:, columns of group g]  =  level(latent / scale_g) * scale_g          scale_g = stored(base_g * gain_g), (rows, 1)

Rounding has no useful gradient, so the backward pass lets the gradient through as if it were not there
(straight-through), except where a latent lies beyond the outermost level. The forward pass computes exactly the weight
that a file would hold. `gain` starts at one: a step of AdamW then changes each scale by the same share of itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ptq161.binarize import CodeWidth, ColumnGroup, QuantizedWeight, nearest_level, stored
from ptq161.kernels.rounding import has_rounding_kernel, rounded, rounding_gradients

SMALLEST_SCALE = 2.0**-24  # of float16: a scale that learning drives to zero or below stops there


@dataclass(frozen=True)
class LatentWeight:
    """One linear while its codes are learned. Columns are in group order: those of the first group first.

    Shapes: columns (cols,), the input channel of each column; sizes, channels per group; latent (rows, cols); base and
    gain (rows, groups). `latent` and `gain` are what an optimizer changes.
    """

    columns: Int64[Tensor, " cols"]
    widths: tuple[CodeWidth, ...]
    sizes: tuple[int, ...]
    latent: Float[Tensor, "rows cols"]
    base: Float[Tensor, "rows groups"]
    gain: Float[Tensor, "rows groups"]

    @classmethod
    def of(cls, weight: Float[Tensor, "rows cols"], start: QuantizedWeight) -> "LatentWeight":
        """Latents at the original weight, with the column groups and scales of `start`."""
        columns = torch.cat([group.columns for group in start.groups])
        base = torch.cat([group.scale for group in start.groups], dim=1)
        return cls(
            columns=columns,
            widths=tuple(group.width for group in start.groups),
            sizes=tuple(len(group.columns) for group in start.groups),
            latent=weight.detach().float()[:, columns].requires_grad_(),
            base=base,
            gain=torch.ones_like(base).requires_grad_(),
        )

    @property
    def groups(self) -> list[tuple[CodeWidth, int]]:
        """Width and number of channels of each group."""
        return list(zip(self.widths, self.sizes, strict=True))

    @cached_property
    def positions(self) -> Int64[Tensor, "rows cols"]:
        """Where each input channel lies in group order: the inverse permutation, once per row as `gather` wants it."""
        return self.columns.argsort().expand(self.latent.shape)

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "rows cols"]:
        """The weight that the rounded latents stand for, channels in natural order; differentiable."""
        result: Tensor = _Rounded.apply(self.latent, self.base * self.gain, self, dtype)  # type: ignore[no-untyped-call]
        return result

    def to(self, device: torch.device) -> "LatentWeight":
        """The same on a device, its latent and gain leaves of their own."""
        moved = {name: getattr(self, name).detach().to(device) for name in ("columns", "latent", "base", "gain")}
        return replace(self, **moved | {name: moved[name].requires_grad_() for name in ("latent", "gain")})

    def scales(self) -> Float[Tensor, "rows groups"]:
        """The row scales as a file would hold them."""
        return _stored_scales(self.base * self.gain)

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """The codes and scales of the moment, detached."""
        groups = []
        parts = _groups(self.latent, self.scales(), self)
        for columns, (part, scale, width) in zip(self.columns.split(self.sizes), parts, strict=True):
            codes = nearest_level(part / scale, width).to(torch.int8)
            groups.append(ColumnGroup(columns=columns, width=width, codes=codes, scale=scale))
        return QuantizedWeight(tuple(groups))


class _Rounded(torch.autograd.Function):
    """Round to levels forward, straight through backward.

    Everything stays floating point: masks and `torch.where` are many times slower than arithmetic on a CPU. Levels are
    computed again in the backward pass, which is cheaper than the memory to keep them. Where there is a kernel it gives
    the same (docs/decisions/0026); what stands here is what it is held against.
    """

    @staticmethod
    def forward(
        ctx: Any,
        latent: Float[Tensor, "rows cols"],
        scale: Float[Tensor, "rows groups"],
        weight: LatentWeight,
        dtype: torch.dtype,
    ) -> Tensor:
        scale = _stored_scales(scale)
        ctx.weight = weight
        ctx.save_for_backward(latent, scale)
        if has_rounding_kernel(latent, dtype):
            return rounded(latent, scale, weight.columns, weight.groups, dtype)
        parts = _groups(latent, scale, weight)
        values = torch.cat([nearest_level(part / s, width).mul_(s) for part, s, width in parts], dim=1)
        return values.gather(1, weight.positions).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        weight = ctx.weight
        latent, scale = ctx.saved_tensors
        if has_rounding_kernel(latent, grad.dtype):
            return *rounding_gradients(grad, latent, scale, weight.columns, weight.groups), None, None
        grad = grad.float().gather(1, weight.columns.expand(grad.shape))
        to_latent, to_scale = [], []
        grads = grad.split(weight.sizes, dim=1)
        for part_grad, (part, s, width) in zip(grads, _groups(latent, scale, weight), strict=True):
            ratio = part / s
            levels = nearest_level(ratio, width)
            if width.count == 2:  # both levels are outermost: nothing is beyond them
                to_latent.append(part_grad)
                to_scale.append(torch.linalg.vecdot(part_grad, levels))
                continue
            # Beyond the outermost cell, half a step further than its level, moving a latent changes nothing.
            edge = -width.lowest + width.step / 2
            through = torch.ops.aten.hardtanh_backward(part_grad, ratio, -edge, edge)
            to_latent.append(through)
            to_scale.append(torch.linalg.vecdot(part_grad, levels) - torch.linalg.vecdot(through, ratio))
        return torch.cat(to_latent, dim=1), torch.stack(to_scale, dim=1), None, None


def _stored_scales(scale: Tensor) -> Tensor:
    return stored(scale).clamp_(min=SMALLEST_SCALE)


def _groups(latent: Tensor, scale: Tensor, weight: LatentWeight) -> Sequence[tuple[Tensor, Tensor, CodeWidth]]:
    return list(zip(latent.split(weight.sizes, dim=1), scale.split(1, dim=1), weight.widths, strict=True))
