"""One product for linears that see the same input, like a decoder block's q, k and v, or gate and up.

A model calls them one after the other. With few tokens the call itself costs as much as the arithmetic of a small
linear, so the first call multiplies for all of them and the others are handed what is kept (docs/decisions/0021).
"""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from ptq161.kernels.cpu import ReadyWeight
from ptq161.kernels.tiles import TILE_ROWS, TiledWeight, tile_count
from ptq161.packing import LinearLayout

TOKENS = 8  # with more the arithmetic outweighs the calls


class _Kept:
    """The parts of one product that were not asked for yet, and the input that they belong to."""

    def __init__(self, x: Tensor, exact: bool, parts: Sequence[Tensor]) -> None:
        self.x, self.version, self.exact = weakref.ref(x), x._version, exact
        self.parts: list[Tensor | None] = list(parts)


class SharedProduct:
    """Linears with the same columns as one: `part` of the product with x, for each of them.

    What is kept is found by x itself: the same tensor object, not written to since. If a product's parts are not all
    asked for, its linears do not see the same input after all (an adapter, a hook); from then on there is nothing here.
    """

    def __init__(self, weight: TiledWeight, layouts: Sequence[LinearLayout]) -> None:
        """`weight`: the tiles of linears with these layouts, one's behind the other's (`joined_layout`)."""
        self._ready, self._rows = ReadyWeight(weight), [layout.rows for layout in layouts]
        self._stored_rows = [*(TILE_ROWS * tile_count(layout) for layout in layouts[:-1]), layouts[-1].rows]
        self._kept: _Kept | None = None
        self._in_vain = False

    def part(self, index: int, x: Tensor, *, exact: bool) -> Tensor | None:
        """Rows of linear `index` of x @ W.T, (..., rows); None if it had better be computed alone."""
        if self._in_vain or x.is_inference() or x.shape[:-1].numel() > TOKENS:
            return None
        if x.requires_grad and torch.is_grad_enabled():
            return None
        kept = self._kept
        if kept is not None:
            same = kept.x() is x and kept.version == x._version and kept.exact == exact
            part = kept.parts[index] if same else None
            if part is None:
                self._in_vain, self._kept = True, None
                return None
            kept.parts[index] = None
            if all(other is None for other in kept.parts):
                self._kept = None
            return part
        parts = self._ready.linear(x, None, exact=exact).split(self._stored_rows, -1)
        kept = _Kept(x, exact, [part[..., :rows] for part, rows in zip(parts, self._rows, strict=True)])
        part, kept.parts[index] = kept.parts[index], None
        self._kept = kept
        return part


def joined_layout(layouts: Sequence[LinearLayout]) -> LinearLayout | None:
    """The layout of all their tiles as one linear's; None if their columns differ in more than order.

    All but the last linear's last tile may hold rows of zeros, which become outputs that nobody asks for.
    """
    first = layouts[0]
    if any(layout.groups != first.groups for layout in layouts) or any(group.col for group in first.groups):
        return None
    rows = sum(TILE_ROWS * tile_count(layout) for layout in layouts[:-1]) + layouts[-1].rows
    return LinearLayout(rows, first.groups)


def joined_tiles(tiles: Sequence[Tensor]) -> Tensor:
    """The tiles of several linears as one tensor: where they lie if one is behind the other, a copy if not."""
    first, total = tiles[0], sum(len(part) for part in tiles)
    place = first.data_ptr()
    for part in tiles:
        if part.data_ptr() != place or part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return torch.cat(list(tiles))
        place += part.nbytes
    return first.as_strided((total, first.shape[1]), (first.shape[1], 1))
