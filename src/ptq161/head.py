"""The head of a packed model that is not packed itself."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ptq161.kernels import dense_linear, has_dense_kernel


class DenseHead(nn.Linear):
    """An `nn.Linear` whose products with few tokens read its weight as fast as memory goes, on a CPU with kernels.

    The same weight, sums in float32 as torch's, results in x's dtype. Anything else is `nn.Linear`'s.
    """

    @classmethod
    def of(cls, linear: nn.Linear) -> "DenseHead":
        """In place of `linear`, which has no bias: the same parameter, not a copy."""
        assert linear.bias is None
        head = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        head.weight = linear.weight
        return head.train(linear.training)

    def plain(self) -> nn.Linear:
        """The reverse of `of`."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = self.weight
        return linear.train(self.training)

    def forward(self, x: Float[Tensor, "*batch cols"]) -> Float[Tensor, "*batch rows"]:
        """Multiply by the weight."""
        if not torch.compiler.is_compiling() and has_dense_kernel(x, self.weight):
            return dense_linear(x, self.weight)
        return super().forward(x)
