"""What matrix products are computed in, by setting and hardware."""

import pytest
import torch
from torch import nn

from ptq161 import arithmetic
from ptq161.config import Compute

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("compute", "native", "expected"),
    [
        (Compute.AUTO, True, torch.bfloat16),
        (Compute.AUTO, False, torch.float32),
        (Compute.BFLOAT16, False, torch.bfloat16),
        (Compute.FLOAT32, True, torch.float32),
    ],
)
def test_auto_is_what_the_hardware_multiplies(monkeypatch, compute, native, expected):
    monkeypatch.setattr(arithmetic, "multiplies_bfloat16", lambda device: native)
    assert arithmetic.products_dtype(compute, CPU) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_in_that_dtype(dtype):
    linear = nn.Linear(3, 2)
    with arithmetic.products_in(dtype, CPU):
        assert linear(torch.ones(1, 3)).dtype == dtype
    assert linear(torch.ones(1, 3)).dtype == torch.float32


def test_weights_are_widened_only_for_float32_products():
    linear = nn.Linear(3, 2, dtype=torch.bfloat16)
    arithmetic.widen(linear, torch.bfloat16)
    assert linear.weight.dtype == torch.bfloat16
    arithmetic.widen(linear, torch.float32)
    assert linear.weight.dtype == linear.bias.dtype == torch.float32
