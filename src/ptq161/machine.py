"""Facts about the machine this process runs on."""

import resource
import sys
from pathlib import Path

import torch


def peak_rss_bytes() -> int:
    """Peak resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory_bytes() -> int | None:
    """Memory that can be had without swapping, in bytes; None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products run in hardware there (AVX-512 BF16 or AMX on a CPU, Ampere or later on a GPU)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported())
    return False


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one, else the CPU; anything else is a torch device name."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
