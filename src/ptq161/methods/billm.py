"""BiLLM: salient columns binarized twice, the rest split in two by magnitude and binarized once.

Huang et al., arXiv 2402.04291; https://github.com/Aaronhuang-778/BiLLM. The authors' settings: saliency w^2 / U_jj^2,
blocks of 128 channels with their own columns, split and row vectors, fewer than 50 salient columns in each, 81 tried
splits, damping 0.01; a block is quantized at once and only later blocks make up for its errors. As in the published
code, columns and split are searched by the error of binarizing the saliencies.

They report about 1.1 bits, which leaves out which group each weight is in and every centre and scale. Stored, a block
of 128 channels takes: a sign per weight and a second one in salient columns; a bit per channel (salient?) and one per
other weight (its half); and per row seven float16 values: centre and scale of both halves; centre and two scales of
the salient columns. That is 2 + 7 * 16 / 128 = 2.875 bits per weight.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ptq161.binarize import stored
from ptq161.methods.baseline import Baseline, BaselineTask, DenseWeight
from ptq161.methods.hessian import BLOCK, damped_factor, each_linear
from ptq161.methods.uniform import SCALE_BITS

MOST_SALIENT = 50  # columns of a block, exclusive
SPLITS = torch.linspace(0.10, 0.90, 81)  # shares of the block's weights in the lower half


@dataclass(frozen=True)
class BiLlm(Baseline):
    """All settings are the authors'."""

    damping: float = 0.01

    @property
    def claimed_bits(self) -> float:
        return 1.08  # LLaMA-7B, Table 2 of the paper

    def __call__(self, task: BaselineTask, generator: torch.Generator) -> dict[str, DenseWeight]:
        return each_linear(task, self.quantize)

    def quantize(self, weight: Float[Tensor, "rows cols"], moments: Float[Tensor, "cols cols"]) -> DenseWeight:
        """One linear from its weight and H."""
        factor, dead = damped_factor(moments, self.damping)
        left = weight.masked_fill(dead, 0.0)
        salient = []
        for first in range(0, left.shape[1], BLOCK):
            part = left[:, first : first + BLOCK]
            last = first + part.shape[1]
            strength = factor.diagonal()[first:last]
            columns, upper = search_groups(part.square() / strength.square())
            rounded = binarize_groups(part, columns, upper)
            left[:, last:] -= ((part - rounded) / strength) @ factor[first:last, last:]
            left[:, first:last] = rounded
            salient.append(columns)
        return DenseWeight(left, billm_bits(len(weight), salient))


def search_groups(
    saliency: Float[Tensor, "rows some"],
) -> tuple[Bool[Tensor, " some"], Bool[Tensor, "rows some"]]:
    """(salient columns, upper half of the other weights) of one block, each with the least error.

    First how many of the columns with the largest sums are binarized twice, all else twice as well; then the threshold
    between the halves. Nothing is rounded to float16 here: saliencies can be beyond it.
    """
    some = saliency.shape[1]
    order = saliency.sum(dim=0).argsort(descending=True, stable=True)
    errors = [
        twice_binarized_error(saliency[:, order[:count]]) + twice_binarized_error(saliency[:, order[count:]])
        for count in range(1, min(MOST_SALIENT, some))
    ]
    columns = torch.zeros(some, dtype=torch.bool, device=saliency.device)
    if errors:
        columns[order[: int(torch.stack(errors).argmin()) + 1]] = True
    others = ~columns.expand_as(saliency)
    # as in the published code, salient columns take part in the quantiles, as zeros
    thresholds = quantiles(saliency * others, SPLITS)
    best = split_gains(saliency[:, ~columns], thresholds).argmax()
    return columns, (saliency >= thresholds[best]) & others


