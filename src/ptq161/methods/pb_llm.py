"""PB-LLM: the most salient tenth of the weights at 8 bits, the others binarized, with error compensation.

Shang et al., arXiv 2310.00034; https://github.com/hahnyuan/PB-LLM (`gptq_pb`). The authors' settings for LLaMA:
saliency w^2 / U_jj^2 (Hessian), a fraction of 0.9 binarized ("xnor": centre and mean magnitude per row), 8-bit
asymmetric min-max grids per row, damping 0.01. They report 1.7 bits, which leaves out which weights are which: they
are scattered, so one more bit per weight, and the row vectors.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ptq161.binarize import stored
from ptq161.compensation import Rounding
from ptq161.methods.baseline import Baseline, BaselineTask, DenseWeight
from ptq161.methods.hessian import compensate, damped_factor, each_linear
from ptq161.methods.uniform import SCALE_BITS, minmax_grid


@dataclass(frozen=True)
class PbLlm(Baseline):
    """low_fraction: share of the weights that is binarized; high_bits: width of the others."""

    low_fraction: float = 0.9
    high_bits: int = 8
    damping: float = 0.01

    @property
    def claimed_bits(self) -> float:
        return self.low_fraction + (1 - self.low_fraction) * self.high_bits

    def __call__(self, task: BaselineTask, generator: torch.Generator) -> dict[str, DenseWeight]:
        return each_linear(task, self.quantize)

    def quantize(self, weight: Float[Tensor, "rows cols"], moments: Float[Tensor, "cols cols"]) -> DenseWeight:
        """One linear from its weight and H."""
        high = minmax_grid(weight, self.high_bits)
        factor, dead = damped_factor(moments, self.damping)
        weight = weight.masked_fill(dead, 0.0)
        low = least_salient(weight.square() / factor.diagonal().square(), self.low_fraction)
        mean, scale = binary_row(weight, low)

        def fit(first: int, part: Tensor) -> Rounding:
            def round_channel(position: int, values: Tensor) -> Tensor:
                binary = mean + torch.where(values >= mean, scale, -scale)
                return torch.where(low[:, first + position, None], binary, high.rounded(values))

            return round_channel

        return DenseWeight(compensate(weight, factor, fit), pb_llm_bits(low, self.high_bits))


def least_salient(saliency: Float[Tensor, "rows cols"], fraction: float) -> Bool[Tensor, "rows cols"]:
    """True on the `fraction` of all weights with the lowest saliency (ties at the threshold included)."""
    rank = min(int(saliency.numel() * fraction), saliency.numel() - 1)
    return saliency <= saliency.flatten().kthvalue(rank + 1).values


def binary_row(
    weight: Float[Tensor, "rows cols"], low: Bool[Tensor, "rows cols"]
) -> tuple[Float[Tensor, "rows 1"], Float[Tensor, "rows 1"]]:
    """(centre, scale) of each row, float16 values; as in the authors' code, 8-bit weights count as zeros in both."""
    masked = weight * low
    mean = stored(masked.mean(dim=1, keepdim=True))
    return mean, stored((masked - mean).abs().mean(dim=1, keepdim=True))


def pb_llm_bits(low: Bool[Tensor, "rows cols"], high_bits: int) -> dict[str, int]:
    """Signs, 8-bit codes, the bitmap that tells them apart, and per row two scales, a centre and a zero point."""
    binarized = int(low.sum())
    return {
        "codes": binarized + (low.numel() - binarized) * high_bits,
        "bitmap": low.numel(),
        "scales": low.shape[0] * 2 * SCALE_BITS,
        "means": low.shape[0] * SCALE_BITS,
        "zeros": low.shape[0] * high_bits,
    }
