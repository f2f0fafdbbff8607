"""The mixed start point: column groups at 1 bit, ternary and 4 bits, each with the best row scale there is.

A group's weights are level * scale: no mean, zero or column scale. Those vectors cost as many bits as they save once
the codes themselves are learned (docs/decisions/0004).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ptq161.binarize import CODE_WIDTHS, CodeWidth, ColumnGroup, QuantizedWeight, nearest_level, stored
from ptq161.kernels.rounding import has_rounding_kernel, searched_scales
from ptq161.latent import SMALLEST_SCALE

# Candidate scales as multiples of a row's root mean square. The best ones for a normal variable are 0.80 (1 bit; it has
# a closed form), 1.22 (ternary) and 0.17 (4 bits, levels two apart); real rows have longer and shorter tails.
_CANDIDATES = {"ternary": torch.linspace(0.6, 1.8, 25), "4bit": torch.linspace(0.08, 0.32, 25)}

# Beyond these, candidate scales as shares of the one that just reaches a row's largest weight: where that weight is an
# outlier, the mean square says little about the others.
_REACHES = (0.4, 0.6, 0.8, 1.0)

_ROWS_AT_ONCE = 128  # of the search on a CPU: what stays in its cache is tried three times as fast
_FEW_WEIGHTS = 2**18  # which stay there anyway

# Code width and number of channels of every column group of a linear, narrowest first.
Widths = Sequence[tuple[str, int]]


def group_columns(importance: Float[Tensor, " cols"], widths: Widths) -> list[Int64[Tensor, " _"]]:
    """The channels of each group, ascending: the most important ones go to the last group, the least to the first.

    Among equals the lower channel index counts as more important, so the groups do not depend on the machine.
    """
    ranked = importance.argsort(descending=True, stable=True).flip(0)
    return [columns.sort().values for columns in ranked.split([count for _, count in widths])]


def mixed_weight(
    weight: Float[Tensor, "rows cols"],
    columns: list[Int64[Tensor, " _"]],
    widths: Widths,
    input_squares: Float[Tensor, " cols"],
) -> QuantizedWeight:
    """Round each column group to the nearest levels of its width, on scales that minimize the output error.

    input_squares: mean square of each input channel; the error counted is sum_j input_squares_j * dW_ij^2 per row.
    """
    groups = []
    for (name, _), chosen in zip(widths, columns, strict=True):
        width, part = CODE_WIDTHS[name], weight.float()[:, chosen]
        scale = stored(best_scale(part, width, input_squares[chosen])).clamp(min=SMALLEST_SCALE)
        codes = nearest_level(part / scale, width).to(torch.int8)
        groups.append(ColumnGroup(columns=chosen, width=width, codes=codes, scale=scale))
    return QuantizedWeight(tuple(groups))


def best_scale(
    part: Float[Tensor, "rows gcols"], width: CodeWidth, input_squares: Float[Tensor, " gcols"]
) -> Float[Tensor, "rows 1"]:
    """The row scales of least weighted squared error: in closed form for signs, by search over a grid for the others.

    Each candidate decides the codes; the scale is then the best one for these codes, and the codes follow it.
    """
    importance = input_squares / input_squares.mean().clamp(min=torch.finfo(part.dtype).tiny) + 1e-6
    if width.count == 2:
        return (part.abs() @ importance / importance.sum())[:, None].clamp(min=SMALLEST_SCALE)
    spread = (part.square() @ importance / importance.sum()).sqrt()[:, None]
    usual = spread * _CANDIDATES[width.name].to(spread)
    outermost = part.abs().amax(dim=1, keepdim=True) / -width.lowest
    beyond = torch.maximum(outermost * outermost.new_tensor(_REACHES), usual[:, -1:])
    candidates = torch.cat([usual, beyond], dim=1).clamp(min=SMALLEST_SCALE)
    if has_rounding_kernel(part, part.dtype):
        return searched_scales(part, width, importance, candidates, SMALLEST_SCALE)
    many = part.device.type == "cpu" and part.numel() > _FEW_WEIGHTS
    pieces = (t.split(_ROWS_AT_ONCE if many else len(part)) for t in (part, candidates))
    return torch.cat([_searched_scales(rows, width, importance, tried) for rows, tried in zip(*pieces, strict=True)])


def _searched_scales(
    part: Float[Tensor, "rows gcols"],
    width: CodeWidth,
    importance: Float[Tensor, " gcols"],
    candidates: Float[Tensor, "rows candidates"],
) -> Float[Tensor, "rows 1"]:
    """The search in torch; where there is a kernel it does the same (docs/decisions/0026)."""
    chosen = candidates[:, :1]
    best = torch.full_like(chosen, torch.inf)
    for candidate in candidates.split(1, dim=1):
        levels = nearest_level(part / candidate, width)
        fitted = (levels * part @ importance) / (levels.square() @ importance).clamp(min=torch.finfo(part.dtype).tiny)
        scale = fitted[:, None].clamp(min=SMALLEST_SCALE)
        error = (nearest_level(part / scale, width).mul_(scale).sub_(part).square_() @ importance)[:, None]
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, scale, chosen)
    return chosen
