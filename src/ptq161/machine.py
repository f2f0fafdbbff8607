"""Facts about the machine this process runs on."""

import ctypes
import mmap
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ptq161 import ranks
from ptq161.errors import InputError


def peak_rss_bytes() -> int:
    """Peak resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int | None:
    """Resident memory of this process now, in bytes; None where the system does not say."""
    return _status_bytes("VmRSS")


def reset_peak_rss() -> int | None:
    """Forget the peak resident memory so far, for `recent_peak_rss_bytes`; returns the resident bytes now.

    None where the system cannot do that.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return resident_bytes()


def recent_peak_rss_bytes() -> int | None:
    """Peak resident memory since `reset_peak_rss`, in bytes; None where the system does not say."""
    return _status_bytes("VmHWM")


def _status_bytes(key: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    for line in status.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None


def available_memory_bytes() -> int | None:
    """Memory that can be had without swapping, in bytes; None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def free_memory_bytes(device: torch.device) -> int | None:
    """Memory that each rank on this machine can have on a device, in bytes; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = available_memory_bytes()
    return None if available is None else available // ranks.count_here()


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


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products run in hardware there (AVX-512 BF16 on a CPU, Ampere or later on a GPU)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported())
    return False


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one, else the CPU; anything else is a torch device name.

    Raises InputError for a device that torch cannot use here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=name).device
    except (AssertionError, RuntimeError) as error:
        raise InputError(
            f"device {name!r} cannot be used: {str(error).splitlines()[0]}; expected cpu, cuda or cuda:N where there "
            "is a GPU, or --device auto"
        ) from error
