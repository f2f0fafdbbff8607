"""Error-compensated codes: what rounding one channel does to the output, the channels not yet rounded take back.

With D = W - rounded W and H = sum over tokens of x x^T, the output error of a row is D H D^T. Plain rounding looks at
H's diagonal alone. Here channels are rounded one after another, and after each the others move to where they make up
for its error best (GPTQ, arXiv 2210.17323). With U upper triangular, U^T U = H^-1, channels in order of rounding:

    W_j  <-  W_j - (W_k - rounded W_k) U_kj / U_kk    for j > k,    at a cost in output error of (W_k - ...)^2 / U_kk^2

Narrow groups come first: the 4-bit channels round finely what the others have left over.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ptq161.binarize import CODE_WIDTHS, CodeWidth, ColumnGroup, QuantizedWeight, nearest_level, stored
from ptq161.latent import SMALLEST_SCALE
from ptq161.mixed import Widths, best_scale

SMALLEST_DAMPING = 0.01  # keeps the factor of H exact enough in float32, however many the tokens

_CHANNELS_AT_ONCE = 128  # rounded before their errors go to all later channels in one matrix product


def damping_for(cols: int, tokens: int) -> float:
    """How far to trust products of two channels, estimated from `tokens` tokens (docs/decisions/0005)."""
    return max(SMALLEST_DAMPING, cols / tokens)


def compensated_weight(
    weight: Float[Tensor, "rows cols"],
    columns: Sequence[Int64[Tensor, " _"]],
    widths: Widths,
    moments: Float[Tensor, "cols cols"],
) -> QuantizedWeight:
    """Round each column group to levels of its width, later channels making up for the errors of earlier ones.

    columns, widths: channels (ascending), width and size of each group, in the order in which they are rounded; within
    a group, channels of more energy come first. moments: H up to a factor, positive definite (see `damped`). Row scales
    are the best for a group as it is when its turn comes, rounded to float16 before the codes are chosen.
    """
    ordered = [chosen[moments.diagonal()[chosen].argsort(descending=True, stable=True)] for chosen in columns]
    order = torch.cat(ordered)
    factor = inverse_factor(moments[order][:, order])
    cost = factor.diagonal() ** -2
    left = weight.detach().float().T[order].contiguous()  # (cols, rows): a channel is one stretch of memory
    groups, first = [], 0
    for (name, count), chosen in zip(widths, ordered, strict=True):
        width, last = CODE_WIDTHS[name], first + count
        scale = stored(best_scale(left[first:last].T, width, cost[first:last])).clamp(min=SMALLEST_SCALE)
        for start in range(first, last, _CHANNELS_AT_ONCE):
            stop = min(start + _CHANNELS_AT_ONCE, last)
            errors = _round_channels(left[start:stop], factor[start:stop, start:stop], scale.T, width)
            left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        codes = nearest_level(left[first:last] / scale.T, width).to(torch.int8)
        natural = chosen.argsort()
        groups.append(ColumnGroup(chosen[natural], width, codes[natural].T.contiguous(), scale))
        first = last
    return QuantizedWeight(tuple(groups))


def _round_channels(
    left: Float[Tensor, "some rows"],
    factor: Float[Tensor, "some some"],
    scale: Float[Tensor, "1 rows"],
    width: CodeWidth,
) -> Float[Tensor, "some rows"]:
    """Round channel after channel in place, each at what those before have left of it; their errors over U_kk."""
    errors = torch.empty_like(left)
    for channel, value in enumerate(left.split(1)):
        rounded = nearest_level(value / scale, width).mul_(scale)
        torch.sub(value, rounded, out=errors[channel, None]).div_(factor[channel, channel])
        left[channel + 1 :].addr_(factor[channel, channel + 1 :], errors[channel], alpha=-1)
    return errors


def damped(moments: Float[Tensor, "cols cols"], damping: float) -> Float[Tensor, "cols cols"]:
    """A copy of H with its diagonal raised by the share `damping`, and positive even for channels that are always 0."""
    raised = moments.float().clone()
    energy = raised.diagonal()
    mean = energy.mean()
    energy.mul_(1 + damping).add_(torch.where(mean > 0, 1e-6 * mean, 1.0))
    return raised


def inverse_factor(moments: Float[Tensor, "cols cols"]) -> Float[Tensor, "cols cols"]:
    """The upper triangular U with U^T U = H^-1: the inverse of H's Cholesky factor taken from the last channel on.

    Unlike a second Cholesky factorization, of H^-1, this cannot fail for lack of precision.
    """
    factor = torch.linalg.cholesky(moments.flip(0, 1)).flip(0, 1)
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity, upper=True)
    return inverse


def refitted_scales(
    weight: Float[Tensor, "rows cols"], start: QuantizedWeight, moments: Float[Tensor, "cols cols"]
) -> QuantizedWeight:
    """The same codes on the row scales of least output error d H d^T, all groups of a row solved for together.

    A row keeps its scales if a new one is not positive, or if rounded to float16 they are no better.
    """
    columns = torch.cat([group.columns for group in start.groups])
    sizes = [len(group.columns) for group in start.groups]
    original, products = weight.detach().float()[:, columns], moments.float()[columns][:, columns]
    levels = [group.codes.float() for group in start.groups]
    # Up to what no scale changes, the error is s A s^T - 2 b s^T with s (groups,) the scales of a row.
    a, b = [], []
    for own, rows in zip(levels, products.split(sizes), strict=True):
        seen = own @ rows
        b.append((seen * original).sum(dim=1))
        pairs = zip(seen.split(sizes, dim=1), levels, strict=True)
        a.append(torch.stack([(part * other).sum(dim=1) for part, other in pairs], dim=1))
    matrix, vector = torch.stack(a, dim=1).double(), torch.stack(b, dim=1).double()[..., None]
    before = torch.cat([group.scale for group in start.groups], dim=1)
    # A group whose levels are all zero in a row leaves its scale undecided: the unit on the diagonal lets it stay.
    undecided = torch.diag_embed((matrix.diagonal(dim1=1, dim2=2) <= 0).double())
    change = torch.linalg.solve(matrix + undecided, vector - matrix @ before.double()[..., None])[..., 0]
    after = stored(before + change.float())

    def error(scales: Tensor) -> Tensor:
        column = scales.double()[..., None]
        return (column * (matrix @ column - 2 * vector)).sum(dim=(1, 2))

    better = (after > 0).all(dim=1) & (error(after) < error(before))
    scales = torch.where(better[:, None], after, before).split(1, dim=1)
    return QuantizedWeight(
        tuple(replace(group, scale=scale.contiguous()) for group, scale in zip(start.groups, scales, strict=True))
    )