def twice_binarized_error(part: Float[Tensor, "rows some"]) -> Float[Tensor, ""]:
    """Squared error of centre plus scaled signs per row, and again of what is left, nothing of it rounded."""
    for _ in range(2):
        part = part - part.mean(dim=1, keepdim=True)
        part = part - part.abs().mean(dim=1, keepdim=True).copysign(part)
    return part.square().sum()


def split_gains(values: Float[Tensor, "rows some"], thresholds: Float[Tensor, " splits"]) -> Float[Tensor, " splits"]:
    """By how much binarizing the halves below and from each threshold brings down the sum of squares.

    n values with mean m and mean distance s from it lose n (m^2 + s^2). Either half is a stretch of the sorted row, so
    that running sums give m and s of every split at once.
    """
    ordered = values.double().sort(dim=1).values
    sums = torch.nn.functional.pad(ordered.cumsum(dim=1), (1, 0))
    split = torch.searchsorted(ordered, thresholds.double().expand(len(values), -1).contiguous())
    gains = torch.zeros_like(split, dtype=torch.float64)
    for first, last in ((torch.zeros_like(split), split), (split, torch.full_like(split, values.shape[1]))):
        lowest, highest = sums.gather(1, first), sums.gather(1, last)
        count = (last - first).clamp(min=1)
        mean = (highest - lowest) / count
        middle = torch.searchsorted(ordered, mean).clamp(min=first, max=last)
        between = sums.gather(1, middle)
        distance = mean * (2 * middle - first - last) + highest + lowest - 2 * between
        gains += count * (mean.square() + (distance / count).square())
    return gains.sum(dim=0)


def quantiles(values: Float[Tensor, "rows some"], shares: Float[Tensor, " shares"]) -> Float[Tensor, " shares"]:
    """Linearly interpolated quantiles; unlike `torch.quantile` for any number of values."""
    ordered = values.flatten().sort().values
    position = shares.to(values) * (len(ordered) - 1)
    below = position.floor().long()
    above = (below + 1).clamp(max=len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], position - below)


def binarize_groups(
    part: Float[Tensor, "rows some"], columns: Bool[Tensor, " some"], upper: Bool[Tensor, "rows some"]
) -> Float[Tensor, "rows some"]:
    """A block as it will be stored: salient columns binarized twice, the two halves of the others once."""
    salient = columns.expand_as(part)
    return binarized(part, salient, 2) + binarized(part, upper, 1) + binarized(part, ~(salient | upper), 1)


def binarized(
    values: Float[Tensor, "rows some"], mask: Bool[Tensor, "rows some"], order: int
) -> Float[Tensor, "rows some"]:
    """Centre plus scaled signs per row of the masked values, and again of what is left; zero outside the mask.

    Each time the centre is the mean, and the scale the mean distance from it, over the row's masked values. Scales and
    the sum of the centres are float16. Signs of zero are +1: a third level could not be stored.
    """
    count = mask.sum(dim=1, keepdim=True).clamp(min=1)
    residual = values * mask
    centres, signs = torch.zeros_like(residual[:, :1]), torch.zeros_like(residual)
    for _ in range(order):
        mean = residual.sum(dim=1, keepdim=True) / count
        centred = (residual - mean) * mask
        step = stored(centred.abs().sum(dim=1, keepdim=True) / count) * torch.where(centred >= 0, 1.0, -1.0)
        centres, signs = centres + mean, signs + step
        residual = (centred - step) * mask
    return (stored(centres) + signs) * mask


def billm_bits(rows: int, salient: list[Bool[Tensor, " _"]]) -> dict[str, int]:
    """Of a linear with these salient columns in its blocks; see the top of the file."""
    cols = sum(len(columns) for columns in salient)
    twice = sum(int(columns.sum()) for columns in salient)
    return {
        "codes": rows * (cols + twice),
        "bitmap": rows * (cols - twice),
        "columns": cols,
        "scales": rows * len(salient) * 4 * SCALE_BITS,
        "means": rows * len(salient) * 3 * SCALE_BITS,
    }
