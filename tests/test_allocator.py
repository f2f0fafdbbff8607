"""Memory that stays with the process for a while."""

import platform
import subprocess
import sys

import pytest

KEEPING = """
import os, resource, torch
from ptq161.allocator import kept_memory
from ptq161.machine import resident_bytes

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
