"""Facts about this machine."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ptq161.errors import InputError
from ptq161.machine import (
    available_memory_bytes,
    free_memory_bytes,
    multiplies_bfloat16,
    peak_rss_bytes,
    pick_device,
)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_in_bytes_and_at_least_what_is_resident():
    held = torch.ones(1 << 26, dtype=torch.uint8)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert held.numel() < resident <= peak_rss_bytes() * 1.01  # the kernel counts pages in batches
    assert peak_rss_bytes() < 1 << 40


def test_available_memory_is_less_than_all_and_more_than_nothing():
    available = available_memory_bytes()
    assert available is None or 1 << 20 < available < 1 << 50
    free = free_memory_bytes(torch.device("cpu"))
    assert (free is None) == (available is None)
    assert free is None or free == pytest.approx(available, rel=0.5)  # others come and go between the two looks


KEEPING = """
import os, resource, torch
from ptq161.machine import kept_memory, resident_bytes

size = 256 << 20

def pages_taken():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(size, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with kept_memory(0):
    for _ in range(5):  # glibc's holes are a little too small for what has left them, until some lie side by side
        pages_taken()
    assert pages_taken() < 0.1 * 3 * size / os.sysconf("SC_PAGE_SIZE"), "taken anew"
    kept = resident_bytes()
assert resident_bytes() < kept - 0.9 * size, "not given back"
try:
    with kept_memory(2 * size):
        assert resident_bytes() < kept - 0.9 * size, "expected memory was touched"
        raise ValueError
except ValueError:
    print("done")
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only its allocator can be told")
def test_kept_memory_is_not_taken_anew_and_given_back_at_the_end():
    """In a process of its own: what other tests have left in the heap can keep a part of it from being given back."""
    found = subprocess.run([sys.executable, "-c", KEEPING], capture_output=True, text=True, check=False)
    assert found.stdout == "done\n", found.stderr


def test_device_names():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cpu:x", "", "cuda:99"])
def test_device_that_is_not_there_is_named(name):
    with pytest.raises(InputError, match=f"device '{name}'.*--device auto") as error:
        pick_device(name)
    assert "\n" not in str(error.value)


def test_bfloat16_support_is_a_yes_or_no():
    assert multiplies_bfloat16(torch.device("cpu")) in (True, False)
    assert multiplies_bfloat16(torch.device("meta")) is False
