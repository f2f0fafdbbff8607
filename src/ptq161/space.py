"""Where streams of hidden states lie: in memory, or in memory-mapped files of a folder."""

import errno
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Space:
    """A place for large tensors. folder: where their files are made; None keeps them in memory.

    A file loses its name as soon as it is mapped: it takes disk while its tensor lives, however the process ends.
    """

    folder: Path | None = None

    def empty(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor with any content. Raises OSError if the disk has no room for it."""
        if self.folder is None or not prod(shape):
            return torch.empty(*shape, dtype=dtype)
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix="stream-", delete=False) as file:
            try:
                # Reserved now: a page that finds the disk full when it is written ends the process without a word.
                _reserve(file.fileno(), prod(shape) * dtype.itemsize)
                flat = torch.from_file(file.name, shared=True, size=prod(shape), dtype=dtype)
            finally:
                os.unlink(file.name)
        return flat.view(*shape)

    def like(self, tensor: Tensor) -> Tensor:
        """A tensor of the same shape and dtype, with any content; off the CPU it lies where `tensor` lies."""
        return self.empty(tensor.shape, tensor.dtype) if tensor.device.type == "cpu" else torch.empty_like(tensor)

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor in this space."""
        return self.like(tensor).copy_(tensor)


MEMORY = Space()


def _reserve(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:  # macOS
        free = os.statvfs(descriptor)
        if free.f_bavail * free.f_frsize < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.truncate(descriptor, size)
