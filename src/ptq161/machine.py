"""Facts about the machine this process runs on."""

import resource
import sys
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
