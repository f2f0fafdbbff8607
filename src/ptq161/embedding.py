"""Embedding and head at 8 bits: the drop-ins for `nn.Embedding` and for the head that is tied to it.

A head with a weight of its own is a PackedLinear like any other. Tied, both are one matrix in memory, too.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from ptq161.binarize import CODE_WIDTHS, ColumnGroup, group_values
from ptq161.kernels import tiled_rows
from ptq161.layout import PackedLinearSpec
from ptq161.linear import PackedLinear
from ptq161.packing import unpack_codes

_WEIGHTS_AT_ONCE = 1 << 24


class ScaledEmbedding(nn.Embedding):
    """A dense embedding whose rows are multiplied by a constant, as Gemma's are."""

    def __init__(self, weight: Tensor, factor: float) -> None:
        super().__init__(weight.shape[0], weight.shape[1], _weight=weight)
        self.factor = factor

    def forward(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch cols"]:
        """The tokens' rows times the factor, which is rounded to the weight's dtype first, as Gemma does."""
        return _scaled(super().forward(tokens), self.factor)


class PackedEmbedding(PackedLinear):
    """Rows of a packed weight: token numbers (...) -> (..., cols), times a constant that some models have there.

    Everything about the weight is as in PackedLinear, whose product is what a tied head computes. Rows come out in
    `dtype`, which follows `module.to(dtype)`.
    """

    def __init__(self, spec: PackedLinearSpec, *, factor: float, dtype: torch.dtype, device: str | None = None) -> None:
        super().__init__(spec, device=device)
        self.num_embeddings, self.embedding_dim = spec.layout.rows, spec.layout.cols
        self.factor, self.dtype = factor, dtype
        self.exact = True  # rounding the activations of a head costs more than it saves: docs/decisions/0010

    def forward(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch cols"]:
        """The tokens' rows, unpacked one by one."""
        return _scaled(self._rows(tokens).to(self.dtype), self.factor)

    def product(self, x: Float[Tensor, "*batch cols"]) -> Float[Tensor, "*batch rows"]:
        """x @ W.T: the logits of a tied head."""
        return super().forward(x)

    def dense_embedding(self, dtype: torch.dtype) -> ScaledEmbedding:
        """The embedding with its weight unpacked once, in `dtype`."""
        weight = torch.empty(self.num_embeddings, self.embedding_dim, dtype=dtype, device=next(self.buffers()).device)
        for rows in torch.arange(self.num_embeddings).split(max(1, _WEIGHTS_AT_ONCE // self.embedding_dim)):
            weight[rows] = self._rows(rows.to(weight.device)).to(dtype)
        return ScaledEmbedding(weight, self.factor).train(self.training)

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}, int8 rows"

    def _rows(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch cols"]:
        if self.is_tiled:
            return tiled_rows(tokens, self._tiled())
        (group,) = self.spec.layout.groups
        width = CODE_WIDTHS[group.width]
        codes = functional.embedding(tokens.flatten(), self.get_buffer("weight"))
        scale = functional.embedding(tokens.flatten(), self.get_buffer("scale_0")[:, None])
        columns = torch.arange(group.cols, device=tokens.device)
        values = group_values(ColumnGroup(columns, width, unpack_codes(codes, group.cols, width), scale.float()))
        return values.reshape(*tokens.shape, group.cols)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedEmbedding":
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)
        return self


class TiedHead(nn.Module):
    """A head that shares the weight of a packed embedding and stores none: (..., cols) -> (..., rows)."""

    def __init__(self, embedding: PackedEmbedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.in_features, self.out_features = embedding.in_features, embedding.out_features
        self.bias = bias
        self._embedding = (embedding,)  # in a tuple, so that it does not become a submodule

    def forward(self, x: Float[Tensor, "*batch cols"]) -> Float[Tensor, "*batch rows"]:
        """Multiply by the embedding's weight; the result is in x's dtype."""
        logits = self._embedding[0].product(x)
        return logits if self.bias is None else logits + self.bias

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, tied to the embedding"


def _scaled(rows: Tensor, factor: float) -> Tensor:
    return rows if factor == 1 else rows * torch.tensor(factor, dtype=rows.dtype, device=rows.device)
