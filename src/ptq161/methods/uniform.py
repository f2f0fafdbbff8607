"""Uniform grids with a scale and a zero point per row and group of channels: what most baselines round to."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ptq161.binarize import stored

SCALE_BITS = 16  # scales are rounded to float16 before any code is chosen
INDEX_BITS = 16  # of a channel, where its place is a choice


@dataclass(frozen=True)
class UniformGrid:
    """Values (code - zero) * scale for codes 0 .. 2^bits - 1; scale is a float16 value, zero a whole code."""

    bits: int
    scale: Float[Tensor, "rows 1"]
    zero: Float[Tensor, "rows 1"]

    def rounded(self, values: Float[Tensor, "rows some"]) -> Float[Tensor, "rows some"]:
        """The nearest grid value of each."""
        codes = (values / self.scale).round_().add_(self.zero).clamp_(0, 2**self.bits - 1)
        return codes.sub_(self.zero).mul_(self.scale)


def minmax_grid(part: Float[Tensor, "rows gcols"], bits: int) -> UniformGrid:
    """The grid from the smallest to the largest value of each row, zero among them (as in GPTQ's code)."""
    return grid_between(part.amin(dim=1, keepdim=True), part.amax(dim=1, keepdim=True), bits)


def grid_between(lowest: Float[Tensor, "rows 1"], highest: Float[Tensor, "rows 1"], bits: int) -> UniformGrid:
    """The grid that spans lowest .. highest in each row, widened to contain zero. A row of zeros stays zero."""
    lowest, highest = lowest.clamp(max=0), highest.clamp(min=0)
    scale = stored((highest - lowest) / (2**bits - 1))
    scale = torch.where(scale == 0, 1.0, scale)  # an all-zero row, or one below float16
    return UniformGrid(bits, scale, (-lowest / scale).round().clamp(0, 2**bits - 1))


def spans(cols: int, group: int | None) -> list[slice]:
    """The channels of each group, in order; None is one group. The last is shorter where `group` does not divide."""
    size = group or cols
    return [slice(first, min(first + size, cols)) for first in range(0, cols, size)]


def uniform_bits(shape: tuple[int, ...], bits: int, group: int | None) -> dict[str, int]:
    """What codes, scales and zero points of a (rows, cols) weight take; a zero point is as wide as a code."""
    rows, cols = shape
    groups = rows * len(spans(cols, group))
    return {"codes": rows * cols * bits, "scales": groups * SCALE_BITS, "zeros": groups * bits}
