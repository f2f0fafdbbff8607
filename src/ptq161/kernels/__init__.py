"""The `ptq161::linear` op. Importing this package defines it; a module per device may add a faster implementation."""

from ptq161.kernels.ops import has_fast_kernel, linear

__all__ = ["has_fast_kernel", "linear"]
