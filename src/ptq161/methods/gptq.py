"""GPTQ: rounding to a uniform grid with error compensation.

Frantar et al., arXiv 2210.17323; https://github.com/IST-DASLab/gptq. The authors' settings: asymmetric min-max grids,
damping 0.01, blocks of 128 channels in their natural order, all linears of a block calibrated in one pass over the
stream of the blocks quantized before. With groups, a group's grid is fitted to its weights as the errors of earlier
channels have moved them. Their later `--act-order`, which takes the channels with the largest inputs first, is
a setting.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ptq161.compensation import Rounding
from ptq161.errors import InputError
from ptq161.methods.baseline import Baseline, BaselineTask, DenseWeight
from ptq161.methods.hessian import BLOCK, compensate, damped_factor, each_linear
from ptq161.methods.uniform import INDEX_BITS, minmax_grid, spans, uniform_bits


@dataclass(frozen=True)
class Gptq(Baseline):
    """group: input channels that share a scale and a zero point, a divisor of 128; None: a whole row.

    act_order: go by descending diagonal of H. Groups are then of neighbours in that order, which must be stored.
    """

    bits: int
    group: int | None
    damping: float = 0.01
    act_order: bool = False

    def __post_init__(self) -> None:
        if self.group is not None and (self.group < 1 or BLOCK % self.group):
            raise InputError(f"group={self.group} for gptq: expected a divisor of {BLOCK}, or none for a whole row")

    @property
    def claimed_bits(self) -> float:
        return self.bits

    def __call__(self, task: BaselineTask, generator: torch.Generator) -> dict[str, DenseWeight]:
        return each_linear(task, self.quantize)

    def quantize(self, weight: Float[Tensor, "rows cols"], moments: Float[Tensor, "cols cols"]) -> DenseWeight:
        """One linear from its weight and H."""
        order = torch.arange(len(moments), device=moments.device)
        if self.act_order:
            order = moments.diagonal().argsort(descending=True, stable=True)
        factor, dead = damped_factor(moments[order][:, order], self.damping)
        weight = weight[:, order].masked_fill(dead, 0.0)
        whole = minmax_grid(weight, self.bits)

        def fit(first: int, part: Tensor) -> Rounding:
            if self.group is None:
                return lambda position, values: whole.rounded(values)
            size = self.group
            grids = [minmax_grid(part[:, span], self.bits) for span in spans(part.shape[1], size)]
            return lambda position, values: grids[position // size].rounded(values)

        bits = uniform_bits(weight.shape, self.bits, self.group)
        if self.act_order and self.group is not None:
            bits["columns"] = len(order) * INDEX_BITS
        return DenseWeight(compensate(weight, factor, fit)[:, order.argsort()], bits)
