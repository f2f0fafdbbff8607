"""RTN: every weight to the nearest value of its row's (or group's) grid. No calibration.

The baseline of GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978): asymmetric grids from minimum to maximum, per row
or per 128 channels.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ptq161.methods.baseline import Baseline, BaselineTask, DenseWeight
from ptq161.methods.uniform import minmax_grid, spans, uniform_bits


@dataclass(frozen=True)
class RoundToNearest(Baseline):
    """group: input channels that share a scale and a zero point; None: a whole row."""

    bits: int
    group: int | None

    @property
    def claimed_bits(self) -> float:
        return self.bits

    def __call__(self, task: BaselineTask, generator: torch.Generator) -> dict[str, DenseWeight]:
        weights = {name: linear.weight.detach().float() for name, linear in task.linears.items()}
        return {
            name: DenseWeight(nearest(weight, self.bits, self.group), uniform_bits(weight.shape, self.bits, self.group))
            for name, weight in weights.items()
        }


def nearest(weight: Float[Tensor, "rows cols"], bits: int, group: int | None) -> Float[Tensor, "rows cols"]:
    """Each weight rounded to the min-max grid of its row and group."""
    parts = [weight[:, span] for span in spans(weight.shape[1], group)]
    return torch.cat([minmax_grid(part, bits).rounded(part) for part in parts], dim=1)
