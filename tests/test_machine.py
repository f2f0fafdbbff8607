"""Facts about this machine."""

import os
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
