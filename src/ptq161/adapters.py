"""Low-rank adapters on tensors: which linears get one, merging, a grid to train through, where large weights lie.

Nothing here reads a file, trains or knows PEFT. An adapter of a linear is a pair, `down` (rank, cols) and `up`
(rows, rank), with a scale: the linear then computes with W + scale * up @ down (LoRA, arXiv 2106.09685).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ptq161.binarize import ColumnGroup, QuantizedWeight, folded_rows, group_values, nearest_level
from ptq161.errors import InputError

# What families call the linear that ends attention: the published code leaves it alone.
ATTENTION_OUTPUTS = ("o_proj", "out_proj", "dense")

# "Salient" here: among this share of a matrix's weights of largest magnitude; and the share of its input channels in
# which they would all fit, twice over, if they kept to whole channels.
SALIENT_SHARE, CHANNEL_SHARE = 0.05, 0.10


def target_linears(linears: Sequence[str], targets: Sequence[str]) -> list[str]:
    """The linears, by full name, that get an adapter: those whose last part is in `targets`.

    No targets: every linear but the one that ends attention (published code). Raises InputError for a target that no
    linear is called.
    """
    names = {linear: linear.rpartition(".")[2] for linear in linears}
    known = list(dict.fromkeys(names.values()))
    strange = [target for target in targets if target not in known]
    if strange:
        raise InputError(f"no linear is called {strange[0]!r}; expected targets among: {', '.join(known)}")
    chosen = set(targets) or set(known) - set(ATTENTION_OUTPUTS)
    return [linear for linear, name in names.items() if name in chosen]


def merged_weight(
    weight: Float[Tensor, "rows cols"], down: Float[Tensor, "rank cols"], up: Float[Tensor, "rows rank"], scale: float
) -> Float[Tensor, "rows cols"]:
    """The one matrix that stands for a weight and its adapter; differentiable."""
    return weight + scale * (up @ down)


def on_grid(weight: Float[Tensor, "rows cols"], grid: QuantizedWeight) -> Float[Tensor, "rows cols"]:
    """The weight with every entry at its nearest level of `grid`, whose factors stay; codes of `grid` do not matter.

    Backward, the gradient passes as if nothing had been rounded (straight-through).
    """
    with torch.no_grad():
        rounded = torch.empty_like(weight)
        for group in grid.groups:
            rounded[:, group.columns] = group_values(_coded(weight[:, group.columns], group))
    return rounded + (weight - weight.detach())


def _coded(part: Float[Tensor, "rows gcols"], group: ColumnGroup) -> ColumnGroup:
    """The group with the codes whose values are nearest to `part`. A factor of zero leaves a code without effect."""
    scale, mean = folded_rows(group)
    if group.col is not None:
        part = part / _divisor(group.col)
    if mean is not None:
        part = part - mean
    levels = part / _divisor(scale)
    return replace(group, codes=nearest_level(levels if group.zero is None else levels + group.zero, group.width))


def _divisor(factor: Tensor) -> Tensor:
    return torch.where(factor == 0, 1.0, factor)


def concentration(weight: Float[Tensor, "rows cols"]) -> float:
    """Share of a matrix's salient weights that lie in the tenth of its input channels with most of them.

    0.1 would be an even spread, 1 is whole channels: what section 3.4 calls a row-wise pattern (of the transpose).
    """
    per_channel = _salient(weight).sum(dim=0).sort(descending=True).values
    chosen = max(1, int(CHANNEL_SHARE * weight.shape[1]))
    return float(per_channel[:chosen].sum() / per_channel.sum())


def salient_counts(weight: Float[Tensor, "rows cols"], bins: int) -> Int64[Tensor, "channel_bins row_bins"]:
    """How many salient weights lie in each cell of a coarse map: input channels downwards, output rows to the right."""
    salient = _salient(weight).T.to(torch.int64)
    for axis in (0, 1):
        size = salient.shape[axis]
        count = min(bins, size)
        place = torch.arange(size, device=weight.device) * count // size
        shape = (count, salient.shape[1]) if axis == 0 else (salient.shape[0], count)
        salient = salient.new_zeros(shape).index_add(axis, place, salient)
    return salient


def _salient(weight: Tensor) -> Tensor:
    """True on the `SALIENT_SHARE` of the weights with the largest magnitude, ties included."""
    magnitude = weight.abs()
    kept = max(1, int(SALIENT_SHARE * magnitude.numel()))
    return magnitude >= magnitude.flatten().kthvalue(magnitude.numel() - kept + 1).values
