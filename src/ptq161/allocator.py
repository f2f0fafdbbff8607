"""How this process takes and returns memory, where a step of learning should find what the one before has left."""

import ctypes
import mmap
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# Options of mallopt in glibc's malloc.h, and what its thresholds grow to by themselves until the first call of mallopt.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_GROWN_MMAP_THRESHOLD = 32 << 20


@contextmanager
def kept_memory(expected: int) -> Iterator[None]:
    """Within, freed memory stays with the process, the first `expected` bytes of it in large pages.

    For steps that take and free the same gigabytes again and again: from Linux they come in small pages, each of which
    is cleared and mapped when it is first touched, and glibc gives large tensors back at once. Elsewhere, or with
    another allocator, nothing changes. Nothing that is computed does.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)  # never
    if start := libc.malloc(expected + mmap.PAGESIZE):  # not touched: only room, and what kind of room it is
        libc.madvise(-(-start // mmap.PAGESIZE) * mmap.PAGESIZE, expected, mmap.MADV_HUGEPAGE)
        libc.free(start)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_MAX, 1 << 16)
        libc.mallopt(_MMAP_THRESHOLD, _GROWN_MMAP_THRESHOLD)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _GROWN_MMAP_THRESHOLD)
        libc.malloc_trim(0)
