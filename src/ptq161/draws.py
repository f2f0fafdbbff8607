"""Tokens drawn from what a model predicts."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def tokens_at(points: Float[Tensor, " rows"], chances: Float[Tensor, "rows vocab"]) -> Int64[Tensor, " rows"]:
    """The token of each row in whose share its point lies, the shares being laid end to end from 0 to 1.

    Uniform points draw tokens with these chances, as torch.multinomial does; but that takes a random number for every
    token of the vocabulary, and on a CPU much longer.
    """
    ends = chances.cumsum(dim=-1)
    wanted = points[:, None] * ends[:, -1:]  # rounded sums end near 1, not at it
    last = chances.shape[1] - 1  # where rounding takes a point to the end itself
    return torch.searchsorted(ends, wanted, right=True)[:, 0].clamp(max=last)
