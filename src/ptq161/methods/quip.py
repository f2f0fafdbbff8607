"""QuIP: weights and H are rotated at random, rounded with error feedback, and rotated back.

Chee et al., arXiv 2307.13304; https://github.com/Cornell-RelaxML/QuIP. The authors' settings (`--quant ldlq
--incoh_processing`): channels rescaled by (H_jj / ||W_j||^2)^(1/4); random orthogonal matrices on both sides, each
two block-diagonal factors between two permutations; one symmetric grid for the whole matrix, up to 2.4 times the root
mean square; LDLQ from the last channel to the first, without greedy passes; H rescaled to a mean diagonal of 1, plus
0.01, and damping 0.01 on top.

LDLQ rounds channel j to the nearest code of w_j plus feedback from the channels already rounded, by H = L D L^T: GPTQ
in another order (Theorem 6 of the paper), so it is computed as GPTQ is.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ptq161.binarize import stored
from ptq161.compensation import inverse_factor
from ptq161.methods.baseline import Baseline, BaselineTask, DenseWeight
from ptq161.methods.hessian import compensate, each_linear
from ptq161.methods.uniform import SCALE_BITS

SEED_BITS = 64  # the rotations are made again from a seed
STEP_BITS = 32  # the scale of the whole matrix


@dataclass(frozen=True)
class Quip(Baseline):
    """span: the grid's end in units of the rotated weights' root mean square."""

    bits: int
    span: float = 2.4
    damping: float = 0.01

    @property
    def claimed_bits(self) -> float:
        return self.bits

    def __call__(self, task: BaselineTask, generator: torch.Generator) -> dict[str, DenseWeight]:
        return each_linear(task, partial(self.quantize, generator=generator))

    def quantize(
        self, weight: Float[Tensor, "rows cols"], moments: Float[Tensor, "cols cols"], generator: torch.Generator
    ) -> DenseWeight:
        """One linear from its weight and H."""
        rows, cols = weight.shape
        channel = channel_scale(weight, moments)
        left = random_orthogonal(rows, generator).to(weight)
        right = random_orthogonal(cols, generator).to(weight)
        rotated = left @ (weight * channel) @ right.T
        curvature = moments / channel / channel[:, None]
        curvature = curvature * (cols / (curvature.trace() + 1e-8)) + 0.01 * torch.eye(cols).to(weight)
        curvature = right @ curvature @ right.T
        curvature.diagonal().add_(self.damping * curvature.diagonal().mean())
        rounded = self.rounded(rotated, curvature)
        bits = {
            "codes": rows * cols * self.bits,
            "input_scales": cols * SCALE_BITS,
            "scales": STEP_BITS,
            "seed": SEED_BITS,
        }
        return DenseWeight(left.T @ rounded @ right / channel, bits)

    def rounded(
        self, weight: Float[Tensor, "rows cols"], curvature: Float[Tensor, "cols cols"]
    ) -> Float[Tensor, "rows cols"]:
        """LDLQ on one grid for the whole matrix."""
        highest = 2**self.bits - 1
        end = self.span * weight.square().mean().sqrt() + 1e-16
        codes = ((weight / end + 1) / 2 * highest).clamp(0, highest)
        values: Tensor = (ldlq(codes, curvature, highest) / highest * 2 - 1) * end
        return values


def ldlq(
    codes: Float[Tensor, "rows cols"], curvature: Float[Tensor, "cols cols"], highest: int
) -> Float[Tensor, "rows cols"]:
    """Whole codes 0 .. highest for fractional ones, from the last channel to the first."""
    factor = inverse_factor(curvature.flip(0, 1))
    rounded = compensate(
        codes.flip(1), factor, lambda first, part: lambda position, values: values.round().clamp(0, highest)
    )
    return rounded.flip(1)


def channel_scale(weight: Float[Tensor, "rows cols"], moments: Float[Tensor, "cols cols"]) -> Float[Tensor, " cols"]:
    """(H_jj / ||W_j||^2)^(1/4) with H's largest entry at 1; float16 values."""
    energy = (moments.diagonal() / moments.abs().max().clamp(min=1e-30)).clamp(min=1e-8)
    return stored((energy / weight.square().sum(dim=0).clamp(min=1e-8)).sqrt().sqrt())


def random_orthogonal(size: int, generator: torch.Generator) -> Float[Tensor, "size size"]:
    """A random orthogonal matrix: two block-diagonal factors across each other, channels shuffled before and after."""
    matrix = torch.eye(size)[torch.randperm(size, generator=generator)]
    before = 1
    for width in two_factors(size):
        after = size // (before * width)
        blocks = haar(before * after, width, generator).reshape(before, after, width, width)
        matrix = torch.einsum("bapq,bqan->bpan", blocks, matrix.reshape(before, width, after, size))
        matrix = matrix.reshape(size, size)
        before *= width
    return matrix[torch.randperm(size, generator=generator)]


def haar(count: int, size: int, generator: torch.Generator) -> Float[Tensor, "count size size"]:
    """Orthogonal matrices, uniformly distributed."""
    q, r = torch.linalg.qr(torch.randn(count, size, size, generator=generator))
    orthogonal: Tensor = q * torch.where(r.diagonal(dim1=-2, dim2=-1) >= 0, 1.0, -1.0)[:, None, :]
    return orthogonal


def two_factors(size: int) -> tuple[int, int]:
    """Two factors of about equal size: the prime factors, in order, dealt out in turn."""
    primes, divisor, rest = [], 2, size
    while rest > 1:
        while rest % divisor == 0:
            primes.append(divisor)
            rest //= divisor
        divisor += 1
    return math.prod(primes[0::2]), math.prod(primes[1::2])
