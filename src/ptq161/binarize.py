"""The algorithm on tensors: how one weight matrix becomes signs, a few 4-bit columns and a handful of vectors.

A quantized linear is a list of *column groups*. A group is a set of input channels that share a code width; each
weight in it is an integer level, and vectors bring the levels back to size:

    W[:, columns]  =  ((level - zero) * scale + mean) * row * col          (rows, gcols)

with scale (alpha_s), row (alpha_r1), mean (mu) and zero per output row, and col (alpha_r2) per input channel. The
paper's layer (Eq. 9 of PTQ1.61, arXiv 2502.13179) is two groups: signs, and the structured mask's 4-bit columns.
Nothing here reads a file, a model or a clock.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ptq161.config import SalientRange


@dataclass(frozen=True)
class CodeWidth:
    """One row of the table of code widths: `count` integer levels `lowest, lowest + step, ...`."""

    name: str
    count: int
    lowest: int
    step: int


# Digit d of a packed code stands for level `lowest + step * d`. A new width is a new row here and nothing else.
CODE_WIDTHS: dict[str, CodeWidth] = {
    width.name: width
    for width in (
        CodeWidth("1bit", count=2, lowest=-1, step=2),
        CodeWidth("ternary", count=3, lowest=-1, step=1),
        CodeWidth("4bit", count=16, lowest=-15, step=2),  # odd levels: symmetric about 0 where a group has no zero
        CodeWidth("8bit", count=255, lowest=-127, step=1),  # for embedding and head (vocabulary.py)
    )
}
ONE_BIT, TERNARY, FOUR_BIT, EIGHT_BIT = CODE_WIDTHS.values()


@dataclass(frozen=True)
class ColumnGroup:
    """Input channels that share a code width. `rows` are the linear's outputs, `gcols` the group's channels.

    Shapes: columns (gcols,) ascending; codes (rows, gcols) integer levels in any dtype; scale, zero, mean and row
    (rows, 1); col (1, gcols). A vector that is None is absent: zero and mean count as 0, row and col as 1.
    """

    columns: Int64[Tensor, " gcols"]
    width: CodeWidth
    codes: Tensor
    scale: Float[Tensor, "rows 1"]
    zero: Float[Tensor, "rows 1"] | None = None
    mean: Float[Tensor, "rows 1"] | None = None
    row: Float[Tensor, "rows 1"] | None = None
    col: Float[Tensor, "1 gcols"] | None = None


@dataclass(frozen=True)
class QuantizedWeight:
    """One linear's weight as column groups, bits not yet packed. The groups' columns partition the input channels."""

    groups: tuple[ColumnGroup, ...]

    @property
    def rows(self) -> int:
        return self.groups[0].codes.shape[0]

    @property
    def cols(self) -> int:
        return sum(len(group.columns) for group in self.groups)


def salient_count(ratio: float, cols: int) -> int:
    """How many of `cols` input channels stay at 4 bits: floor(ratio * cols), the one place that rounds.

    The small slack keeps a ratio that was computed as count / cols from losing its column to float rounding.
    """
    return min(cols, int(ratio * cols + 1e-6))


def salient_columns(importance: Float[Tensor, " cols"], count: int) -> Bool[Tensor, " cols"]:
    """The structured mask (section 3.2): True on exactly `count` channels of largest importance, also under ties.

    Among equals the lower channel index wins, so the mask does not depend on the machine.
    """
    salient = torch.zeros(importance.shape, dtype=torch.bool, device=importance.device)
    salient[importance.argsort(descending=True, stable=True)[:count]] = True
    return salient


def quantize_weight(
    weight: Float[Tensor, "rows cols"],
    salient: Bool[Tensor, " cols"],
    *,
    salient_range: SalientRange,
    row_mean: bool,
) -> QuantizedWeight:
    """Split a weight by its mask into a binarized and a 4-bit group with their initial factors (Eq. 1, 2 and 9)."""
    weight = weight.float()
    groups = []
    if not salient.all():
        groups.append(binarized_group(weight, (~salient).nonzero().squeeze(1), row_mean))
    if salient.any():
        groups.append(salient_group(weight, salient.nonzero().squeeze(1), salient_range))
    return QuantizedWeight(tuple(groups))


def binarized_group(
    weight: Float[Tensor, "rows cols"], columns: Int64[Tensor, " gcols"], row_mean: bool
) -> ColumnGroup:
    """Signs of the (centred) weights, with scale = mean |w| per row and both angular factors at one (Eq. 2 and 9).

    sign(0) is +1: a third level could not be stored. The scale is the mean |w| of the *uncentred* weights, as in
    the published code.
    """
    part = weight[:, columns]
    mean = part.mean(dim=1, keepdim=True) if row_mean else None
    centred = part if mean is None else part - mean
    return ColumnGroup(
        columns=columns,
        width=ONE_BIT,
        codes=torch.where(centred >= 0, 1, -1).to(torch.int8),
        scale=part.abs().mean(dim=1, keepdim=True),
        mean=mean,
        row=torch.ones_like(part[:, :1]),
        col=torch.ones_like(part[:1, :]),
    )


def salient_group(
    weight: Float[Tensor, "rows cols"], columns: Int64[Tensor, " gcols"], salient_range: SalientRange
) -> ColumnGroup:
    """The salient columns on an asymmetric 4-bit grid per row (Eq. 1); the grid always contains zero.

    Codes are taken on the float16 scale that will be stored, so packing moves no weight.
    """
    part = weight[:, columns]
    spanned = weight if salient_range is SalientRange.ROW else part
    highest = spanned.amax(dim=1, keepdim=True).clamp(min=0)
    lowest = spanned.amin(dim=1, keepdim=True).clamp(max=0)
    scale = stored((highest - lowest) / ((FOUR_BIT.count - 1) * FOUR_BIT.step))
    scale = torch.where(scale == 0, 1.0, scale)  # an all-zero row, or one below float16: every level is then zero
    zero = nearest_level(FOUR_BIT.lowest - lowest / scale, FOUR_BIT)
    codes = nearest_level(part / scale + zero, FOUR_BIT)
    return ColumnGroup(columns=columns, width=FOUR_BIT, codes=codes.to(torch.int8), scale=scale, zero=zero)


def symmetric_weight(weight: Float[Tensor, "rows cols"], width: CodeWidth) -> QuantizedWeight:
    """Every column at one width, on a grid per row that spans the row's largest magnitude and has no zero level.

    The float16 scale is rounded up where the largest weight would otherwise lie outside, so that no weight moves by
    more than half a step. A row that float16 cannot scale (NaN, infinite, beyond 65504 * lowest) has no finite scale.
    """
    weight, largest_level = weight.float(), -width.lowest
    largest = weight.abs().amax(dim=1, keepdim=True)
    scale = (largest / largest_level).to(torch.float16)
    short = scale.float() * (largest_level + width.step / 2) < largest
    scale = torch.where(short, (scale.view(torch.int16) + 1).view(torch.float16), scale).float()
    scale = torch.where(scale == 0, 1.0, scale)  # an all-zero row
    codes = nearest_level(weight / scale, width).to(torch.int8)
    columns = torch.arange(weight.shape[1], device=weight.device)
    return QuantizedWeight((ColumnGroup(columns=columns, width=width, codes=codes, scale=scale),))


def nearest_level(values: Float[Tensor, "rows gcols"], width: CodeWidth) -> Float[Tensor, "rows gcols"]:
    """The level of `width` nearest to each value, in the values' dtype. Zero between two signs becomes +1."""
    if width.count == 2:  # round() would send 0.5, halfway between the digits, to the even one
        return torch.copysign(torch.ones((), dtype=values.dtype, device=values.device), values + 0.0)
    digits = (values - width.lowest).div_(width.step).round_().clamp_(0, width.count - 1)
    return digits.mul_(width.step).add_(width.lowest)


