"""Memory for tiles: one linear's behind the other's, in huge pages where the system has them.

A product reads its weight once from end to end. In pages of 4 KB that takes an address translation every 4 KB, which
costs a fifth of the time; in pages of 2 MB it costs nothing. A linear alone would leave much of its last page empty, so
the linears of a model share pages.
"""

import mmap
import sys
from contextlib import suppress

import torch
from jaxtyping import UInt8
from torch import Tensor

_PAGE = 2 * 2**20
_LINE = 64
_CHUNK = 64 * 2**20  # of address space: pages take memory when they are first written


class TileMemory:
    """Zeroed bytes for the tiles of a model's linears. A chunk lives as long as any tensor in it."""

    def __init__(self) -> None:
        self._chunk: Tensor | None = None
        self._used = 0

    def take(self, tiles: int, nbytes: int) -> UInt8[Tensor, "tiles bytes"]:
        """Zeros for `tiles` tiles of `nbytes` each, at the start of a cache line."""
        size = tiles * nbytes
        if self._chunk is None or self._used + size > len(self._chunk):
            self._chunk, self._used = _chunk(max(size, _CHUNK)), 0
        taken = self._chunk[self._used : self._used + size].view(tiles, nbytes)
        self._used += -(-size // _LINE) * _LINE
        return taken


def _chunk(size: int) -> Tensor:
    """At least `size` zero bytes from the start of a huge page on."""
    pages = mmap.mmap(-1, -(-size // _PAGE) * _PAGE + _PAGE)
    if sys.platform == "linux":
        with suppress(OSError):  # a kernel without huge pages: the memory is as good, only slower
            pages.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    return memory[-memory.data_ptr() % _PAGE :]
