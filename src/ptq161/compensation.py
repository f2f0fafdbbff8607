"""Error-compensated codes: what rounding one channel does to the output, the channels not yet rounded take back.

With D = W - rounded W and H = sum over tokens of y y^T, where y reaches the linear, the output error of a row is
D H D^T. Plain rounding looks at H's diagonal alone. Here channels are rounded one after another, and after each the
others move to where they make up for its error best (GPTQ, arXiv 2210.17323). With U upper triangular, U^T U = H^-1,
channels in order of rounding:

    W_j  <-  W_j - (W_k - rounded W_k) U_kj / U_kk        for j > k

Narrow groups come first: the 4-bit channels round finely what the others have left over.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ptq161.binarize import CODE_WIDTHS, CodeWidth, nearest_level, stored
from ptq161.latent import SMALLEST_SCALE, LatentWeight
from ptq161.mixed import Widths, best_scale

SMALLEST_DAMPING = 0.01  # keeps the factor of H exact enough in float32, however many the tokens

# (position among the channels that are rounded, its values (rows, 1)) -> rounded values
Rounding = Callable[[int, Tensor], Tensor]

_CHANNELS_AT_ONCE = 128  # rounded before their errors go to all later channels in one matrix product


def damped(moments: Float[Tensor, "cols cols"], tokens: int) -> Float[Tensor, "cols cols"]:
    """A copy of H, summed over `tokens` tokens, that does not trust products of two channels more than it should.

    The diagonal is raised by the share cols / tokens: the fewer the tokens, the nearer to plain rounding. It is
    positive even for channels that are always 0.
    """
    raised = moments.float().clone()
    energy = raised.diagonal()
    mean = energy.mean()
    energy.mul_(1 + max(SMALLEST_DAMPING, len(moments) / tokens)).add_(torch.where(mean > 0, 1e-6 * mean, 1.0))
    return raised


def drift_correction(
    moments: Float[Tensor, "cols cols"], cross: Float[Tensor, "cols cols"], tokens: int
) -> Float[Tensor, "cols cols"]:
    """The matrix M for which W + W M, on the quantized stream, is nearest to both targets of Eq. 7.

    moments: H over the quantized stream. cross: C = sum of x y^T, x what the original model feeds the linear for the
    same token. The targets W x and W y, at equal weight, ask for W (C + H) / 2 H^-1; damping leads back to W.
    """
    correction: Tensor = torch.linalg.solve(damped(moments, tokens), (cross - moments).T / 2).T
    return correction


def compensated_weight(
    weight: Float[Tensor, "rows cols"],
    columns: Sequence[Int64[Tensor, " _"]],
    widths: Widths,
    moments: Float[Tensor, "cols cols"],
) -> LatentWeight:
    """Latents that round to compensated codes: each is where the errors of earlier channels had moved its weight.

    columns, widths: channels (ascending), width and size of each group, in the order in which they are rounded; within
    a group, channels of more energy come first. moments: H up to a factor, positive definite (see `damped`). Row scales
    are the best for a group as it is when its turn comes, rounded to float16 before the codes are chosen.
    """
    energy = moments.diagonal()
    order = torch.cat([chosen[energy[chosen].argsort(descending=True, stable=True)] for chosen in columns])
    factor = inverse_factor(moments[order][:, order])
    left = weight.detach().float().T[order].contiguous()  # (cols, rows): a channel is one stretch of memory
    scales, first = [], 0
    for name, count in widths:
        width, last = CODE_WIDTHS[name], first + count
        scale = stored(best_scale(left[first:last].T, width, energy[order[first:last]])).clamp(min=SMALLEST_SCALE)
        for start in range(first, last, _CHANNELS_AT_ONCE):
            stop = min(start + _CHANNELS_AT_ONCE, last)
            round_channels(left, factor, start, stop, partial(_to_nearest_level, scale, width))
        scales.append(scale)
        first = last
    grouped = torch.cat(list(columns))
    return LatentWeight(
        columns=grouped,
        widths=tuple(CODE_WIDTHS[name] for name, _ in widths),
        sizes=tuple(count for _, count in widths),
        latent=left[order.argsort()][grouped].T.contiguous().requires_grad_(),
        base=torch.cat(scales, dim=1),
        gain=torch.ones(len(weight), len(widths), device=weight.device).requires_grad_(),
    )


def _to_nearest_level(
    scale: Float[Tensor, "rows 1"], width: CodeWidth, position: int, values: Float[Tensor, "rows 1"]
) -> Float[Tensor, "rows 1"]:
    return nearest_level(values / scale, width).mul_(scale)


def round_channels(
    left: Float[Tensor, "cols rows"], factor: Float[Tensor, "cols cols"], first: int, last: int, rounding: Rounding
) -> Float[Tensor, "some rows"]:
    """Round channels first..last-1 one after another; returns what they are rounded to.

    Every later channel of `left` is moved in place to make up for the errors; those that are rounded stay as the errors
    of earlier ones had moved them. Channels beyond `last` are moved by one matrix product.
    """
    part = left[first:last]
    rounded, errors = torch.empty_like(part), torch.empty_like(part)
    for position in range(last - first):
        row = factor[first + position, first + position : last]
        rounded[position] = rounding(position, part[position, :, None])[:, 0]
        torch.sub(part[position], rounded[position], out=errors[position]).div_(row[0])
        part[position + 1 :].addr_(row[1:], errors[position], alpha=-1)
    left[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
    return rounded


def inverse_factor(moments: Float[Tensor, "cols cols"]) -> Float[Tensor, "cols cols"]:
    """The upper triangular U with U^T U = H^-1: the inverse of H's Cholesky factor taken from the last channel on.

    Unlike a second Cholesky factorization, of H^-1, this cannot fail for lack of precision.
    """
    factor = torch.linalg.cholesky(moments.flip(0, 1)).flip(0, 1)
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity, upper=True)
    return inverse
