"""OWQ: a few weak columns stay float16, the others are rounded by GPTQ on searched grids.

Lee et al., arXiv 2306.02272; https://github.com/xvyaward/owq. The authors' settings: weak are the columns with the
largest H_jj ||W_j - Q(W_j)||^2; their number spends what the target has beyond the code width, in equal parts on
every linear of the block, rounded up to an even number; grids per row by search (100 scales, every zero point, error
to the power of 2.4; 40 scales where weak columns are looked for); damping 0.01; weak columns last, so that they take
in what the others' errors leave.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ptq161.binarize import salient_columns, stored
from ptq161.methods.baseline import Baseline, BaselineTask, DenseWeight
from ptq161.methods.hessian import compensate, damped_factor, input_moments
from ptq161.methods.uniform import INDEX_BITS, SCALE_BITS, UniformGrid

FLOAT_BITS = 16
ERROR_POWER = 2.4
ROWS_AT_ONCE = 64  # the search goes over these weights thousands of times: they should stay in the cache


@dataclass(frozen=True)
class Owq(Baseline):
    """target_bits: code width plus what the weak columns may add to it, scales and zero points not counted."""

    bits: int
    target_bits: float
    damping: float = 0.01
    steps: int = 100  # scales tried for a row
    choosing_steps: int = 40  # the same where weak columns are looked for

    @property
    def claimed_bits(self) -> float:
        return self.target_bits

    def __call__(self, task: BaselineTask, generator: torch.Generator) -> dict[str, DenseWeight]:
        moments = input_moments(task)
        weights = {name: linear.weight.detach().float() for name, linear in task.linears.items()}
        counts = weak_counts(weights, self.bits, self.target_bits)
        return {
            name: self.quantize(weight, moments[task.columns_from.get(name, name)], counts[name])
            for name, weight in weights.items()
        }

    def quantize(
        self, weight: Float[Tensor, "rows cols"], moments: Float[Tensor, "cols cols"], count: int
    ) -> DenseWeight:
        """One linear from its weight and H, with `count` weak columns."""
        rows, cols = weight.shape
        rounded = search_grid(weight, self.bits, self.choosing_steps).rounded(weight)
        weak = salient_columns(moments.diagonal() * (weight - rounded).square().sum(dim=0), count)
        order = weak.int().argsort(stable=True)
        factor, dead = damped_factor(moments[order][:, order], self.damping)
        sorted_weight = weight[:, order].masked_fill(dead, 0.0)
        grid = search_grid(sorted_weight[:, : cols - count], self.bits, self.steps)
        done = compensate(
            sorted_weight, factor, lambda first, part: lambda position, values: grid.rounded(values), cols - count
        )
        done[:, cols - count :] = stored(done[:, cols - count :])
        bits = {
            "codes": rows * (cols - count) * self.bits,
            "float_columns": rows * count * FLOAT_BITS,
            "columns": count * INDEX_BITS,
            "scales": rows * SCALE_BITS,
            "zeros": rows * self.bits,
        }
        return DenseWeight(done[:, order.argsort()], bits)


def weak_counts(weights: Mapping[str, Tensor], bits: int, target_bits: float) -> dict[str, int]:
    """Linear -> number of weak columns."""
    spare = (target_bits - bits) * sum(weight.numel() for weight in weights.values())
    share = spare / (FLOAT_BITS - bits) / len(weights)
    counts = {name: round(share / len(weight)) for name, weight in weights.items()}
    return {name: min(count + count % 2, weights[name].shape[1]) for name, count in counts.items()}


def search_grid(weight: Float[Tensor, "rows cols"], bits: int, steps: int) -> UniformGrid:
    """For each row the scale, out of `steps` up to its whole range, and the zero point that round it best."""
    grids = [_search_rows(rows, bits, steps) for rows in weight.split(ROWS_AT_ONCE)]
    return UniformGrid(bits, torch.cat([grid.scale for grid in grids]), torch.cat([grid.zero for grid in grids]))


def _search_rows(rows: Float[Tensor, "rows cols"], bits: int, steps: int) -> UniformGrid:
    highest = 2**bits - 1
    whole = (rows.amax(dim=1, keepdim=True).clamp(min=0) - rows.amin(dim=1, keepdim=True).clamp(max=0)) / highest
    best = UniformGrid(bits, torch.ones_like(whole), torch.zeros_like(whole))
    least = torch.full_like(whole, float("inf"))
    for step in range(1, steps + 1):
        scale = stored(whole * (step / steps))
        scale = torch.where(scale == 0, 1.0, scale)
        nearest = (rows / scale).round_()
        for zero in range(highest + 1):
            errors = nearest.clamp(-zero, highest - zero).mul_(scale).sub_(rows).abs_().pow_(ERROR_POWER)
            error = errors.mean(dim=1, keepdim=True)
            better = error < least
            scales = torch.where(better, scale, best.scale)
            best = UniformGrid(bits, scales, torch.where(better, float(zero), best.zero))
            least = torch.minimum(error, least)
    return best
