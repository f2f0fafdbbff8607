"""What matrix products of learning are computed in: bfloat16 where the hardware multiplies it, else float32.

A processor without such products emulates them, several times slower than float32.
"""

import torch
from torch import nn

from ptq161.config import Compute
from ptq161.machine import multiplies_bfloat16


def products_dtype(compute: Compute, device: torch.device) -> torch.dtype:
    """torch.bfloat16 or torch.float32: what a setting means on a device."""
    fast = multiplies_bfloat16(device) if compute is Compute.AUTO else compute is Compute.BFLOAT16
    return torch.bfloat16 if fast else torch.float32


def products_in(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Inside, products run in `products_dtype`; states, losses and whatever else is float32 stay so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def widen(module: nn.Module, dtype: torch.dtype) -> None:
    """Make a module's weights float32 where products are computed in that: 16-bit ones could not be multiplied."""
    if dtype == torch.float32:
        module.float()