def reconstruct(weight: QuantizedWeight) -> Float[Tensor, "rows cols"]:
    """The weight that the groups stand for (Eq. 9): the one copy of the formula.

    Differentiable in every factor. Fitting, the saved weights and the kernels' reference all go through here.
    """
    dense = weight.groups[0].scale.new_empty(weight.rows, weight.cols)
    for group in weight.groups:
        dense = dense.index_copy(1, group.columns, group_values(group))
    return dense


def group_values(group: ColumnGroup) -> Float[Tensor, "rows gcols"]:
    """((codes - zero) * scale + mean) * row * col, with the per-row products taken on vectors first."""
    scale, mean = folded_rows(group)
    levels = group.codes if group.zero is None else group.codes - group.zero
    values = levels * scale
    if mean is not None:
        values = values + mean
    return values if group.col is None else values * group.col


def folded_rows(group: ColumnGroup) -> tuple[Float[Tensor, "rows 1"], Float[Tensor, "rows 1"] | None]:
    """scale * row and mean * row: the two per-row vectors that inference needs (alpha_s and alpha_r1 are redundant)."""
    if group.row is None:
        return group.scale, group.mean
    return group.scale * group.row, None if group.mean is None else group.mean * group.row


def stored(factor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Round a factor to what the file keeps: float16, returned in the input's dtype."""
    return factor.to(torch.float16).to(factor.dtype)


def as_stored(weight: QuantizedWeight) -> QuantizedWeight:
    """Fold `row` into scale and mean and round every factor to float16: exactly the weight that a file will hold."""
    groups = []
    for group in weight.groups:
        scale, mean = folded_rows(group)
        groups.append(
            replace(
                group,
                scale=stored(scale.detach()),
                mean=None if mean is None else stored(mean.detach()),
                row=None,
                col=None if group.col is None else stored(group.col.detach()),
            )
        )
    return QuantizedWeight(tuple(groups))
